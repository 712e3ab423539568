"""Fit a whole router from routing vectors and cluster labels; add an expert, or let it join; take one out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..classifier import LinearClassifier, softmax
from ..decision import Strategy
from ..encoder import EncoderSpec, normalize_rows
from ..errors import RouterError, RoutingExamplesError
from ..familiarity import Distances, Familiarity, everyday_distances, familiar, nearness
from ..index import CentroidIndex
from ..router import hybrid_scores
from ..state import Calibration, RouterState, Samples
from .calibrate import calibrate, fit_curve, fit_hybrid_weight, fit_temperature, platt_smoothing
from .clusters import centroids as mean_centroids
from .discriminant import Discriminant, fit_discriminant, joined_head

Vectors = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


_CLOSED = "this router takes no expert without being fitted again: {}"


@dataclass(frozen=True, slots=True)
class RouterFitOptions:
    """How a router is fitted.

    folds: parts that the rows are cut into for calibration; each is scored by what the others fit, so that
    every row is a held-out row. rejected: share of in-domain held-out texts that may fall below the
    threshold. hybrid_weight: the cosine's share, None learns it. centring: None decides by the corpus (on
    when two random texts have a cosine above 0.25, as with E5). samples: vectors kept per expert. shrinkage:
    share of the identity in the covariance of the head and of the familiarity; None takes more
    for fewer rows.
    """

    folds: int = 5
    rejected: float = 0.03
    hybrid_weight: float | None = 0.5
    centring: bool | None = None
    samples: int = 128
    shrinkage: float | None = None
    seed: int = 0


def fit_router(
    vectors: Vectors,
    labels: Labels,
    experts: Sequence[str],
    encoder: EncoderSpec,
    options: RouterFitOptions | None = None,
    general: Vectors | None = None,
) -> RouterState:
    """Unit vectors [n, d] of the routing texts and their expert numbers [n] -> a calibrated router.

    `general`: unit vectors [b, d] of texts about anything (`general_texts`), which the familiarity holds the
    experts' own against; None fits it without. Deterministic for a seed. Raises RouterError when an expert
    has fewer than 2 rows.
    """
    options = options or RouterFitOptions()
    counts = np.bincount(labels, minlength=len(experts))
    if len(vectors) != len(labels) or len(counts) != len(experts) or counts.min() < 2:
        raise RouterError(f"each of {len(experts)} experts needs at least 2 rows; got {counts.tolist()}")
    means = mean_centroids(vectors, labels, len(experts))
    mean = vectors.astype(np.float64).mean(axis=0).astype(np.float32)
    centring = options.centring
    if centring is None:
        centring = bool(mean @ mean > 0.25) and len(experts) > 1
    return _calibrated(vectors, labels, tuple(experts), encoder, means, mean, centring, options, general)


def add_expert(
    state: RouterState, expert: str, vectors: Vectors, options: RouterFitOptions | None = None
) -> RouterState:
    """Add an expert from unit vectors [n >= 2, d] of texts it should answer.

    The other centroids stay as they are; the classifier and the calibration are fitted again on the stored
    samples and the new vectors. Raises RouterError when the router stores no samples or the id is taken.
    """
    if expert in state.experts:
        raise RouterError(f"expert {expert} is in the router already")
    if state.samples is None:
        raise RouterError("this router stores no sample vectors, so no expert can be added; fit it again")
    options = replace(
        options or RouterFitOptions(), hybrid_weight=state.hybrid_weight, centring=state.centring
    )
    count = len(state.experts)
    new = _spread(vectors, max(options.samples, 2), options.seed)
    rows = normalize_rows(np.concatenate([state.samples.vectors, new]))
    labels = np.concatenate([state.samples.labels, np.full(len(new), count)])
    centroid = mean_centroids(vectors, np.zeros(len(vectors), np.int64), 1)
    means = np.concatenate([state.centroids, centroid])
    experts = (*state.experts, expert)
    mean, centring = state.corpus_mean, state.centring
    general = None if state.familiarity is None else state.familiarity.general
    return _calibrated(rows, labels, experts, state.encoder, means, mean, centring, options, general)


def join_expert(state: RouterState, expert: str, vectors: Vectors) -> RouterState:
    """Add an expert from unit vectors [n >= 1, d] of texts it should answer, in closed form.

    Nothing is fitted: the others keep centroids, classifier rows and calibration, and `remove_expert` gives
    the old state back. `add_expert`, which fits classifier and calibration again, is better and slower.
    Raises RoutingExamplesError when the texts cancel out or the router cannot be added to, and RouterError
    when the id is taken.
    """
    if expert in state.experts:
        raise RouterError(f"expert {expert} is in the router already")
    try:
        centroid = mean_centroids(vectors, np.zeros(len(vectors), np.int64), 1)
    except RouterError:
        raise RoutingExamplesError(None, "the texts cancel out and have no centroid") from None
    classifier, samples, familiarity = state.classifier, state.samples, state.familiarity
    if classifier is not None:
        if familiarity is None:
            raise RoutingExamplesError(None, _CLOSED.format("it stores no means and precision"))
        try:
            fitted = Discriminant(familiarity.means, familiarity.precision)
            classifier = joined_head(classifier, fitted, vectors)
        except RouterError as error:
            raise RoutingExamplesError(None, _CLOSED.format(error)) from None
    if familiarity is not None:
        mean = vectors.astype(np.float64).mean(axis=0, keepdims=True).astype(np.float32)
        familiarity = replace(familiarity, means=np.concatenate([familiarity.means, mean]))
    if samples is not None:
        labels = np.concatenate([samples.labels, np.full(len(vectors), len(state.experts))])
        samples = Samples(np.concatenate([samples.vectors, vectors]), labels)
    return replace(
        state,
        experts=(*state.experts, expert),
        centroids=np.concatenate([state.centroids, centroid]),
        classifier=classifier,
        samples=samples,
        familiarity=familiarity,
    )


def remove_expert(state: RouterState, expert: str) -> RouterState:
    """Take an expert out; the others keep centroids, classifier rows and calibration. Raises RouterError."""
    if expert not in state.experts:
        raise RouterError(f"expert {expert} is not in the router")
    if len(state.experts) == 1:
        raise RouterError(f"expert {expert} is the last one; a router needs at least one")
    gone = state.experts.index(expert)
    classifier, samples, familiarity = state.classifier, state.samples, state.familiarity
    if familiarity is not None:
        familiarity = replace(familiarity, means=np.delete(familiarity.means, gone, axis=0))
    if classifier is not None:
        weight, bias = np.delete(classifier.weight, gone, axis=0), np.delete(classifier.bias, gone)
        classifier = LinearClassifier(weight, bias)
    if samples is not None:
        keep = samples.labels != gone
        labels = samples.labels[keep]
        samples = Samples(samples.vectors[keep], labels - (labels > gone))
    return replace(
        state,
        experts=tuple(one for one in state.experts if one != expert),
        centroids=np.delete(state.centroids, gone, axis=0),
        classifier=classifier,
        samples=samples,
        familiarity=familiarity,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """Every row as one that nothing was fitted on.

    cosines and squared distances to the experts' means, each [n, k], and the distances to the mean of the
    general texts [n], where there are any.
    """

    cosines: Scores
    distances: Scores
    everyday: Scores | None

    @property
    def logits(self) -> Scores:
        """Half the distance is the negative log-likelihood up to a term that the experts share."""
        return -0.5 * self.distances

    @property
    def nearest(self) -> Scores:
        """Distance to the nearest expert [n]."""
        result: Scores = self.distances.min(axis=1)
        return result

    def foreign(self, labels: Labels) -> Scores:
        """Nearness of the nearest of the other experts [n]: what a foreign text looks like to this pool."""
        if self.distances.shape[1] == 1:
            return np.zeros(0)
        others = self.distances.copy()
        others[np.arange(len(labels)), labels] = np.inf
        return nearness(others.min(axis=1), self.everyday)


def _calibrated(
    vectors: Vectors,
    labels: Labels,
    experts: tuple[str, ...],
    encoder: EncoderSpec,
    means: Vectors,
    mean: Vectors,
    centring: bool,
    options: RouterFitOptions,
    general: Vectors | None,
) -> RouterState:
    shrinkage = _shrinkage(vectors, options)
    fold = _folds(labels, len(experts), options.folds, options.seed)
    held = _held(vectors, labels, fold, len(experts), mean, centring, shrinkage, general)
    temperature = fit_temperature(held.logits, labels, platt_smoothing(len(labels)))
    fitted = fit_discriminant(vectors, labels, len(experts), shrinkage)
    foreign = held.foreign(labels)
    if general is not None and (everyday := everyday_distances(general, fitted.precision)) is not None:
        nearest = Distances(fitted.means, fitted.precision)(general).min(axis=1)
        foreign = np.concatenate([foreign, nearness(nearest, everyday(general)[:, 0])])
    center, scale = fit_curve(nearness(held.nearest, held.everyday), foreign)
    probabilities = softmax(held.logits / temperature).astype(np.float64)
    probabilities *= familiar(held.nearest, held.everyday, center, scale)[:, None]
    weight = options.hybrid_weight
    if weight is None:
        weight = fit_hybrid_weight(held.cosines, probabilities, labels).weight
    scores: dict[Strategy, Scores] = {
        "similarity": held.cosines,
        "classifier": probabilities,
        "hybrid": hybrid_scores(held.cosines, probabilities, weight),
    }
    calibration: dict[Strategy, Calibration] = {
        strategy: calibrate(table, labels, options.rejected) for strategy, table in scores.items()
    }
    return RouterState(
        experts=experts,
        encoder=encoder,
        centroids=means,
        corpus_mean=mean,
        classifier=fitted.head().cooled(temperature),
        calibration=calibration,
        hybrid_weight=weight,
        centring=centring,
        samples=_samples(vectors, labels, len(experts), options),
        familiarity=Familiarity(fitted.means, fitted.precision, center, scale, general),
    )


def _held(
    vectors: Vectors,
    labels: Labels,
    fold: Labels,
    k: int,
    mean: Vectors,
    centring: bool,
    shrinkage: float,
    general: Vectors | None,
) -> _Held:
    cosines, distances = (np.zeros((len(labels), k)) for _ in range(2))
    everyday = None if general is None or not len(general) else np.zeros(len(labels))
    for number in range(int(fold.max()) + 1):
        out = fold == number
        rows, own = vectors[~out], labels[~out]
        fitted = fit_discriminant(rows, own, k, shrinkage)
        cosines[out] = _cosines(vectors[out], mean_centroids(rows, own, k), mean, centring)
        distances[out] = Distances(fitted.means, fitted.precision)(vectors[out])
        if everyday is not None and (to := everyday_distances(general, fitted.precision)) is not None:
            everyday[out] = to(vectors[out])[:, 0]
    return _Held(cosines, distances, everyday)


def _shrinkage(vectors: Vectors, options: RouterFitOptions) -> float:
    """More for fewer rows a dimension, between 0.1 and 0.6; docs/routing.md has the trial."""
    if options.shrinkage is not None:
        return options.shrinkage
    count, dimension = vectors.shape
    return float(min(0.6, max(0.1, 10 * dimension / count)))


def _cosines(vectors: Vectors, means: Vectors, mean: Vectors, centring: bool) -> Scores:
    if centring:
        vectors, means = normalize_rows(vectors - mean), normalize_rows(means - mean)
    return CentroidIndex(means).similarities(vectors).astype(np.float64)


def _folds(labels: Labels, k: int, folds: int, seed: int) -> Labels:
    """A fold for every row [n]; each expert's rows are spread over the folds, so that none loses all."""
    generator = np.random.default_rng(seed)
    result = np.zeros(len(labels), np.int64)
    for expert in range(k):
        rows = np.flatnonzero(labels == expert)
        result[generator.permutation(rows)] = np.arange(len(rows)) % max(folds, 2)
    return result


def _samples(vectors: Vectors, labels: Labels, count: int, options: RouterFitOptions) -> Samples | None:
    if options.samples < 2:
        return None
    kept = [_spread(vectors[labels == expert], options.samples, options.seed) for expert in range(count)]
    numbers = np.repeat(np.arange(count), [len(rows) for rows in kept])
    return Samples(np.concatenate(kept), numbers)


def _spread(rows: Vectors, limit: int, seed: int) -> Vectors:
    if len(rows) <= limit:
        return rows
    return rows[np.sort(np.random.default_rng(seed).choice(len(rows), limit, replace=False))]
