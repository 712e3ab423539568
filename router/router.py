"""Text to decision: embed, score every expert, choose.

The three steps are separate because they batch differently: texts are embedded and scored together, while
each request chooses with its own options. `decide` runs all three.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from .classifier import Classifier
from .decision import Decision, RoutingOptions, RoutingPlan, Strategy, reason_for
from .encoder import Encoded, Encoder, normalize_rows
from .errors import RouterError, RoutingOptionsError
from .index import CentroidIndex
from .policy import blend_weights, entropy, ranking
from .products import FEW
from .projection import Projection
from .ranked import Candidate, Ranked
from .state import RouterState

Vectors = npt.NDArray[np.float32]
Value = TypeVar("Value", float, npt.NDArray[np.float64])
DEFAULTS = RoutingOptions(strategy="hybrid", top_m=3, policy="softmax")


@dataclass(frozen=True, slots=True, eq=False)
class ScoreTable:
    """Per text and expert [n, k]: raw cosine, the cosine ranked by (centred or raw), probability or None.

    Per text [n]: whether it was cut, and whether it is blank (nothing to route by).
    """

    similarity: Vectors
    ranked: Vectors
    probability: Vectors | None
    truncated: npt.NDArray[np.bool_]
    blank: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.similarity)

    def row(self, number: int) -> "ScoreRow":
        """The scores of one text."""
        probability = None if self.probability is None else self.probability[number]
        truncated, blank = self.truncated[number], self.blank[number]
        return ScoreRow.of(self.similarity[number], self.ranked[number], probability, truncated, blank)


@dataclass(frozen=True, slots=True, eq=False)
class ScoreRow:
    """A `ScoreTable` of one text: values per expert [k]."""

    similarity: Vectors
    ranked: Vectors
    probability: Vectors | None
    truncated: bool
    blank: bool

    @classmethod
    def of(
        cls,
        similarity: Vectors,
        ranked: Vectors,
        probability: Vectors | None,
        truncated: np.bool_,
        blank: np.bool_,
    ) -> "ScoreRow":
        """Rows of larger arrays, copied: a row that is kept must not keep its batch."""
        own = None if probability is None else probability.copy()
        return cls(similarity.copy(), ranked.copy(), own, bool(truncated), bool(blank))

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers alone."""
        probability = 0 if self.probability is None else self.probability.nbytes
        return self.similarity.nbytes + self.ranked.nbytes + probability


class Router:
    """A fitted router with its encoder. Immutable after construction; one thread at a time may embed."""

    def __init__(
        self,
        state: RouterState,
        encoder: Encoder,
        classifier: Classifier | None = None,
        defaults: RoutingOptions = DEFAULTS,
    ) -> None:
        """`classifier` replaces the state's linear head. Raises RouterError when encoder and state differ."""
        if encoder.spec != state.encoder:
            raise RouterError(f"the centroids belong to {state.encoder}, not to {encoder.spec}")
        self.state = state
        self.encoder = encoder
        self.classifier: Classifier | None = classifier or state.classifier
        self.defaults = defaults.over(DEFAULTS)
        self._index = CentroidIndex(state.centroids)
        self._centred: CentroidIndex | None = None
        if state.centring:
            self._centred = CentroidIndex(normalize_rows(state.centroids - state.corpus_mean))
        self._require_classifier(self.defaults)

    @property
    def experts(self) -> tuple[str, ...]:
        return self.state.experts

    @cached_property
    def projection(self) -> Projection:
        """The map of the experts, in the order of `experts`."""
        return Projection.of(self.state.centroids)

    def over(self, state: RouterState) -> "Router":
        """The router of another state, with this one's encoder and defaults.

        Raises RouterError when the classifier is not the state's own: its classes are these experts.
        """
        if self.classifier is not self.state.classifier:
            raise RouterError("a fine-tuned classifier cannot be given other experts")
        return Router(state, self.encoder, defaults=self.defaults)

    def resolve(self, options: RoutingOptions | None = None) -> RoutingPlan:
        """Fill every None: request over configuration over calibration. Raises RoutingOptionsError."""
        asked = (options or RoutingOptions()).over(self.defaults)
        self._require_classifier(asked)
        strategy = asked.strategy or "hybrid"
        fitted = self.state.calibration[strategy]
        return RoutingPlan(
            strategy=strategy,
            top_m=asked.top_m or 1,
            policy=asked.policy or "softmax",
            temperature=fitted.temperature if asked.temperature is None else asked.temperature,
            threshold=fitted.threshold if asked.threshold is None else asked.threshold,
        )

    def embed(self, texts: Sequence[str]) -> Encoded:
        """[n] texts -> unit vectors [n, d] and truncation flags [n]."""
        return self.encoder.encode(texts)

    def similarities(self, vectors: Vectors) -> tuple[Vectors, Vectors]:
        """Unit vectors [n, d] -> raw cosines and the cosines to rank by, both [n, k]."""
        raw = self._index.similarities(vectors)
        if self._centred is None:
            return raw, raw
        empty = blank_rows(vectors)[:, None]
        shifted = normalize_rows(np.where(empty, vectors, vectors - self.state.corpus_mean))
        return raw, self._centred.similarities(shifted)

    def probabilities(self, texts: Sequence[str], vectors: Vectors) -> Vectors | None:
        """[n] texts and their unit vectors -> probabilities [n, k], None without a classifier.

        The classifier's rows times the familiarity: what is missing to 1 is that no expert fits.
        """
        if self.classifier is None:
            return None
        rows = self.classifier.probabilities(texts, vectors)
        if rows.shape != (len(texts), len(self.experts)) or not np.isfinite(rows).all():
            raise RouterError(f"the classifier gave shape {rows.shape} or a value that is not finite")
        if self.state.familiarity is None:
            return rows
        return (rows * self.state.familiarity.probability(vectors)[:, None]).astype(np.float32)

    def score(self, texts: Sequence[str], encoded: Encoded, *, classify: bool = True) -> ScoreTable:
        """Score [n] embedded texts against all k experts; `classify=False` leaves the classifier out."""
        raw, ranked = self.similarities(encoded.vectors)
        probability = self.probabilities(texts, encoded.vectors) if classify else None
        return ScoreTable(raw, ranked, probability, encoded.truncated, blank_rows(encoded.vectors))

    def choose(self, table: ScoreTable, row: int, options: RoutingOptions | None = None) -> Decision:
        """The decision for one row of a score table. Raises RoutingOptionsError for impossible options."""
        return self.choose_row(table.row(row), self.resolve(options))

    def choose_row(self, row: ScoreRow, plan: RoutingPlan) -> Decision:
        """The decision for one text. Raises RouterError when the plan needs probabilities the row lacks."""
        if len(self.state.experts) > FEW:
            return self._choose_of_many(row, plan)
        scores = self._scores(row, plan.strategy)
        order = ranking(scores)
        ordered = [scores[place] for place in order]
        fallback = row.blank or ordered[0] < plan.threshold
        weights = [] if fallback else blend_weights(ordered, plan.top_m, plan.policy, plan.temperature)
        candidates = self._candidates(row, order, ordered, weights)
        return self._decision(row, plan, ordered, weights, candidates, entropy(ordered, plan.temperature))

    def _choose_of_many(self, row: ScoreRow, plan: RoutingPlan) -> Decision:
        """The same with arrays, which pay from some hundred experts on."""
        ranked = Ranked(
            self.state.experts, row.similarity, row.probability, self._score_array(row, plan.strategy)
        )
        ordered = ranked.best(plan.top_m + 1)
        fallback = row.blank or ordered[0] < plan.threshold
        weights = [] if fallback else blend_weights(ordered, plan.top_m, plan.policy, plan.temperature)
        candidates = ranked.weighted(weights)
        return self._decision(row, plan, ordered, weights, candidates, ranked.entropy(plan.temperature))

    @staticmethod
    def _decision(
        row: ScoreRow,
        plan: RoutingPlan,
        ordered: Sequence[float],
        weights: Sequence[float],
        candidates: Sequence[Candidate],
        spread: float,
    ) -> Decision:
        """From the best scores in order, the weights of the first (none: the base answers), all candidates,
        and the entropy of their scores."""
        return Decision(
            strategy=plan.strategy,
            policy=plan.policy,
            temperature=plan.temperature,
            threshold=plan.threshold,
            candidates=candidates,
            experts=tuple(candidates[: len(weights)]),
            fallback=not weights,
            reason=reason_for(plan.strategy, plan.threshold, candidates[0], len(weights), blank=row.blank),
            truncated=row.truncated,
            margin=ordered[0] - (ordered[1] if len(ordered) > 1 else 0.0),
            entropy=spread,
            blank=row.blank,
        )

    def decide(self, texts: Sequence[str], options: RoutingOptions | None = None) -> list[Decision]:
        """One decision per text, all with the same options; a batch gives what single calls give.

        Raises RoutingOptionsError for impossible options.
        """
        plan = self.resolve(options)
        table = self.score(texts, self.embed(texts), classify=self.needs_classifier(plan))
        return [self.choose_row(table.row(number), plan) for number in range(len(table))]

    def needs_classifier(self, plan: RoutingPlan) -> bool:
        """Whether to run the classifier. A linear head is so cheap that its opinion is always shown."""
        if self.classifier is None:
            return False
        return self.classifier.kind == "linear" or plan.strategy != "similarity"

    def _score_array(self, row: ScoreRow, strategy: Strategy) -> npt.NDArray[np.float64]:
        cosine = row.ranked.astype(np.float64)
        if strategy == "similarity":
            return cosine
        probability = _classified(row, strategy).astype(np.float64)
        return (
            probability
            if strategy == "classifier"
            else hybrid_scores(cosine, probability, self.state.hybrid_weight)
        )

    def _scores(self, row: ScoreRow, strategy: Strategy) -> list[float]:
        if strategy == "similarity":
            return list(row.ranked.tolist())
        probability = _classified(row, strategy)
        if strategy == "classifier":
            return list(probability.tolist())
        weight = self.state.hybrid_weight
        pairs = zip(row.ranked.tolist(), probability.tolist(), strict=True)
        return [hybrid_scores(cosine, share, weight) for cosine, share in pairs]

    def _candidates(
        self, row: ScoreRow, order: Sequence[int], ordered: Sequence[float], weights: Sequence[float]
    ) -> tuple[Candidate, ...]:
        """Every expert in the order of its score; `weights` are those of the first."""
        ids = self.state.experts
        # One conversion per row: reading an array number by number costs ten times as much.
        similarity = row.similarity.tolist()
        probability = [None] * len(order) if row.probability is None else row.probability.tolist()
        padded = [*weights, *[0.0] * (len(order) - len(weights))]
        return tuple(
            Candidate(ids[place], weight, similarity[place], probability[place], score)
            for place, weight, score in zip(order, padded, ordered, strict=True)
        )

    def _require_classifier(self, options: RoutingOptions) -> None:
        if options.strategy in ("classifier", "hybrid") and self.classifier is None:
            raise RoutingOptionsError("strategy", f"{options.strategy} needs a classifier; there is none")


def _classified(row: ScoreRow, strategy: Strategy) -> Vectors:
    if row.probability is None:
        raise RouterError(f"strategy {strategy} needs probabilities, but the texts were not classified")
    return row.probability


def blank_rows(vectors: Vectors) -> npt.NDArray[np.bool_]:
    """Which of [n, d] rows are all zero: the encoder's mark for a text with nothing to route by."""
    return np.asarray(~np.any(vectors, axis=1), np.bool_)


def hybrid_scores(cosine: Value, probability: Value, weight: float) -> Value:
    """weight · cosine + (1 - weight) · probability (QLoRA-MoE report §3.2, "hybrid routing"; ½ there)."""
    return weight * cosine + (1.0 - weight) * probability
