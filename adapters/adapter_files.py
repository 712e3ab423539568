"""An adapter directory: which files it holds, where they may lie, and its config as a JSON object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from loramux.adapters.errors import AdapterFormatError, AdapterPathError, UnsupportedAdapterError

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

MAX_CONFIG_BYTES = 4 * 2**20


def confined(folder: Path, name: str, root: str | Path | None) -> Path:
    """The resolved path of a file of the directory, if it exists and stays inside.

    Args:
        folder: the adapter directory.
        name: of the file.
        root: what it must lie in after resolving links; None means `folder` itself.

    Raises:
        AdapterFormatError: no such directory, or no such file in it.
        AdapterPathError: it leads outside.
        UnsupportedAdapterError: the tensors are there only as a pickle.
    """
    if not folder.is_dir():
        raise AdapterFormatError(f"{folder}: no such directory")
    path = (folder / name).resolve()
    if not path.is_relative_to(Path(root if root is not None else folder).resolve()):
        raise AdapterPathError(f"{folder / name}: leads to {path}, outside the allowed directory")
    if path.is_file():
        return path
    if name == TENSOR_FILE and (folder / PICKLE_FILE).exists():
        raise UnsupportedAdapterError(
            f"{folder}: only {PICKLE_FILE} is there, a pickle, which is never opened to serve; make a "
            f"{TENSOR_FILE} of it once: loramux convert {folder}"
        )
    raise AdapterFormatError(f"{folder}: {name} is missing")


def read_object(path: Path) -> Mapping[str, object]:
    """The fields of a JSON file.

    Raises:
        AdapterFormatError: too large, not JSON, or not an object.
    """
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise AdapterFormatError(f"{path}: {size} bytes is too large for an adapter config")
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise AdapterFormatError(f"{path}: expected a JSON object, got {type(fields).__name__}")
    return fields
