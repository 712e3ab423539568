"""Putting a pool together beside the place where it will be, and moving it there whole."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from loramux.adapters.adapter_files import CONFIG_FILE, TENSOR_FILE
from loramux.router.encoder_place import EncoderPlace
from loramux.router.packages import module_name, requirement
from loramux.router.state import RouterState
from loramux.router.store import save_router
from loramux.server.base_files import BaseFiles
from loramux.server.engine.gguf.folder import SOURCE_FILE
from loramux.server.pool.manifest import (
    MANIFEST,
    BaseEntry,
    ExpertEntry,
    Manifest,
    PoolError,
    RouterEntry,
    hash_files,
    write_manifest,
)

_SLUG = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_RESERVED = "auto"
_BASE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
    SOURCE_FILE,
)


def check_id(kind: str, id: str, taken: Collection[str]) -> None:
    """Whether an expert or a sparse model (`kind`) may be called `id`.

    Raises:
        PoolError: it is no slug, a reserved word, or the name of something else.
    """
    if not _SLUG.fullmatch(id) or id == _RESERVED:
        raise PoolError(f"{kind} id {id!r}: use a lower-case slug such as tax-law, and not {_RESERVED!r}")
    if id in taken:
        raise PoolError(f"{kind} id {id!r} is used in this pool already; choose another")


def copy_adapter(source: Path, place: Path) -> None:
    """Config and tensors of an adapter into `place`, which is made anew."""
    if place.exists():
        shutil.rmtree(place)
    place.mkdir(parents=True)
    for name in (CONFIG_FILE, TENSOR_FILE):
        shutil.copyfile(source / name, place / name)


def copy_tree(source: Path, target: Path) -> None:
    """Copy contents without modes: safetensors writes files for their owner alone, but a pool is served."""
    shutil.copytree(source, target, copy_function=shutil.copyfile)


def check_target(out: Path) -> None:
    """Whether a pool may be written to `out`.

    Raises:
        PoolError: something other than a pool is there.
    """
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise PoolError(f"{out}: exists and is no pool; choose another directory")


class Assembly:
    """A pool that is being put together in a folder beside `out`; `finish` moves it there."""

    def __init__(self, out: Path) -> None:
        """Begin; what an assembly before this one left is removed.

        Raises:
            PoolError: `out` is something other than a pool.
        """
        check_target(out)
        self._out = out
        self.root = out.with_name(out.name + ".partial")
        if self.root.exists():
            shutil.rmtree(self.root)
        self.root.mkdir(parents=True)

    def put_base(self, base: BaseFiles, id: str, *, copy: bool) -> BaseEntry:
        """The base's entry; with `copy`, a folder or file comes into the pool, else its place is recorded."""
        return BaseEntry(
            id,
            self._base_path(base, copy=copy),
            hash=f"sha256:{base.content}" if base.content else None,
            wheel=requirement(module_name(base.given)) if base.is_packaged else None,
        )

    def put_router(self, state: RouterState, encoder: EncoderPlace) -> RouterEntry:
        """The router; an encoder from a directory is copied, that of a package or the hub is named."""
        folder = self.root / "router"
        own = encoder.hub_id is None and encoder.package is None
        if own:
            copy_tree(encoder.folder, folder / "encoder")
        save_router(state, folder, encoder_path="encoder" if own else None, encoder_package=encoder.package)
        return RouterEntry(path="router")

    def finish(
        self, name: str, base: BaseEntry, experts: tuple[ExpertEntry, ...], router: RouterEntry
    ) -> None:
        """Write the manifest and put the pool in its place, where an older one makes room."""
        manifest = Manifest(
            format="loramux-pool",
            version=1,
            name=name,
            base=base,
            experts=experts,
            router=router,
            sparse=(),
            files={},
        )
        write_manifest(self.root, replace(manifest, files=hash_files(self.root)))
        old = self._out.with_name(self._out.name + ".old")
        if old.exists():
            shutil.rmtree(old)
        if self._out.exists():
            self._out.rename(old)
        self.root.rename(self._out)
        if old.exists():
            shutil.rmtree(old)

    def _base_path(self, base: BaseFiles, *, copy: bool) -> str:
        if base.is_packaged:
            return base.given  # a package, which is there under its name wherever it is installed
        place = EncoderPlace.find(base.folder)
        if place.hub_id is not None:
            return place.hub_id
        if not copy:
            return str((base.gguf or place.folder).resolve())
        inside = self.root / "base"
        inside.mkdir()
        if base.gguf is not None:
            shutil.copyfile(base.gguf, inside / f"{base.gguf.name.removesuffix('.gguf')}.gguf")
            return "base"
        for file in sorted(place.folder.iterdir()):
            if file.name in _BASE_FILES or (file.suffix == ".safetensors" and file.is_file()):
                shutil.copyfile(file, inside / file.name)
        return "base"
