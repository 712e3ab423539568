"""Steps 2 and 3 of a request: which experts, how much of each, and the blend made of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from loramux.adapters.blend import EXACT_GRID, Blend
from loramux.adapters.sparse.token_mixtures import TEMPERATURE, TokenMethod, TokenMixture
from loramux.router.decision import STRATEGIES, Decision, RoutingOptions
from loramux.router.encoder import EncoderSpec
from loramux.router.errors import RouterError, RoutingOptionsError
from loramux.router.joining import Joined
from loramux.router.projection import Projection
from loramux.router.ranked import Candidate
from loramux.router.router import Router as FittedRouter
from loramux.router.service import Embedded
from loramux.server.ask import Ask
from loramux.server.catalog import Catalog, Kind
from loramux.server.errors import RequestError
from loramux.server.leases import Mixture, SparseChoice
from loramux.server.logo import Logo
from loramux.server.metrics import Metrics
from loramux.server.routing_settings import RoutingSettings
from loramux.server.wire.decision import explained, scored
from loramux.server.wire.experts import map_body
from loramux.server.wire.generation import BY_TOKEN, LOGO, RoutingFields

NAMED = "named"
GIVEN = "given"
_NO_WISHES = RoutingFields.model_validate({})


@dataclass(frozen=True, slots=True)
class SelectedExpert:
    """One expert of a selection; the three numbers of the router are `None` when nothing was routed."""

    id: str
    weight: float
    similarity: float | None = None
    probability: float | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """Every token chooses `top_k` of the experts of these ids, by that method."""

    method: TokenMethod
    ids: tuple[str, ...]
    top_k: int
    temperature: float = TEMPERATURE

    def body(self) -> list[dict[str, Any]]:
        """The candidates as the experts of an answer; a prompt has no weights."""
        names = ("weight", "similarity", "probability", "score")
        return [{"id": id, **dict.fromkeys(names)} for id in self.ids]


@dataclass(frozen=True, slots=True)
class Selection:
    """What will answer.

    `strategy` is the router's or `logo`, or `named` for a model by name, or `given` for a client's own
    mixture, or `arrow` or `spectr`, which have their experts in `by_token`.
    """

    strategy: str
    experts: tuple[SelectedExpert, ...] = ()
    fallback: bool = False
    truncated: bool = False
    method: str = "exact"
    by_token: TokenChoice | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        """The experts' ids."""
        return tuple(expert.id for expert in self.experts) if self.by_token is None else self.by_token.ids

    def header(self) -> str:
        """`x-loramux-experts`: `math=0.71,code=0.29`; empty for the base alone, `*` where tokens choose."""
        if self.by_token is not None:
            return "*"
        return ",".join(f"{expert.id}={expert.weight:g}" for expert in self.experts)

    @property
    def is_routed(self) -> bool:
        """Whether the router weighted experts for it."""
        return self.strategy not in (NAMED, GIVEN) and bool(self.experts)

    def body(self) -> dict[str, Any]:
        """The `route` object of an answer."""
        return {
            "strategy": self.strategy,
            "experts": [scored(e) for e in self.experts] if self.by_token is None else self.by_token.body(),
            "fallback": self.fallback,
            "truncated": self.truncated,
        }


class Router(Protocol):
    """What is asked of the router."""

    @property
    def experts(self) -> Sequence[str]:
        """The ids that decisions have now."""
        ...

    @property
    def projection(self) -> Projection:
        """The map of their centroids, in that order."""
        ...

    async def decide(self, text: str, options: RoutingOptions) -> Decision:
        """The decision about one routing text."""
        ...

    @property
    def encoder(self) -> EncoderSpec:
        """What embeds."""
        ...

    async def embed(self, texts: Sequence[str]) -> Embedded:
        """The vectors of some texts."""
        ...

    async def joined(self, expert: str, texts: Sequence[str]) -> Joined:
        """A router with an expert more, from example texts; nothing changes until `use`."""
        ...

    async def left(self, expert: str) -> FittedRouter:
        """A router with an expert less; nothing changes until `use`."""
        ...

    def use(self, router: FittedRouter) -> None:
        """Decide with `router` from now on."""
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
        defaults: RoutingSettings,
        logo: Logo,
        weight_step: float,
        metrics: Metrics,
    ) -> None:
        self._catalog = catalog
        self._router = router
        self._defaults = defaults
        self._logo = logo
        self._step = weight_step
        self._metrics = metrics

    async def select(self, ask: Ask) -> Selection:
        """Step 2.

        Raises:
            RequestError: an option that means nothing with the strategy.
            BlendError, EngineError: the experts cannot be asked, or their pass failed.
            RouterError: impossible options, or the router failed.
        """
        kind = self._catalog.resolve(ask.model)
        if ask.lora is not None:
            chosen = [SelectedExpert(name, scale) for name, scale in ask.lora]
            return self._counted(Selection(GIVEN, tuple(one for one in chosen if one.weight != 0)))
        if kind is Kind.BASE:
            return self._counted(Selection(NAMED))
        if kind in (Kind.EXPERT, Kind.SPARSE):
            return self._counted(Selection(NAMED, (SelectedExpert(ask.model, 1.0),)))
        asked = ask.routing or _NO_WISHES
        strategy = self._strategy(asked)
        if strategy in BY_TOKEN:
            return self._by_token(TokenMethod(strategy), asked)
        if strategy == LOGO:
            return await self._ask_experts(ask, asked)
        return await self._route(ask)

    def mixture(self, selection: Selection) -> Mixture:
        """Step 3: what a selection has to lease.

        Raises:
            BlendError: a weight or the merge method is not acceptable.
        """
        if (choice := selection.by_token) is not None:
            experts = [self._catalog.expert(id) for id in choice.ids]
            return TokenMixture.of(choice.method, experts, top_k=choice.top_k, temperature=choice.temperature)
        if len(selection.ids) == 1 and selection.ids[0] in self._catalog.sparse:
            return SparseChoice(selection.ids[0])
        return self.blend(selection)

    def blend(self, selection: Selection) -> Blend:
        """The canonical blend of a selection of weighted experts.

        Raises:
            BlendError: a weight or the merge method is not acceptable.
        """
        parts = [
            (expert.id, self._catalog.expert(expert.id).content_hash, expert.weight)
            for expert in selection.experts
        ]
        # Routed weights share blends by a coarse grid; a client's own mixture is served as it is written.
        grid = EXACT_GRID if selection.strategy == GIVEN else self._step
        return Blend.of(parts, method=selection.method, grid=grid)

    def top1(self, selection: Selection) -> Blend | None:
        """The expert of the largest weight, alone and whole; `None` where none is weighted.

        Raises:
            UnknownModel: it has been unloaded.
        """
        if selection.by_token is not None or not selection.experts:
            return None
        best = max(selection.experts, key=lambda expert: expert.weight)
        if best.id in self._catalog.sparse:
            return None
        return self.blend(replace(selection, experts=(replace(best, weight=1.0),)))

    def chart(self, similarities: Mapping[str, float] | None = None) -> dict[str, Any]:
        """The map of the experts that can be routed to, and on it the text of these cosines by router id."""
        ids, projection = self._router.experts, self._router.projection
        served = self._catalog.routable()
        places = zip(ids, projection.positions.tolist(), strict=True)
        positions = {served[id]: (x, y) for id, (x, y) in places if id in served}
        known = similarities is not None and set(similarities) == set(ids)
        prompt = projection.place([similarities[id] for id in ids]) if similarities and known else None
        return map_body(positions, projection.explained.tolist(), prompt)

    async def explain(self, text: str, asked: RoutingFields | None, *, chart: bool = False) -> dict[str, Any]:
        """The whole decision about a text, for `/v1/route`; with `chart`, where it lies on the map too.

        Raises:
            RequestError: a strategy that decides nothing about a text alone.
            RouterError: impossible options, or the router failed.
        """
        strategy = self._strategy(asked or _NO_WISHES)
        if strategy not in STRATEGIES:
            how = "reads the whole prompt in the base" if strategy == LOGO else "chooses token by token"
            raise RequestError(
                f"routing.strategy: {strategy} {how}; there is no decision to show, name one of "
                f"{', '.join(STRATEGIES)}",
                param="routing.strategy",
                code="invalid_value",
            )
        decision = await self._router.decide(text, _options(asked))
        body = explained(self._catalog.among(decision))
        if chart:
            body["map"] = self.chart({one.id: one.similarity for one in decision.candidates})
        return body

    async def _route(self, ask: Ask) -> Selection:
        try:
            decision = await self._router.decide(ask.routing_text, _options(ask.routing))
        except RouterError as error:
            if not isinstance(error, RoutingOptionsError):
                self._metrics.routed("error", ())
            raise
        decision = self._catalog.among(decision)
        asked = None if ask.routing is None else ask.routing.merge
        selection = Selection(
            decision.strategy,
            self._on_grid([_selected(expert) for expert in decision.experts]),
            fallback=decision.fallback,
            truncated=decision.truncated,
            method=asked or self._defaults.merge,
        )
        self._metrics.routed(
            "fallback" if selection.fallback else "routed",
            selection.ids,
            nearest=decision.candidates[0].id if decision.candidates and not decision.blank else None,
            margin=decision.margin,
            entropy=decision.entropy,
            truncated=decision.truncated,
        )
        return selection

    def _strategy(self, asked: RoutingFields) -> str:
        """Which one it is, the client's or the server's."""
        strategy = asked.strategy or self._defaults.strategy
        if misfit := asked.misfit(strategy):
            raise RequestError(
                f"routing.{misfit}: means nothing with strategy {strategy}, which is this server's",
                param=f"routing.{misfit}",
                code="invalid_value",
            )
        return strategy

    def _by_token(self, method: TokenMethod, asked: RoutingFields) -> Selection:
        """Every expert that is loaded; the tokens choose."""
        ids = tuple(sorted(self._catalog.experts))
        self._metrics.routed(method if ids else "fallback", ())
        if not ids:
            return Selection(method, fallback=True)
        temperature = TEMPERATURE if asked.temperature is None else asked.temperature
        top_k = min(asked.top_m or self._defaults.top_m, len(ids))
        return Selection(method, by_token=TokenChoice(method, ids, top_k, temperature))

    async def _ask_experts(self, ask: Ask, asked: RoutingFields) -> Selection:
        """The loaded experts with the strongest signals, weighted by them."""
        if len(ask.prompts) != 1:
            raise RequestError(
                f"prompt: strategy logo reads one, and there are {len(ask.prompts)}; send them one by one",
                param="prompt",
                code="invalid_value",
            )
        experts = {id: self._catalog.expert(id) for id in sorted(self._catalog.experts)}
        chosen: list[SelectedExpert] = []
        if experts:
            signals = await self._logo.signals(ask.prompts[0].tokens, experts, asked.signal or "norm")
            best = sorted(signals, key=lambda id: -signals[id])[: asked.top_m or self._defaults.top_m]
            total = sum(signals[id] for id in best)
            chosen = [SelectedExpert(id, signals[id] / total, score=signals[id]) for id in best if total > 0]
        selection = Selection(
            LOGO,
            self._on_grid(chosen),
            fallback=not chosen,
            method=asked.merge or self._defaults.merge,
        )
        self._metrics.routed(LOGO if chosen else "fallback", selection.ids)
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


def _options(asked: RoutingFields | None) -> RoutingOptions:
    """What the client changes; the router knows the defaults, and its own strategies alone."""
    if asked is None:
        return RoutingOptions()
    return RoutingOptions(
        strategy=next((one for one in STRATEGIES if one == asked.strategy), None),
        top_m=asked.top_m,
        policy=asked.policy,
        temperature=asked.temperature,
        threshold=asked.threshold,
    )


def _selected(expert: Candidate) -> SelectedExpert:
    return SelectedExpert(expert.id, expert.weight, expert.similarity, expert.probability, expert.score)
