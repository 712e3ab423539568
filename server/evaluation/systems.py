"""What is compared: the base, every expert, the mixtures of each strategy and width, sparse models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loramux.adapters.sparse.token_mixtures import TokenMethod
from loramux.router.decision import STRATEGIES
from loramux.server.ask import Ask, Prompt
from loramux.server.catalog import AUTO, Catalog
from loramux.server.engine.protocol import Sampling
from loramux.server.errors import StartError
from loramux.server.wire.generation import LOGO, RoutingFields

SystemKind = Literal["base", "expert", "routed", "asking", "sparse"]
BASE = "base"
GROUPS = ("base", "experts", "routed", "asking", "sparse")
#: What asks the experts themselves, in the base.
ASKING = (*TokenMethod, LOGO)


@dataclass(frozen=True, slots=True)
class System:
    """One column of an evaluation: the model that is asked, and how `auto` routes then.

    What is `routed` reads the text alone, what is `asking` asks the experts.
    """

    name: str
    kind: SystemKind
    model: str
    strategy: str | None = None
    top_m: int | None = None

    @property
    def mixes(self) -> bool:
        """Whether it chooses among experts, so that a share of the best ones' gain says how well."""
        return self.kind in ("routed", "asking", "sparse")

    def ask(self, text: str, prompt: tuple[int, ...]) -> Ask:
        """The request whose selection answers this system's item: what it is routed by, and the tokens that
        experts are asked about."""
        routing = None
        if self.strategy is not None:
            routing = RoutingFields.model_construct(strategy=self.strategy, top_m=self.top_m)
        return Ask(self.model, (Prompt(text, prompt, 0),), text, Sampling(max_tokens=0), routing=routing)


def systems_of(
    catalog: Catalog, top_m: Sequence[int], only: Sequence[str] = (), *, inside: bool = True
) -> list[System]:
    """The systems that a pool offers, in the order of the report.

    `only` leaves those named: a group (of `GROUPS`) or one system's name. `inside`: whether experts can be
    asked in the base, which no backend allows.

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
    if inside:
        found += [
            System(f"{strategy} top {width}", "asking", AUTO, strategy, width)
            for strategy in ASKING
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
