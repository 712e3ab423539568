"""Blends as adapter directories on the disk, which backends read: written whole or not at all, within a limit
of bytes."""

import json
import os
import re
import shutil
import tempfile
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from loramux.adapters.lora import LoraAdapter
from loramux.adapters.peft_format import write_lora
from loramux.server.errors import StartError

#: Every name begins so: what else a backend has loaded is left alone.
PREFIX = "loramux-"
_NAME = re.compile(rf"{PREFIX}[0-9a-f]{{32}}")
_FACTS_FILE = "loramux.json"
_UNFINISHED = ".writing-"


class FolderInUse(StartError):
    """Another process has it."""


@dataclass(frozen=True, slots=True)
class Written:
    """A blend on the disk: what was made of it (`Materialised`), and its bytes."""

    method: str
    rank: int
    relative_error: float
    nbytes: int


class BlendFolders:
    """Directories by name, in the order of their last use. One process alone may use a folder.

    `write` and `erase` touch the disk, on one thread of the caller's; the rest is bookkeeping on the event
    loop: `add` after the one, `forget` before the other.

    Args:
        root: made if it is missing; what an earlier process left there is taken over.
        there: the same folder as the backends see it.

    Raises:
        StartError: it cannot be used; `FolderInUse` where another process uses it.
    """

    def __init__(self, root: Path, *, there: str | None = None) -> None:
        self.root = root
        self._there = str(root.resolve()) if there is None else there.rstrip("/")
        self._written: OrderedDict[str, Written] = OrderedDict()
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(root / ".lock")
            self._lock.acquire(timeout=0)
            self._take_over()
        except Timeout:
            raise FolderInUse(
                f"backend.folder {root} is in use by another loramux; give each its own"
            ) from None
        except OSError as error:
            raise StartError(f"backend.folder {root}: {error.strerror or error}") from None

    def close(self) -> None:
        """Leave the folder to others."""
        self._lock.release()

    @property
    def nbytes(self) -> int:
        return sum(written.nbytes for written in self._written.values())

    def names(self) -> list[str]:
        """What is there, least recently used first."""
        return list(self._written)

    def find(self, name: str) -> Written | None:
        """What is there under a name, which counts as a use."""
        written = self._written.get(name)
        if written is not None:
            self._written.move_to_end(name)
        return written

    def path_there(self, name: str) -> str:
        """Where a backend finds it."""
        return f"{self._there}/{name}"

    def size(self, name: str) -> int:
        """Its bytes."""
        return self._written[name].nbytes

    def add(self, name: str, written: Written) -> None:
        """It is there."""
        self._written[name] = written

    def forget(self, name: str) -> None:
        """It is there no more."""
        self._written.pop(name, None)

    def write(self, name: str, adapter: LoraAdapter, facts: Written, base: str) -> Written:
        """Write an adapter under a name; a reader finds all of it or nothing. Blocks.

        Raises:
            OSError: the disk is full, or the folder is gone.
        """
        unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.root))
        try:
            write_lora(adapter, unfinished, base)
            (unfinished / _FACTS_FILE).write_text(json.dumps(asdict(facts)) + "\n")
            for file in unfinished.iterdir():  # a backend may run as another user
                file.chmod(0o644)
            unfinished.chmod(0o755)
            os.replace(unfinished, self.root / name)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        return replace(facts, nbytes=_bytes(self.root / name))

    def erase(self, name: str) -> None:
        """Remove its files. Blocks."""
        shutil.rmtree(self.root / name, ignore_errors=True)

    def _take_over(self) -> None:
        kept: list[tuple[float, str, Written]] = []
        for folder in self.root.iterdir():
            if folder.name.startswith(_UNFINISHED):
                shutil.rmtree(folder, ignore_errors=True)
            elif _NAME.fullmatch(folder.name) and folder.is_dir():
                try:
                    facts = Written(**json.loads((folder / _FACTS_FILE).read_text()))
                except (OSError, ValueError, TypeError):
                    shutil.rmtree(folder, ignore_errors=True)
                    continue
                kept.append((folder.stat().st_mtime, folder.name, replace(facts, nbytes=_bytes(folder))))
        self._written.update((name, written) for _, name, written in sorted(kept))


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
