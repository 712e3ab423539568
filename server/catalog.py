"""The names that `model` may have, and what each stands for."""

import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Protocol

from loramux.adapters.lora import LoraAdapter
from loramux.adapters.sparse.shelf import SparseCard
from loramux.router.decision import Decision
from loramux.server.errors import RequestError, StartError, UnknownModel
from loramux.server.pool.facts import ExpertFacts
from loramux.server.wire.experts import expert_card
from loramux.server.wire.models import model_card

AUTO = "auto"


class Kind(StrEnum):
    """How a request of that model gets its blend."""

    AUTO = "auto"
    BASE = "base"
    EXPERT = "expert"
    SPARSE = "sparse"


class Source(StrEnum):
    """Where an expert's route comes from: the pool's fit, or the example texts of its load."""

    POOL = "pool"
    EXAMPLES = "examples"


class Routes(Protocol):
    """What is read of the router: the ids that its decisions have now."""

    @property
    def experts(self) -> Sequence[str]: ...


class Catalog:
    """`auto`, the base, the experts and the sparse models; the latter two come and go, so their mappings are
    looked up live, and so is what the router knows.

    The router's id of an expert of the pool is its name there; of one that joined since, its content hash.
    """

    def __init__(
        self,
        base: str,
        experts: Mapping[str, LoraAdapter],
        max_context: int,
        routes: Routes,
        sparse: Mapping[str, SparseCard] = MappingProxyType({}),
        facts: Mapping[str, ExpertFacts] = MappingProxyType({}),
        refused: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`experts` are, at this moment, those that the router was fitted for and that `facts` are about;
        `refused` says of names that are not served why that is so."""
        self.base = base
        self._routes = routes
        self._pool = {name: expert.content_hash for name, expert in experts.items()}
        self._facts = {self._pool[name]: fact for name, fact in facts.items() if name in self._pool}
        self._refused = refused
        self.experts = experts
        self.sparse = sparse
        self._max_context = max_context
        self._created = int(time.time())
        self._routable: tuple[object, dict[str, str]] | None = None
        self._whole: tuple[object, bool] | None = None
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
            RequestError: nothing that is served here, with the reason.
        """
        if model == AUTO:
            return Kind.AUTO
        if model == self.base:
            return Kind.BASE
        if model in self.experts:
            return Kind.EXPERT
        if model in self.sparse:
            return Kind.SPARSE
        if model in self._refused:
            raise RequestError(f"{model!r}: {self._refused[model]}", param="model", code="model_refused")
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
        none of its traffic, and content that comes back gets its route back. Of several names for one content
        the pool's own has it, else the one that was loaded first. Looked up anew only when experts or routes
        have changed: every request asks.
        """
        state = (tuple(self._routes.experts), tuple(self.experts.values()))
        if self._routable is None or self._routable[0] != state:
            self._routable = state, self._find_routable()
        return self._routable[1]

    def among(self, decision: Decision) -> Decision:
        """The decision of the experts that are served, under the names they are served by."""
        served = self.routable()
        if self._whole is None or self._whole[0] is not served:
            whole = all(served.get(id) == id for id in self._routes.experts)
            self._whole = served, whole
        # A decision may be older than what the router knows now: its own names count.
        return decision if self._whole[1] and decision.is_of(self._routes.experts) else decision.among(served)

    def _find_routable(self) -> dict[str, str]:
        by_content: dict[str, str] = {}
        for name, expert in self.experts.items():
            by_content.setdefault(expert.content_hash, name)
        found: dict[str, str] = {}
        for id in self._routes.experts:
            content, own = self._content(id), self.experts.get(id)
            served = id if own is not None and own.content_hash == content else by_content.get(content)
            if served is not None:
                found[id] = served
        return found

    def routed(self) -> dict[str, Source]:
        """The names that can be routed to now, and where each has its route from."""
        return {
            name: Source.POOL if id in self._pool else Source.EXAMPLES for id, name in self.routable().items()
        }

    def is_known(self, content: str) -> bool:
        """Whether the router has a route for that content, served or not."""
        return any(self._content(id) == content for id in self._routes.experts)

    def has_joined(self, content: str) -> bool:
        """Whether that content has its route from example texts."""
        return content in self._routes.experts and content not in self._pool

    def names(self) -> list[str]:
        """Every name, in the order of `/v1/models`."""
        return [AUTO, self.base, *sorted(self.experts), *sorted(self.sparse)]

    def is_taken(self, name: str) -> bool:
        """Whether something is called that."""
        return name in (AUTO, self.base) or name in self.experts or name in self.sparse

    def cards(self) -> list[dict[str, Any]]:
        """The `/v1/models` entries."""
        routed = self.routed()
        return [self._card(name, routed) for name in self.names()]

    def expert_cards(self) -> list[dict[str, Any]]:
        """The `/v1/experts` entries; facts belong to content, like routes."""
        routed, unknown = self.routed(), ExpertFacts()
        return [
            expert_card(name, self._facts.get(expert.content_hash, unknown), route_fields(routed.get(name)))
            for name, expert in sorted(self.experts.items())
        ]

    def card(self, model: str) -> dict[str, Any]:
        """The `/v1/models` entry.

        Raises:
            UnknownModel: nothing here.
        """
        return self._card(model, self.routed())

    def _content(self, id: str) -> str:
        """What the router means by an id."""
        return self._pool.get(id, id)

    def _card(self, model: str, routed: Mapping[str, Source]) -> dict[str, Any]:
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
        elif kind is Kind.EXPERT:
            about = route_fields(routed.get(model))
        return model_card(
            model,
            self._created,
            root=root,
            parent=parent,
            context=self._max_context,
            about=about,
        )


def route_fields(source: Source | None) -> dict[str, Any]:
    """What answers say of an expert's route; one without is served by name, in `lora` and by
    strategies that ask the experts."""
    return {"routable": False} if source is None else {"routable": True, "route_from": source}
