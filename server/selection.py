"""Steps 2 and 3 of a request: which experts, how much of each, and the blend made of them."""

from dataclasses import dataclass, replace
from typing import Any, Protocol

from loramux.adapters.blend import Blend
from loramux.router.decision import Candidate, Decision, RoutingOptions
from loramux.server.ask import Ask
from loramux.server.catalog import Catalog, Kind
from loramux.server.metrics import Metrics
from loramux.server.settings import RoutingSettings
from loramux.server.wire.generation import RoutingFields

NAMED = "named"
GIVEN = "given"


@dataclass(frozen=True, slots=True)
class SelectedExpert:
    """One expert of a selection; the three numbers of the router are `None` when nothing was routed."""

    id: str
    weight: float
    similarity: float | None = None
    probability: float | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """What will answer.

    `strategy` is the router's, or `named` for a model by name, or `given` for a client's own mixture.
    """

    strategy: str
    experts: tuple[SelectedExpert, ...] = ()
    fallback: bool = False
    truncated: bool = False
    method: str = "exact"

    @property
    def ids(self) -> tuple[str, ...]:
        """The experts' ids."""
        return tuple(expert.id for expert in self.experts)

    def body(self) -> dict[str, Any]:
        """The `route` object of an answer."""
        return {
            "strategy": self.strategy,
            "experts": [_scored(expert) for expert in self.experts],
            "fallback": self.fallback,
            "truncated": self.truncated,
        }


class Router(Protocol):
    """What is asked of the router."""

    async def decide(self, text: str, options: RoutingOptions) -> Decision:
        """The decision about one routing text."""
        ...

    async def close(self) -> None:
        """Finish what is on its way and end."""
        ...


class Selector:
    """Chooses by name, by the client's own mixture, or through the router."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        router: Router,
        merge: str,
        weight_step: float,
        metrics: Metrics,
    ) -> None:
        self._catalog = catalog
        self._router = router
        self._merge = merge
        self._step = weight_step
        self._metrics = metrics

    async def select(self, ask: Ask) -> Selection:
        """Step 2.

        Raises:
            RouterError: impossible options, or the router failed.
        """
        kind = self._catalog.resolve(ask.model)
        if ask.lora is not None:
            chosen = [SelectedExpert(name, scale) for name, scale in ask.lora]
            return self._counted(Selection(GIVEN, self._on_grid(chosen)))
        if kind is Kind.BASE:
            return self._counted(Selection(NAMED))
        if kind is Kind.EXPERT:
            return self._counted(Selection(NAMED, (SelectedExpert(ask.model, 1.0),)))
        return await self._route(ask)

    def blend(self, selection: Selection) -> Blend:
        """Step 3: the canonical blend of a selection.

        Raises:
            BlendError: a weight or the merge method is not acceptable.
        """
        parts = [
            (expert.id, self._catalog.expert(expert.id).content_hash, expert.weight)
            for expert in selection.experts
        ]
        return Blend.of(parts, method=selection.method, grid=self._step)

    async def explain(self, text: str, asked: RoutingFields | None) -> dict[str, Any]:
        """The whole decision about a text, for `/v1/route`.

        Raises:
            RouterError: impossible options, or the router failed.
        """
        return explained(await self._router.decide(text, _options(asked)))

    async def _route(self, ask: Ask) -> Selection:
        decision = await self._router.decide(ask.routing_text, _options(ask.routing))
        served = [_selected(expert) for expert in decision.experts if expert.id in self._catalog.experts]
        asked = None if ask.routing is None else ask.routing.merge
        selection = Selection(
            decision.strategy,
            self._on_grid(_rescaled(served, sum(expert.weight for expert in decision.experts))),
            fallback=decision.fallback or not served,
            truncated=decision.truncated,
            method=asked or self._merge,
        )
        self._metrics.routed(
            "fallback" if selection.fallback else "routed",
            selection.ids,
            margin=decision.margin,
            entropy=decision.entropy,
            truncated=decision.truncated,
        )
        return selection

    def _counted(self, selection: Selection) -> Selection:
        self._metrics.routed(selection.strategy, selection.ids)
        return selection

    def _on_grid(self, experts: list[SelectedExpert]) -> tuple[SelectedExpert, ...]:
        """With the weights that the blend will have, so that the answer reports what was used."""
        rounded = (
            replace(expert, weight=float(f"{round(expert.weight / self._step) * self._step:.12g}"))
            for expert in experts
        )
        return tuple(expert for expert in rounded if expert.weight != 0)


def options_of(settings: RoutingSettings) -> RoutingOptions:
    """The configured defaults as routing options.

    Raises:
        RoutingOptionsError: a value that no router could serve.
    """
    return RoutingOptions(
        strategy=settings.strategy,
        top_m=settings.top_m,
        policy=settings.policy,
        temperature=settings.temperature,
        threshold=settings.threshold,
    )


def _options(asked: RoutingFields | None) -> RoutingOptions:
    """What the client changes; the router knows the defaults."""
    if asked is None:
        return RoutingOptions()
    return RoutingOptions(
        strategy=asked.strategy,
        top_m=asked.top_m,
        policy=asked.policy,
        temperature=asked.temperature,
        threshold=asked.threshold,
    )


def explained(decision: Decision) -> dict[str, Any]:
    """A decision as JSON: what was chosen, every candidate, and why."""
    return {
        "strategy": decision.strategy,
        "policy": decision.policy,
        "temperature": decision.temperature,
        "threshold": decision.threshold,
        "experts": [_scored(expert) for expert in decision.experts],
        "candidates": [_scored(expert) for expert in decision.candidates],
        "fallback": decision.fallback,
        "truncated": decision.truncated,
        "margin": decision.margin,
        "entropy": decision.entropy,
        "reason": decision.reason,
    }


def _scored(expert: Candidate | SelectedExpert) -> dict[str, Any]:
    return {
        "id": expert.id,
        "weight": expert.weight,
        "similarity": expert.similarity,
        "probability": expert.probability,
        "score": expert.score,
    }


def _selected(expert: Candidate) -> SelectedExpert:
    return SelectedExpert(expert.id, expert.weight, expert.similarity, expert.probability, expert.score)


def _rescaled(experts: list[SelectedExpert], total: float) -> list[SelectedExpert]:
    """The same mixture when some of its experts were unloaded: what is left shares the whole weight."""
    left = sum(expert.weight for expert in experts)
    if not left or left == total:
        return experts
    return [replace(expert, weight=expert.weight * total / left) for expert in experts]
