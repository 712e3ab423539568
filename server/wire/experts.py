"""`GET /v1/experts`, and the map of the experts in it and in `POST /v1/route`."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol


class Measured(Protocol):
    """The line of a report; losses are nats per answer token."""

    @property
    def held_out_rows(self) -> int | None: ...
    @property
    def base_loss(self) -> float | None: ...
    @property
    def expert_loss(self) -> float | None: ...
    @property
    def gain(self) -> float | None: ...
    @property
    def routed(self) -> float | None: ...


class Facts(Protocol):
    """What a pool says about an expert."""

    @property
    def description(self) -> str: ...
    @property
    def top_terms(self) -> tuple[str, ...]: ...
    @property
    def examples(self) -> tuple[str, ...]: ...
    @property
    def rows(self) -> int: ...
    @property
    def measured(self) -> Measured: ...


def expert_card(name: str, facts: Facts, route: Mapping[str, object]) -> dict[str, Any]:
    """One expert: the pool's words and measurements, and whether `auto` can choose it."""
    return {
        "id": name,
        "description": facts.description,
        "top_terms": list(facts.top_terms),
        "examples": list(facts.examples),
        "rows": facts.rows,
        "held_out_rows": facts.measured.held_out_rows,
        "base_loss": facts.measured.base_loss,
        "expert_loss": facts.measured.expert_loss,
        "gain": facts.measured.gain,
        "routed": facts.measured.routed,
        **route,
    }


def expert_list(base: str, cards: Iterable[dict[str, Any]], chart: Mapping[str, object]) -> dict[str, Any]:
    """The list object, with the map of those that can be routed to."""
    return {"object": "list", "base": base, "data": list(cards), "map": dict(chart)}


def map_body(
    positions: Mapping[str, tuple[float, float]],
    explained: Iterable[float],
    prompt: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Positions by id, the share of variance that each axis shows, and where the prompt lies."""
    body: dict[str, Any] = {
        "explained": list(explained),
        "experts": [{"id": id, "x": x, "y": y} for id, (x, y) in positions.items()],
    }
    return body if prompt is None else {**body, "prompt": {"x": prompt[0], "y": prompt[1]}}
