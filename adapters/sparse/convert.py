"""An adapter directory from one file format or key layout to another."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loramux.adapters.adapter_files import (
    CONFIG_FILE,
    PICKLE_FILE,
    TENSOR_FILE,
    confined,
    read_object,
)
from loramux.adapters.errors import AdapterFormatError, UnsupportedAdapterError
from loramux.adapters.sparse.mixlora import LEGACY_PROJECTIONS, STRATEGIES, STRATEGY_NAMES, key_layout, naming

LAYOUT = 3
_DAMAGED = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError),
    *(RuntimeError, TypeError, ValueError, struct.error),
)
"""What torch's restricted unpickler raises on damaged bytes, besides its own error (found by fuzzing it)."""


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Attributes:
        path: the tensor file that was written.
        tensors: how many it holds.
        renamed: how many of them got another key.
    """

    path: Path
    tensors: int
    renamed: int


def convert(
    source: str | Path, out: str | Path | None = None, *, layout: int | None = None, to_bin: bool = False
) -> Converted:
    """Write the tensors of an adapter directory as safetensors, or as a pickle for upstream programs.

    A pickle is read by torch's restricted unpickler, which makes tensors and nothing else. The result appears
    whole or not at all.

    Args:
        source: holds `adapter_config.json` and `adapter_model.safetensors` or `adapter_model.bin`; of
            both, the safetensors are read.
        out: directory to write, created if missing; None adds the other file to `source`.
        layout: 3 renames the keys of a MixLoRA checkpoint of an older layout, and in its config the routing
            strategy and projections.
        to_bin: write `adapter_model.bin` (float32, as upstream writes it) instead of safetensors.

    Raises:
        AdapterFormatError: files missing or damaged, or the target is there already.
        AdapterPathError: a file of `source` lies outside it.
        UnsupportedAdapterError: a pickle that holds anything but tensors, or a layout that is not written.
    """
    folder = Path(source)
    target = folder if out is None else Path(out)
    if layout not in (None, LAYOUT):
        raise UnsupportedAdapterError(
            f"layout {layout}: only layout {LAYOUT} is written; the older ones are read"
        )
    config = confined(folder, CONFIG_FILE, None)
    fields = read_object(config)
    path = target / (PICKLE_FILE if to_bin else TENSOR_FILE)
    for place in (path, *(() if target.resolve() == folder.resolve() else (target / CONFIG_FILE,))):
        if place.exists():
            raise AdapterFormatError(f"{place} is there already; choose another directory with --out")
    if layout is not None and target.resolve() == folder.resolve():
        raise AdapterFormatError(
            f"{folder}: renamed keys need a directory of their own; choose one with --out"
        )
    with _tensors(folder) as (tensors, metadata):
        renamed = tensors
        if layout is not None:
            if not any(key.startswith("mixlora.") for key in tensors):
                raise UnsupportedAdapterError(
                    f"{folder}: it is no MixLoRA checkpoint, and no other has layouts"
                )
            naming_of = naming(key_layout(folder, tensors))
            renamed = {naming_of.name(key) or key: tensor for key, tensor in tensors.items()}
            fields = _renamed_config(fields)
        target.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target, prefix=".convert-") as partial:
            unfinished = Path(partial) / path.name
            if to_bin:
                torch.save({key: tensor.float() for key, tensor in renamed.items()}, unfinished)
            else:
                save_file(renamed, unfinished, metadata=metadata)
            if not (target / CONFIG_FILE).exists():
                if layout is None:
                    shutil.copyfile(config, target / CONFIG_FILE)
                else:
                    (target / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n")
            unfinished.replace(path)
    return Converted(path, len(renamed), len(renamed.keys() - tensors.keys()))


@contextmanager
def _tensors(folder: Path) -> Iterator[tuple[dict[str, Tensor], dict[str, str]]]:
    if (folder / TENSOR_FILE).exists() or not (folder / PICKLE_FILE).exists():
        path = confined(folder, TENSOR_FILE, None)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - a file
                yield tensors, file.metadata() or {"format": "pt"}
        except SafetensorError as error:
            raise AdapterFormatError(f"{path}: not a readable safetensors file: {error}") from error
        return
    yield _unpickled(confined(folder, PICKLE_FILE, None)), {"format": "pt"}


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsupportedAdapterError(
            f"{path}: it holds more than tensors, or is no pickle at all; nothing of it was run: "
            f"{str(error).splitlines()[0]}"
        ) from error
    except _DAMAGED as error:
        raise AdapterFormatError(f"{path}: not a readable tensor file: {error}") from error
    if not isinstance(loaded, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        raise UnsupportedAdapterError(f"{path}: expected tensors by name, found {type(loaded).__name__}")
    # Views of one storage become tensors of their own, as safetensors needs them.
    return {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in loaded.items()}


def _renamed_config(fields: Mapping[str, object]) -> dict[str, object]:
    """A MixLoRA config as layout 3 has it: new names of strategies and projections."""
    renamed = dict(fields)
    strategy = fields.get("routing_strategy")
    if isinstance(strategy, str) and strategy in STRATEGIES:
        renamed["routing_strategy"] = STRATEGY_NAMES[STRATEGIES[strategy]]
    targets = fields.get("target_modules")
    if isinstance(targets, list):
        renamed["target_modules"] = [LEGACY_PROJECTIONS.get(name, name) for name in targets]
    elif isinstance(targets, dict):
        renamed["target_modules"] = {LEGACY_PROJECTIONS.get(name, name): on for name, on in targets.items()}
    return renamed
