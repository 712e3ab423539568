"""What is compared: the base, every expert, the routed blends of each strategy and width, sparse models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loramux.router.decision import STRATEGIES, Strategy
from loramux.server.ask import Ask
from loramux.server.catalog import AUTO, Catalog
from loramux.server.engine.protocol import Sampling
from loramux.server.errors import StartError
from loramux.server.wire.generation import RoutingFields

SystemKind = Literal["base", "expert", "routed", "sparse"]
BASE = "base"
GROUPS = ("base", "experts", "routed", "sparse")


@dataclass(frozen=True, slots=True)
class System:
    """One column of an evaluation: the model that is asked, and how `auto` routes then."""

    name: str
    kind: SystemKind
    model: str
    strategy: Strategy | None = None
    top_m: int | None = None

    def ask(self, text: str) -> Ask:
        """The request whose selection answers this system's item; it has no prompt of its own."""
        routing = None
        if self.kind == "routed":
            routing = RoutingFields.model_construct(strategy=self.strategy, top_m=self.top_m)
        return Ask(self.model, (), text, Sampling(max_tokens=0), routing=routing)


def systems_of(catalog: Catalog, top_m: Sequence[int], only: Sequence[str] = ()) -> list[System]:
    """The systems that a pool offers, in the order of the report.

    `only` leaves those named: a group (`base`, `experts`, `routed`, `sparse`) or one system's name.

    Raises:
        StartError: a name in `only` is none of these.
    """
    widths = sorted({min(width, len(catalog.experts)) for width in top_m if catalog.experts})
    found = [System(BASE, "base", catalog.base)]
    found += [System(name, "expert", name) for name in sorted(catalog.experts)]
    found += [
        System(f"{strategy} top {width}", "routed", AUTO, strategy, width)
        for strategy in STRATEGIES
        for width in widths
    ]
    found += [System(name, "sparse", name) for name in sorted(catalog.sparse)]
    known = {*GROUPS, *(system.name for system in found)}
    if unknown := [name for name in only if name not in known]:
        raise StartError(f"--only {unknown[0]!r} is none of {', '.join(sorted(known))}")
    if not only:
        return found
    groups = {"expert": "experts"}
    return [one for one in found if one.name in only or groups.get(one.kind, one.kind) in only]
