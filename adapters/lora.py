"""One LoRA adapter in memory: factors stored as stacks over modules, seen as one pair per module.

Modules of equal shape and rank share one tensor `[modules, rank, features]` for A and one for B
transposed. A merge then is a few operations on whole stacks instead of a few per module, and a rank block
of any module is one contiguous run of memory on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from loramux.adapters.errors import AdapterFormatError


class LoraPair(NamedTuple):
    """The factors of one module: delta W = scale * b @ a.

    Attributes:
        a: `[rank, in_features]`.
        b: `[out_features, rank]`; may be a transposed view.
        scale: alpha / rank, or alpha / sqrt(rank) for rsLoRA, with any blend weight folded in.
    """

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, eq=False)
class FactorStack:
    """The factors of all modules that share (in_features, out_features, rank).

    Attributes:
        modules: module paths, sorted; row i of the tensors belongs to `modules[i]`.
        a: `[modules, rank, in_features]`.
        bt: `[modules, rank, out_features]`, B transposed.
        scales: one per module.
    """

    modules: tuple[str, ...]
    a: Tensor
    bt: Tensor
    scales: tuple[float, ...]

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.bt.shape[2], self.a.shape[2]

    @cached_property
    def rows(self) -> Mapping[str, int]:
        """Module path -> row."""
        return {module: row for row, module in enumerate(self.modules)}

    @classmethod
    def from_pairs(cls, pairs: Mapping[str, LoraPair]) -> FactorStack:
        """Copy pairs of one shape, rank, dtype and device into one stack."""
        modules = tuple(sorted(pairs))
        return cls(
            modules=modules,
            a=torch.stack([pairs[module].a for module in modules]),
            bt=torch.stack([pairs[module].b.T for module in modules]),
            scales=tuple(float(pairs[module].scale) for module in modules),
        )

    def pinned(self) -> FactorStack:
        """A copy in page-locked memory, from which a GPU can copy while it computes."""
        return replace(self, a=self.a.pin_memory(), bt=self.bt.pin_memory())


class _StackedPairs(Mapping[str, LoraPair]):
    """Pairs as views on stacks, made when asked for: a merge should not pay for views nobody reads."""

    def __init__(self, stacks: Iterable[FactorStack]) -> None:
        self._places = {module: (stack, row) for stack in stacks for row, module in enumerate(stack.modules)}

    def __getitem__(self, module: str) -> LoraPair:
        stack, row = self._places[module]
        return LoraPair(stack.a[row], stack.bt[row].T, stack.scales[row])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """One LoRA adapter, read from disk or made by a merge.

    Attributes:
        id: the name it goes by; not part of its identity.
        content_hash: hex SHA-256 of what it computes; two adapters with equal hashes are the same adapter.
        pairs: module path -> factors.
        config: the fields of its config that a person may want to see, JSON types only.

    Raises:
        AdapterFormatError: a pair is not a LoRA pair (dimensions, rank or dtype do not fit).
    """

    id: str
    content_hash: str
    pairs: Mapping[str, LoraPair]
    config: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.pairs, _StackedPairs):
            return
        for module, pair in self.pairs.items():
            if pair.a.ndim != 2 or pair.b.ndim != 2 or pair.a.shape[0] != pair.b.shape[1]:
                raise AdapterFormatError(
                    f"adapter {self.id!r}, {module}: A {tuple(pair.a.shape)} and B {tuple(pair.b.shape)} "
                    "are not [rank, in] and [out, rank]"
                )
            if pair.a.dtype != pair.b.dtype:
                raise AdapterFormatError(
                    f"adapter {self.id!r}, {module}: A is {pair.a.dtype} but B is {pair.b.dtype}"
                )

    @classmethod
    def from_stacks(
        cls,
        id: str,
        content_hash: str,
        stacks: Iterable[FactorStack],
        config: Mapping[str, object] | None = None,
    ) -> LoraAdapter:
        """Wrap stacks without copying; `pairs` are views on them."""
        kept = tuple(stacks)
        adapter = cls(id, content_hash, _StackedPairs(kept), dict(config or {}))
        adapter.__dict__["stacks"] = kept
        return adapter

    @cached_property
    def stacks(self) -> tuple[FactorStack, ...]:
        """All factors, grouped by (out_features, in_features, rank, dtype); copied once if given as pairs."""
        groups: dict[tuple[int, int, int, torch.dtype], dict[str, LoraPair]] = {}
        for module, pair in self.pairs.items():
            key = (pair.b.shape[0], pair.a.shape[1], pair.rank, pair.a.dtype)
            groups.setdefault(key, {})[module] = pair
        return tuple(FactorStack.from_pairs(pairs) for pairs in groups.values())

    def to(self, dtype: torch.dtype) -> LoraAdapter:
        """The same adapter with factors in another type, or itself where they have it already."""
        if all(stack.a.dtype == dtype for stack in self.stacks):
            return self
        stacks = [replace(stack, a=stack.a.to(dtype), bt=stack.bt.to(dtype)) for stack in self.stacks]
        return LoraAdapter.from_stacks(self.id, self.content_hash, stacks, self.config)

    def pinned(self) -> LoraAdapter:
        """The same adapter in page-locked host memory; needs CUDA."""
        stacks = [stack.pinned() for stack in self.stacks]
        return LoraAdapter.from_stacks(self.id, self.content_hash, stacks, self.config)

    @property
    def ranks(self) -> dict[str, int]:
        """Module path -> rank."""
        return {module: stack.rank for stack in self.stacks for module in stack.modules}

    @cached_property
    def max_rank(self) -> int:
        """Largest rank of any module; 0 for an adapter without modules."""
        return max((stack.rank for stack in self.stacks), default=0)

    @cached_property
    def nbytes(self) -> int:
        """Bytes held by all factors."""
        return sum(stack.a.nbytes + stack.bt.nbytes for stack in self.stacks)

    @property
    def dtype(self) -> torch.dtype:
        """The type that holds every factor without loss; float32 for an adapter without modules."""
        found = [stack.a.dtype for stack in self.stacks]
        return reduce(torch.promote_types, found) if found else torch.float32

    def delta(self, module: str, dtype: torch.dtype = torch.float64) -> Tensor:
        """The dense update `scale * B @ A`, `[out_features, in_features]`: a reference, not for serving.

        Raises:
            KeyError: the adapter does not touch the module.
        """
        pair = self.pairs[module]
        return pair.scale * (pair.b.to(dtype) @ pair.a.to(dtype))
