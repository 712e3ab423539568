"""What the router says about one text, and what it may be asked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from .errors import RoutingOptionsError
from .policy import POLICIES, Policy, blend_weights, entropy
from .ranked import Candidate, Ranked

Strategy = Literal["similarity", "classifier", "hybrid"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
MAX_TOP_M = 64


@dataclass(frozen=True, slots=True)
class Decision:
    """The router's answer for one text.

    candidates: every expert, best score first; of a large pool `Ranked`. experts: those to blend, best first;
    empty when `fallback`.
    margin: best minus second score (the score itself with one expert). entropy: of softmax(score /
    temperature) over all experts, in nats. reason: one sentence for people. blank: there was nothing to
    route by.
    """

    strategy: Strategy
    policy: Policy
    temperature: float
    threshold: float
    candidates: Sequence[Candidate]
    experts: tuple[Candidate, ...]
    fallback: bool
    reason: str
    truncated: bool
    margin: float
    entropy: float
    blank: bool = False

    def is_of(self, experts: Sequence[str]) -> bool:
        """Whether it was made among these very experts, of many; of a few, who asks looks at each."""
        return isinstance(self.candidates, Ranked) and self.candidates.names == experts

    def among(self, served: Mapping[str, str]) -> "Decision":
        """The decision of a pool of fewer experts: `served` has router id -> the id it is served by.

        Threshold and weights apply to what is there. Scores stay: a text of an expert that is gone is
        no more like the others for it.
        """
        if isinstance(self.candidates, Ranked):
            return self._among_many(self.candidates, served)
        if all(served.get(candidate.id) == candidate.id for candidate in self.candidates):
            return self
        kept = [one._replace(id=served[one.id]) for one in self.candidates if one.id in served]
        ordered = [one.score for one in kept]
        fallback = self.fallback or not kept or ordered[0] < self.threshold
        # With fewer candidates than before, the number chosen before is as good as the number asked for.
        weights = [] if fallback else blend_weights(ordered, len(self.experts), self.policy, self.temperature)
        padded = [*weights, *[0.0] * (len(kept) - len(weights))]
        candidates = tuple(one._replace(weight=weight) for one, weight in zip(kept, padded, strict=True))
        spread = entropy(ordered, self.temperature) if kept else 0.0
        return self._over(candidates, ordered, len(weights), spread, served)

    def _among_many(self, ranked: Ranked, served: Mapping[str, str]) -> "Decision":
        kept = ranked.among(served)
        asked = len(self.experts)
        ordered = kept.best(max(asked, 1) + 1)
        fallback = self.fallback or not ordered or ordered[0] < self.threshold
        weights = [] if fallback else blend_weights(ordered, asked, self.policy, self.temperature)
        spread = kept.entropy(self.temperature) if ordered else 0.0
        return self._over(kept.weighted(weights), ordered, len(weights), spread, served)

    def _over(
        self,
        candidates: Sequence[Candidate],
        ordered: Sequence[float],
        count: int,
        spread: float,
        served: Mapping[str, str],
    ) -> "Decision":
        """The same over other candidates, of which the first `count` are chosen; `ordered` are the best
        scores, `spread` the entropy of all."""
        best = candidates[0] if ordered else None
        second = ordered[1] if len(ordered) > 1 else 0.0
        return replace(
            self,
            candidates=candidates,
            experts=tuple(candidates[:count]),
            fallback=not count,
            reason=self._reason_among(best, count, served),
            margin=ordered[0] - second if ordered else 0.0,
            entropy=spread,
        )

    def _reason_among(self, best: Candidate | None, count: int, served: Mapping[str, str]) -> str:
        """Why, when `best` is the first of those that are served and `count` of them were chosen."""
        first = self.candidates[0].id
        if best is None:
            return "no expert that the router knows is served: the base answers alone"
        if first in served:
            return reason_for(self.strategy, self.threshold, best, count, blank=self.blank)
        verdict = "chosen" if count else f"below the threshold {self.threshold:.3f}: the base answers alone"
        return f"{first} is not served; next is {best.id} with {best.score:.3f}, {verdict}"


def reason_for(strategy: Strategy, threshold: float, best: Candidate, count: int, *, blank: bool) -> str:
    """One sentence for people: what was chosen, `count` experts of which `best` is the first, and why."""
    if blank:
        return "the text is blank, or nothing that the encoder reads: the base answers alone"
    if not count:
        return (
            f"best {strategy} score {best.score:.3f} ({best.id}) is below the threshold "
            f"{threshold:.3f}: the base answers alone"
        )
    experts = "1 expert" if count == 1 else f"{count} experts"
    return f"{experts} by {strategy}; best is {best.id} with score {best.score:.3f}"


@dataclass(frozen=True, slots=True)
class RoutingOptions:
    """What a request or the configuration may ask; None takes the router's own (calibrated) value.

    Raises RoutingOptionsError, naming the option, for a value that no router could serve.
    """

    strategy: Strategy | None = None
    top_m: int | None = None
    policy: Policy | None = None
    temperature: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.strategy is not None and self.strategy not in STRATEGIES:
            raise RoutingOptionsError("strategy", f"{self.strategy!r} is not one of {', '.join(STRATEGIES)}")
        if self.policy is not None and self.policy not in POLICIES:
            raise RoutingOptionsError("policy", f"{self.policy!r} is not one of {', '.join(POLICIES)}")
        if self.top_m is not None and not (_is_int(self.top_m) and 1 <= self.top_m <= MAX_TOP_M):
            raise RoutingOptionsError(
                "top_m", f"must be a whole number from 1 to {MAX_TOP_M}, got {self.top_m!r}"
            )
        if self.temperature is not None and not (
            _is_number(self.temperature) and 1e-4 <= self.temperature <= 1e4
        ):
            raise RoutingOptionsError(
                "temperature", f"must be from 0.0001 to 10000, got {self.temperature!r}"
            )
        if self.threshold is not None and not (_is_number(self.threshold) and -1 <= self.threshold <= 1):
            raise RoutingOptionsError("threshold", f"must be from -1 to 1, got {self.threshold!r}")

    def over(self, defaults: "RoutingOptions") -> "RoutingOptions":
        """These options, with `defaults` wherever nothing is asked.

        A temperature or threshold given for one strategy is not carried over to another, whose scores live on
        another scale.
        """
        same = self.strategy is None or self.strategy == defaults.strategy
        return RoutingOptions(
            strategy=self.strategy or defaults.strategy,
            top_m=defaults.top_m if self.top_m is None else self.top_m,
            policy=self.policy or defaults.policy,
            temperature=defaults.temperature if self.temperature is None and same else self.temperature,
            threshold=defaults.threshold if self.threshold is None and same else self.threshold,
        )


@dataclass(frozen=True, slots=True)
class RoutingPlan:
    """Routing options with nothing left open."""

    strategy: Strategy
    top_m: int
    policy: Policy
    temperature: float
    threshold: float


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
