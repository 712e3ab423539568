"""The tensors of a sparse model's file, held against what its config and the base promise."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import AdapterError, AdapterFormatError, BaseMismatchError

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_FROM_CONFIG = {"rank", "experts", "experts × rank"}


@dataclass(frozen=True)
class Wanted:
    """One tensor that must be there.

    Attributes:
        shape: what it must measure.
        axes: what each axis is; `rank`, `experts` and `experts × rank` come from the config, others from the
            base.
        router: it is kept in float32.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    router: bool = False

    @classmethod
    def a(cls, rank: int, in_features: int) -> Wanted:
        return cls((rank, in_features), ("rank", "in"))

    @classmethod
    def b(cls, out_features: int, rank: int) -> Wanted:
        return cls((out_features, rank), ("out", "rank"))

    @classmethod
    def gate(cls, experts: int, in_features: int) -> Wanted:
        return cls((experts, in_features), ("experts", "in"), router=True)

    @property
    def elements(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total


@dataclass(frozen=True)
class Naming:
    """How the keys of a file map to the names used here, and back.

    Attributes:
        name: key -> name; None for a key that is nobody's.
        key: name -> key.
    """

    name: Callable[[str], str | None]
    key: Callable[[str], str]


AS_IS = Naming(name=lambda key: key, key=lambda name: name)


class TensorFile:
    """An open safetensors file whose tensors are known by name.

    Args:
        path: for messages.
        file: the open file.
        naming: of its keys.
        stranger: the error for a key without a name.

    Raises:
        AdapterError: a key without a name, or two keys with the same.
    """

    def __init__(
        self, path: Path, file: Any, naming: Naming, stranger: Callable[[str], AdapterError]
    ) -> None:
        self.path = path
        self._file = file
        self._naming = naming
        self._stranger = stranger
        self._keys: dict[str, str] = {}
        self._dtype = torch.float32
        for key in file.keys():  # noqa: SIM118 - a file, not a dict
            name = naming.name(key)
            if name is None:
                raise stranger(key)
            if name in self._keys:
                raise AdapterFormatError(f"{path}: both {self._keys[name]} and {key} are given")
            self._keys[name] = key

    def check(self, wanted: Mapping[str, Wanted], base: BaseShapes, dtype: torch.dtype | None) -> None:
        """Compare names, types and shapes; then tensors can be read.

        Args:
            dtype: of the factors that will be read; None keeps the type of the file, float32 where it mixes
                types.

        Raises:
            AdapterFormatError: missing or superfluous tensors, a type that is not read, or a shape that is at
                odds with the config.
            BaseMismatchError: a shape that the base does not have.
        """
        for name, want in wanted.items():
            if want.router and name in self._keys:
                self._check_shape(name, want, base)
        for name, key in self._keys.items():
            if name not in wanted:
                raise self._stranger(key)
        absent = [self._naming.key(name) for name in wanted if name not in self._keys]
        if absent:
            raise AdapterFormatError(
                f"{self.path}: targeted by its config but without tensors: {some(absent)}"
            )
        found = set()
        for name, want in wanted.items():
            self._check_shape(name, want, base)
            kind = self._type(name)
            if not want.router:
                found.add(kind)
        self._dtype = dtype or (found.pop() if len(found) == 1 else torch.float32)

    def router(self, name: str) -> Tensor:
        """One tensor in float32.

        Raises:
            AdapterFormatError: NaN or infinity.
        """
        out = torch.empty(self._shape(name), dtype=torch.float32)
        self._copy(name, out)
        return out

    def factor(self, name: str) -> Tensor:
        """One tensor in the type of the factors.

        Raises:
            AdapterFormatError: NaN or infinity, in the file or after conversion.
        """
        return self.factors([name])[0]

    def factors(self, names: Sequence[str]) -> Tensor:
        """Tensors of one shape, stacked: `[names, *shape]`.

        Raises:
            AdapterFormatError: NaN or infinity, in the file or after conversion.
        """
        out = torch.empty(len(names), *self._shape(names[0]), dtype=self._dtype)
        for row, name in enumerate(names):
            self._copy(name, out[row])
        return out

    def digest(self, meaning: Mapping[str, object]) -> str:
        """SHA-256 over every tensor by name and over `meaning`, whatever the order and keys of the file."""
        digest = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode())
        for name in sorted(self._keys):
            tensor: Tensor = self._file.get_tensor(self._keys[name]).contiguous()
            digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.view(torch.uint8).numpy().data)
        return f"sha256:{digest.hexdigest()}"

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(self._keys[name]).get_shape())

    def _type(self, name: str) -> torch.dtype:
        kind = self._file.get_slice(self._keys[name]).get_dtype()
        if kind not in _DTYPES:
            raise AdapterFormatError(
                f"{self.path}: {self._keys[name]} is {kind}; only {', '.join(_DTYPES)} are read"
            )
        return _DTYPES[kind]

    def _copy(self, name: str, out: Tensor) -> None:
        source: Tensor = self._file.get_tensor(self._keys[name])
        out.copy_(source)
        # NaN and infinity survive a sum, which costs a quarter of looking at every number. A sum of huge
        # finite numbers may overflow, so only a closer look can refuse.
        if not out.sum(dtype=torch.float32).isfinite() and not out.isfinite().all():
            narrowed = f" after conversion to {out.dtype}" if torch.isfinite(source).all() else ""
            raise AdapterFormatError(f"{self.path}: {self._keys[name]} holds NaN or infinity{narrowed}")

    def _check_shape(self, name: str, want: Wanted, base: BaseShapes) -> None:
        found, key = self._shape(name), self._keys[name]
        if found == want.shape:
            return
        off = [axis for axis, is_, was in zip(want.axes, found, want.shape, strict=False) if is_ != was]
        if len(found) == len(want.shape) and len(off) == 1 and off[0] in _FROM_CONFIG:
            axis = want.axes.index(off[0])
            raise AdapterFormatError(
                f"{self.path}: {key} has {found[axis]} rows or columns for {off[0]}, but its config says "
                f"{want.shape[axis]}"
            )
        if found == want.shape[::-1]:
            raise AdapterFormatError(
                f"{self.path}: {key} is transposed: it has shape {list(found)} instead of {list(want.shape)}"
            )
        raise BaseMismatchError(
            f"{self.path}: {key} has shape {list(found)}, but base {base.id!r} and its config need "
            f"{list(want.shape)} ({' by '.join(want.axes)})"
        )


def some(names: Iterable[str], limit: int = 5) -> str:
    """Names for a message: the first few, and how many more."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more
