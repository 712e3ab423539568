"""The embeddings of a base as its files hold them: a copy saved with an adapter is told from a change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

# A vocabulary of 256 k at a width of 4,096 is two gigabytes: it is compared in pieces.
_ROWS = 4096
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class BaseWeights:
    """Input embedding and output head of one base.

    Attributes:
        folder: where its safetensors files lie.
        names: name in the model, e.g. `lm_head.weight`, -> name in the files, another where they are tied.
    """

    folder: Path
    names: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module, folder: Path) -> BaseWeights:
        """Find the names on a model, which may be on the meta device."""
        modules = {module: name for name, module in model.named_modules()}
        get = ("get_input_embeddings", "get_output_embeddings")
        found = [modules.get(getattr(model, name, lambda: None)()) for name in get]
        names = {f"{name}.weight": f"{name}.weight" for name in found if name is not None}
        tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
        if tied and len(names) == 2:
            names[f"{found[1]}.weight"] = f"{found[0]}.weight"
        return cls(folder, names)

    def equal(self, name: str, tensor: Any) -> bool:
        """Whether the base has this tensor, value by value.

        Args:
            name: as in the model's state.
            tensor: a slice of an open safetensors file.
        """
        if name not in self.names:
            return False
        stored = self.names[name]
        try:
            with safe_open(self.folder / self._file(stored), framework="pt") as file:
                mine = file.get_slice(stored)
                if mine.get_shape() != tensor.get_shape():
                    return False
                starts = range(0, mine.get_shape()[0], _ROWS)
                return all(torch.equal(_rows(mine, start), _rows(tensor, start)) for start in starts)
        except (SafetensorError, OSError, KeyError, ValueError):
            return False  # What can't be compared is not known to be equal.

    def _file(self, stored: str) -> str:
        index = self.folder / _INDEX
        if not index.is_file():
            return _SINGLE
        found: str = json.loads(index.read_text())["weight_map"][stored]
        return found


def _rows(tensor: Any, start: int) -> torch.Tensor:
    """In float32, which holds every value of the 16-bit types."""
    rows: torch.Tensor = tensor[start : start + _ROWS]
    return rows.float()
