"""A reader's plan, made of a config before a tensor is read: which there must be, and what they become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from loramux.adapters.errors import AdapterError
from loramux.adapters.lora import LoraPair
from loramux.adapters.sparse.model import ExpertMixture, Kind, MixtureFfn, RankMixture
from loramux.adapters.sparse.tensor_file import AS_IS, Naming, TensorFile, Wanted


class Parts(NamedTuple):
    """The contents of a sparse model; see `SparseModel`."""

    plain: Mapping[str, LoraPair]
    linear: Mapping[str, RankMixture | ExpertMixture]
    ffn: Mapping[str, MixtureFfn]


@dataclass(frozen=True)
class Blueprint:
    """A reader's plan for one file.

    Attributes:
        wanted: name -> what the tensor must be.
        stranger: the error for a key that is not wanted.
        build: reads the tensors of a checked file.
        meaning: what else decides what the model says, JSON types; part of its content hash.
        summary: see `SparseModel`.
        naming: of the file's keys.
    """

    kind: Kind
    wanted: Mapping[str, Wanted]
    stranger: Callable[[str], AdapterError]
    build: Callable[[TensorFile], Parts]
    meaning: Mapping[str, object]
    summary: Mapping[str, object] = field(default_factory=dict)
    naming: Naming = AS_IS

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(want.elements for want in self.wanted.values())

    @property
    def router_parameters(self) -> int:
        """Numbers in routers, which stay in float32."""
        return sum(want.elements for want in self.wanted.values() if want.router)
