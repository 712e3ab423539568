"""Where a GGUF file lies: named itself, alone in a folder, or inside an installed package."""

from __future__ import annotations

from pathlib import Path

from loramux.router.packages import package_folder
from loramux.server.errors import StartError


def find_gguf(given: str) -> Path | None:
    """The GGUF file that a name stands for; None for a model folder and for what may be a hub id.

    Raises:
        StartError: the file is not there, or the folder or package has several or none.
    """
    path = Path(given)
    if path.is_file():
        return path
    if path.is_dir():
        return None if any(path.glob("*.safetensors")) else _only(path, sorted(path.glob("*.gguf")))
    if path.suffix == ".gguf":
        raise StartError(f"base model {given}: no such file")
    if (folder := package_folder(given)) is None:
        return None
    if (file := _only(folder, sorted(folder.rglob("*.gguf")))) is None:
        raise StartError(f"base model {given}: the package in {folder} holds no GGUF file")
    return file


def _only(folder: Path, files: list[Path]) -> Path | None:
    if len(files) > 1:
        names = ", ".join(str(file.relative_to(folder)) for file in files[:4])
        raise StartError(f"base model {folder}: it holds {len(files)} GGUF files ({names}); name one of them")
    return files[0] if files else None
