"""Finished stages of a build, so that a killed build goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

Arrays = dict[str, npt.NDArray[Any]]


def fingerprint(*parts: object) -> str:
    """SHA-256 over the JSON of everything a stage depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Stages:
    """Results of stages as safetensors files in one folder, each with the fingerprint of its inputs."""

    def __init__(self, folder: Path) -> None:
        """Keep results in `folder`, which is created."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def load(self, name: str, inputs: str) -> Arrays | None:
        """The arrays of a finished stage; None when it is not finished or had other inputs."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="np") as file:
                if (file.metadata() or {}).get("inputs") != inputs:
                    return None
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError:
            return None

    def save(self, name: str, inputs: str, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Record a stage as finished; the file appears whole or not at all."""
        path = self.folder / f"{name}.safetensors"
        partial = path.with_name(path.name + ".partial")
        contiguous = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
        save_file(contiguous, partial, metadata={"inputs": inputs})
        partial.replace(path)
