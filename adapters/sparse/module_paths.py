"""Containers whose keys hold whole module paths, `base_model.model.<path>...`: which modules they adapt."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import (
    AdapterError,
    AdapterFormatError,
    BaseMismatchError,
    UnsupportedAdapterError,
)
from loramux.adapters.peft_config import LoraSettings
from loramux.adapters.sparse.fields import Fields
from loramux.adapters.sparse.moe_peft import LoraShape
from loramux.adapters.sparse.tensor_file import some

PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?:route|router|[AB]\.?\d*)\.weight")


@dataclass(frozen=True)
class AdaptedModules:
    """The modules that config and file agree on, in the order of the base."""

    base: BaseShapes
    settings: LoraSettings
    shape: LoraShape
    modules: tuple[str, ...]

    @classmethod
    def take(cls, fields: Fields, keys: Iterable[str], base: BaseShapes) -> AdaptedModules:
        """From a config and the keys of its file.

        Raises:
            AdapterFormatError: a field is missing or out of bounds, or the config names modules that the file
                has no tensors for.
            BaseMismatchError: the config names no module of the base.
        """
        shape = LoraShape.take(fields)
        settings = LoraSettings(
            r=shape.rank,
            alpha=shape.scale * shape.rank,
            use_rslora=False,
            rank_patterns=(),
            alpha_patterns=(),
            target_modules=fields.targets(),
            exclude_modules=None,
            layers=None,
            layers_patterns=(),
        )
        open_ended = settings.target_modules == "all-linear"
        found = {match["module"] for key in keys if (match := _KEY.fullmatch(key))}
        modules = tuple(
            module
            for module in base.modules
            if (module in found if open_ended else settings.targets(module) is True)
        )
        if not modules:
            raise BaseMismatchError(
                f"{fields.path}: target_modules name no linear module of base {base.id!r}; the file adapts "
                f"{some(found) or 'nothing'}"
            )
        return cls(base, settings, shape, modules)

    def stranger(self, path: Path) -> Callable[[str], AdapterError]:
        """Explains a key that has no business in the file."""

        def explain(key: str) -> AdapterError:
            match = _KEY.fullmatch(key)
            if match is None:
                return UnsupportedAdapterError(f"{path}: tensor {key} is not served: no such tensor is known")
            if match["module"] not in self.base.modules:
                return BaseMismatchError(
                    f"{path}: tensor {key}: base {self.base.id!r} has no linear module {match['module']}"
                )
            if match["module"] not in self.modules:
                return AdapterFormatError(f"{path}: tensor {key}: its config does not target this module")
            return AdapterFormatError(
                f"{path}: tensor {key} has no place in it: its config describes no such tensor"
            )

        return explain
