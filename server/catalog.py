"""The names that `model` may have, and what each stands for."""

import time
from collections.abc import Mapping, Set
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from loramux.adapters.lora import LoraAdapter
from loramux.adapters.sparse.shelf import SparseCard
from loramux.server.errors import StartError, UnknownModel
from loramux.server.wire.models import model_card

AUTO = "auto"


class Kind(StrEnum):
    """How a request of that model gets its blend."""

    AUTO = "auto"
    BASE = "base"
    EXPERT = "expert"
    SPARSE = "sparse"


class Catalog:
    """`auto`, the base, the experts and the sparse models; the latter two come and go, so their mappings are
    looked up live."""

    def __init__(
        self,
        base: str,
        experts: Mapping[str, LoraAdapter],
        max_context: int,
        sparse: Mapping[str, SparseCard] = MappingProxyType({}),
    ) -> None:
        """`experts` are those that the router was fitted for; whoever comes later must have their content."""
        self.base = base
        self._routes = {name: expert.content_hash for name, expert in experts.items()}
        self.experts = experts
        self.sparse = sparse
        self._max_context = max_context
        self._created = int(time.time())
        for kind, names, taken in (
            ("an expert", experts, {AUTO, base}),
            ("a sparse model", sparse, {AUTO, base, *experts}),
        ):
            for name in sorted(taken.intersection(names)):
                raise StartError(
                    f"the pool has {kind} called {name!r}, which is the name of something else; rename it"
                )
        if base == AUTO:
            raise StartError(f"the base may not be called {AUTO!r}; give it another id in pool.json")

    def resolve(self, model: str) -> Kind:
        """What `model` is.

        Raises:
            UnknownModel: nothing here.
        """
        if model == AUTO:
            return Kind.AUTO
        if model == self.base:
            return Kind.BASE
        if model in self.experts:
            return Kind.EXPERT
        if model in self.sparse:
            return Kind.SPARSE
        raise UnknownModel(model, known=tuple(self.names()))

    def expert(self, name: str, *, param: str = "lora") -> LoraAdapter:
        """The expert of that id.

        Raises:
            UnknownModel: no such expert.
        """
        found = self.experts.get(name)
        if found is None:
            raise UnknownModel(name, param=param, known=tuple(sorted(self.experts)))
        return found

    def routable(self) -> dict[str, str]:
        """Which experts can be routed to now: the router's id -> the id that serves the same content.

        A centroid belongs to content, not to a name: what was loaded under the name of another expert gets
        none of its traffic, and content that comes back gets its route back.
        """
        by_content = {expert.content_hash: name for name, expert in sorted(self.experts.items())}
        found: dict[str, str] = {}
        for name, content in self._routes.items():
            own = self.experts.get(name)
            served = name if own is not None and own.content_hash == content else by_content.get(content)
            if served is not None:
                found[name] = served
        return found

    def names(self) -> list[str]:
        """Every name, in the order of `/v1/models`."""
        return [AUTO, self.base, *sorted(self.experts), *sorted(self.sparse)]

    def is_taken(self, name: str) -> bool:
        """Whether something is called that."""
        return name in (AUTO, self.base) or name in self.experts or name in self.sparse

    def cards(self) -> list[dict[str, Any]]:
        """The `/v1/models` entries."""
        routed = set(self.routable().values())
        return [self._card(name, routed) for name in self.names()]

    def card(self, model: str) -> dict[str, Any]:
        """The `/v1/models` entry.

        Raises:
            UnknownModel: nothing here.
        """
        return self._card(model, set(self.routable().values()))

    def _card(self, model: str, routed: Set[str]) -> dict[str, Any]:
        kind = self.resolve(model)
        root, parent = {
            Kind.AUTO: (self.base, self.base),
            Kind.BASE: (self.base, None),
            Kind.EXPERT: (model, self.base),
            Kind.SPARSE: (model, self.base),
        }[kind]
        about: dict[str, Any] | None = None
        if kind is Kind.SPARSE:
            about = {"kind": self.sparse[model].kind, **self.sparse[model].summary}
        elif kind is Kind.EXPERT and model not in routed:
            about = {"routable": False}
        return model_card(
            model,
            self._created,
            root=root,
            parent=parent,
            context=self._max_context,
            about=about,
        )
