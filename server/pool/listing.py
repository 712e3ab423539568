"""The pools of a machine: the one that ships, and those in folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loramux.server.pool.manifest import MANIFEST, Manifest, PoolError, read_pool
from loramux.server.settings import DEFAULT_POOL


@dataclass(frozen=True, slots=True)
class Listed:
    """One pool; `manifest` is None where it cannot be read, and `problem` says why."""

    root: Path
    manifest: Manifest | None = None
    problem: str = ""

    @property
    def ships(self) -> bool:
        """Whether it is the pool that is served when no other is named."""
        return self.root == DEFAULT_POOL

    def json(self) -> dict[str, object]:
        """For programs."""
        if self.manifest is None:
            return {"path": str(self.root), "default": self.ships, "problem": self.problem}
        return {
            "path": str(self.root),
            "default": self.ships,
            "name": self.manifest.name,
            "base": self.manifest.base.id,
            "experts": [entry.id for entry in self.manifest.experts],
            "sparse": [entry.id for entry in self.manifest.sparse],
        }

    def line(self) -> str:
        """For people."""
        mark = " (the default)" if self.ships else ""
        if self.manifest is None:
            return f"{self.root}{mark}: not usable: {self.problem}"
        experts, sparse = len(self.manifest.experts), len(self.manifest.sparse)
        return (
            f"{self.root}{mark}: {self.manifest.name} on {self.manifest.base.id}, "
            f"{experts} expert{'s' * (experts != 1)}, {sparse} sparse model{'s' * (sparse != 1)}"
        )


def list_pools(folders: Sequence[Path]) -> list[Listed]:
    """The pool that ships, then those that lie in the folders or are one of them, by path.

    Raises:
        PoolError: no such folder.
    """
    roots = dict.fromkeys([DEFAULT_POOL, *(root for folder in folders for root in _roots(folder))])
    return [_listed(root) for root in roots]


def _roots(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise PoolError(f"{folder}: no such directory; name folders that hold pools")
    if (folder / MANIFEST).is_file():
        yield folder
    yield from sorted(file.parent for file in folder.glob(f"*/{MANIFEST}"))


def _listed(root: Path) -> Listed:
    try:
        return Listed(root, read_pool(root).manifest)
    except PoolError as error:
        return Listed(root, problem=str(error))
