"""The tensors of a PEFT LoRA file, matched with its config and with the modules of a base."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import AdapterFormatError, BaseMismatchError, UnsupportedAdapterError
from loramux.adapters.lora import FactorStack
from loramux.adapters.payload import DTYPES, Payload
from loramux.adapters.peft_config import LoraSettings

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")

_FOREIGN = (
    (r"^mixlora\.", "it belongs to a MixLoRA checkpoint"),
    (r"^mola\.", "it belongs to a MoLA checkpoint"),
    (r"^loramoe\.|lora_route\b|lora_[AB]\d", "it belongs to a LoRAMoE checkpoint"),
    (r"lora_router\b", "it belongs to a LoRACoE checkpoint"),
    (r"lora_magnitude_vector", "it is a DoRA magnitude"),
    (r"lora_embedding_[AB]", "it adapts an embedding"),
    (r"trainable_tokens", "it replaces rows of the embedding"),
    (r"modules_to_save", "it replaces a whole module of the base"),
    (r"lora_[AB]\.(.*\.)?bias$", "it is a bias on a LoRA factor"),
    (r"\.bias$", "it is a trained bias of the base"),
    (r"lm_head\.base_layer", "its lm_head is the output head, which is not served, tied or not"),
    (r"embed|lm_head|base_layer", "it is a weight of the base, and not known to equal the base's own"),
)


class StackShape(NamedTuple):
    """What one stack of factors will measure, known from a file's header; `dtype` is the file's."""

    modules: int
    rank: int
    shape: tuple[int, int]
    dtype: torch.dtype

    def tensor_bytes(self, dtype: torch.dtype | None) -> tuple[int, int]:
        """Bytes of its two tensors, A and B, in their own type or another."""
        out_features, in_features = self.shape
        rows = self.modules * self.rank * (dtype or self.dtype).itemsize
        return rows * in_features, rows * out_features


class _Factors(NamedTuple):
    """Keys of the two factors of a module, what they measure, and their type: float32 where they differ."""

    a_key: str
    b_key: str
    rank: int
    shape: tuple[int, int]
    dtype: torch.dtype


_Groups = dict[tuple[int, tuple[int, int]], dict[str, _Factors]]


def read_stacks(
    path: Path, settings: LoraSettings, base: BaseShapes, dtype: torch.dtype | None
) -> tuple[FactorStack, ...]:
    """Read every factor of a tensor file into one stack per (shape, rank); nothing may be left over.

    Args:
        path: the safetensors file.
        settings: its config.
        base: the model it must fit.
        dtype: convert to it; None keeps the type of the file, float32 where the file mixes types.

    Raises:
        AdapterFormatError: not a safetensors file, at odds with the config, NaN, infinity, or no effect.
        UnsupportedAdapterError: a tensor that is not a LoRA factor of a linear module.
        BaseMismatchError: modules or shapes that the base does not have.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stacks = _TensorFile(path, file, settings, base).stacks(dtype)
    except (SafetensorError, OSError) as error:
        raise AdapterFormatError(f"{path}: not a readable safetensors file: {error}") from error
    _refuse_no_effect(stacks, path)
    return stacks


def read_shapes(path: Path, settings: LoraSettings, base: BaseShapes) -> tuple[StackShape, ...]:
    """The shapes of the stacks that `read_stacks` would read, from the header alone.

    Raises:
        AdapterFormatError, UnsupportedAdapterError, BaseMismatchError: as `read_stacks` does for names,
            shapes and types.
    """
    try:
        with safe_open(path, framework="pt") as file:
            read = _TensorFile(path, file, settings, base)
            groups = read.groups()
            dtype = read.dtype(groups)
    except (SafetensorError, OSError) as error:
        raise AdapterFormatError(f"{path}: not a readable safetensors file: {error}") from error
    return tuple(StackShape(len(members), rank, shape, dtype) for (rank, shape), members in groups.items())


@dataclass(frozen=True)
class _TensorFile:
    path: Path
    file: Any
    settings: LoraSettings
    base: BaseShapes

    def stacks(self, dtype: torch.dtype | None) -> tuple[FactorStack, ...]:
        groups = self.groups()
        dtype = dtype or self.dtype(groups)
        payload = Payload.read(self.path, dtype)
        return tuple(self._stack(members, dtype, payload) for members in groups.values())

    def dtype(self, groups: _Groups) -> torch.dtype:
        """Of the factors; float32 where there are several."""
        return _shared(item.dtype for members in groups.values() for item in members.values())

    def groups(self) -> _Groups:
        """(rank, shape) -> module -> its factors; each group becomes one stack."""
        groups: _Groups = {}
        for module, keys in sorted(self._keys().items()):
            item = self._factors(module, keys)
            groups.setdefault((item.rank, item.shape), {})[module] = item
        return groups

    def _keys(self) -> dict[str, dict[str, str]]:
        """Module -> side ("A" or "B") -> key, for modules that file, config and base agree on."""
        keys: dict[str, dict[str, str]] = {}
        adapters: set[str] = set()
        for key in self.file.keys():  # noqa: SIM118 - a file, not a dict
            match = _KEY.fullmatch(key)
            if match is None:
                if self._is_of_base(key):
                    continue
                raise self._foreign(key)
            sides = keys.setdefault(match["module"], {})
            if match["side"] in sides:
                raise AdapterFormatError(f"{self.path}: both {sides[match['side']]} and {key} are given")
            sides[match["side"]] = key
            adapters.add(match["adapter"] or "without a name")
        if len(adapters) > 1:
            raise AdapterFormatError(
                f"{self.path}: tensors of several adapters in one file: {_some(adapters)}"
            )
        self._check_modules(keys)
        return keys

    def _check_modules(self, found: Iterable[str]) -> None:
        modules, base = set(found), self.base
        strangers = modules - set(base.modules)
        if heads := [module for module in strangers if module.rpartition(".")[2] == "lm_head"]:
            raise UnsupportedAdapterError(
                f"{self.path}: {_some(heads)} is the output head, which is not served, tied or not"
            )
        if strangers == modules:
            raise BaseMismatchError(
                f"{self.path}: no module of base {base.id!r} matches; found {_some(strangers)}"
            )
        if strangers:
            raise BaseMismatchError(f"{self.path}: base {base.id!r} has no linear module {_some(strangers)}")
        untargeted = [module for module in modules if self.settings.targets(module) is False]
        if untargeted:
            raise AdapterFormatError(
                f"{self.path}: tensors that its config does not target: {_some(untargeted)}"
            )
        absent = [
            module for module in base.modules if self.settings.targets(module) and module not in modules
        ]
        if absent:
            raise AdapterFormatError(
                f"{self.path}: targeted by its config but without tensors: {_some(absent)}"
            )

    def _factors(self, module: str, keys: Mapping[str, str]) -> _Factors:
        for side in "AB":
            if side not in keys:
                raise AdapterFormatError(f"{self.path}: {module} has no lora_{side}")
        dtype = _shared(self._dtype(keys[side]) for side in "AB")
        rank, (out_features, in_features) = self.settings.rank(module), self.base.modules[module]
        self._check_shape(keys["A"], (rank, in_features), rank_axis=0)
        self._check_shape(keys["B"], (out_features, rank), rank_axis=1)
        return _Factors(keys["A"], keys["B"], rank, (out_features, in_features), dtype)

    def _check_shape(self, key: str, wanted: tuple[int, int], *, rank_axis: int) -> None:
        found = tuple(self.file.get_slice(key).get_shape())
        if found == wanted:
            return
        if len(found) == 2 and found[1 - rank_axis] == wanted[1 - rank_axis]:
            raise AdapterFormatError(
                f"{self.path}: {key} has rank {found[rank_axis]}, but its config says {wanted[rank_axis]}"
            )
        raise BaseMismatchError(
            f"{self.path}: {key} has shape {list(found)}, but base {self.base.id!r} needs {list(wanted)}"
        )

    def _dtype(self, key: str) -> torch.dtype:
        kind = self.file.get_slice(key).get_dtype()
        if kind not in DTYPES:
            raise AdapterFormatError(f"{self.path}: {key} is {kind}; only {', '.join(DTYPES)} are read")
        return DTYPES[kind]

    def _stack(
        self, members: Mapping[str, _Factors], dtype: torch.dtype, payload: Payload | None
    ) -> FactorStack:
        rank, (out_features, in_features) = next(iter(members.values()))[2:4]
        a = torch.empty(len(members), rank, in_features, dtype=dtype)
        bt = torch.empty(len(members), rank, out_features, dtype=dtype)
        if payload is not None:
            payload.fill([item.a_key for item in members.values()], a)
            payload.fill([item.b_key for item in members.values()], bt.transpose(1, 2))
        else:
            for row, item in enumerate(members.values()):
                a[row].copy_(self.file.get_tensor(item.a_key))
                bt[row].T.copy_(self.file.get_tensor(item.b_key))
        if not (torch.isfinite(a).all() and torch.isfinite(bt).all()):
            raise self._not_finite(members, dtype)
        return FactorStack(tuple(members), a, bt, tuple(self.settings.scale(module) for module in members))

    def _not_finite(self, members: Mapping[str, _Factors], dtype: torch.dtype) -> AdapterFormatError:
        """The error that names the first tensor with such a number."""
        for key in (key for item in members.values() for key in (item.a_key, item.b_key)):
            source: Tensor = self.file.get_tensor(key)
            if not torch.isfinite(source.to(dtype)).all():
                break
        narrowed = f" after conversion to {dtype}" if torch.isfinite(source).all() else ""
        return AdapterFormatError(f"{self.path}: {key} holds NaN or infinity{narrowed}")

    def _is_of_base(self, key: str) -> bool:
        """Whether it is an embedding that was saved along and that training has not changed.

        PEFT saves them with `save_embedding_layers`, which is also what it chooses for some vocabularies.
        """
        name = key.removeprefix("base_model.model.")
        weights = self.base.weights
        return name != key and weights is not None and weights.equal(name, self.file.get_slice(key))

    def _foreign(self, key: str) -> UnsupportedAdapterError:
        reason = next((why for pattern, why in _FOREIGN if re.search(pattern, key)), "it is no LoRA factor")
        return UnsupportedAdapterError(f"{self.path}: tensor {key} is not served: {reason}")


def _refuse_no_effect(stacks: Iterable[FactorStack], path: Path) -> None:
    """Refuse an adapter that changes nothing: an untrained one, or one saved with its weights lost."""
    for stack in stacks:
        alive = stack.a.any(dim=2).any(dim=1) & stack.bt.any(dim=2).any(dim=1)
        if any(works and scale != 0.0 for scale, works in zip(stack.scales, alive.tolist(), strict=True)):
            return
    raise AdapterFormatError(
        f"{path}: delta W is zero in every module (A, B or alpha is zero): an untrained adapter, or one "
        "whose weights were lost when it was saved"
    )


def _shared(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The type, or float32 where there are several."""
    found = set(dtypes)
    return found.pop() if len(found) == 1 else torch.float32


def _some(names: Iterable[str], limit: int = 5) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return (", ".join(ordered[:limit]) or "nothing") + more
