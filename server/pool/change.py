"""Changing a pool of hashed files: a new router beside the old one, then a new manifest in one move."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from loramux.router.header import Header
from loramux.router.state import RouterState
from loramux.router.store import save_router
from loramux.server.pool.manifest import (
    Manifest,
    Pool,
    PoolError,
    hash_files,
    read_pool,
    verify,
    write_manifest,
)

CLASSIFIER = "classifier"


def sound_pool(root: Path) -> Pool:
    """A pool whose every file is what its manifest says.

    Raises:
        PoolError: it is none.
    """
    pool = read_pool(root)
    if problems := verify(root):
        raise PoolError(f"{root}: {problems[0]}; mend the pool first (`loramux pool check {root}`)")
    return pool


def put_manifest(pool: Pool, manifest: Manifest, router: Path, *, without: Path | None = None) -> None:
    """Make `manifest` with another router the pool's, and remove the old router.

    `without`: a folder that is about to go, whose files are not listed any more.
    """
    old = pool.router_dir
    files = {
        name: value
        for name, value in hash_files(pool.root).items()
        if not any((pool.root / name).resolve().is_relative_to(gone) for gone in (old, without) if gone)
    }
    entry = replace(manifest.router, path=router.name)
    write_manifest(pool.root, replace(manifest, router=entry, files=files))
    shutil.rmtree(old)


def write_router(pool: Pool, header: Header, state: RouterState, classifier: Path | None = None) -> Path:
    """The pool's router in another state, in a new folder beside the old one.

    `classifier`: the folder of a fine-tuned classifier, which is copied and replaces the linear head; None
    leaves none behind.
    """
    number = 2
    while (pool.root / f"router-{number}").resolve() == pool.router_dir:
        number += 1
    place = pool.root / f"router-{number}"
    if place.exists():
        shutil.rmtree(place)
    old = pool.router_dir / header.classifier_path if header.classifier_path is not None else None
    shutil.copytree(
        pool.router_dir,
        place,
        ignore=lambda folder, names: [
            name for name in names if old is not None and Path(folder, name) == old
        ],
    )
    if classifier is not None:
        shutil.copytree(classifier, place / CLASSIFIER, copy_function=shutil.copyfile)
    save_router(
        state,
        place,
        encoder_path=header.encoder_path,
        encoder_package=header.encoder_package,
        transformer_classifier=None if classifier is None else CLASSIFIER,
    )
    return place
