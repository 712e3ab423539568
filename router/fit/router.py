"""Fit a whole router from routing vectors and cluster labels; add an expert, or let it join; take one out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..classifier import LinearClassifier
from ..decision import Strategy
from ..encoder import EncoderSpec, normalize_rows
from ..errors import RouterError, RoutingExamplesError
from ..familiarity import Distances, Familiarity, everyday_distances, nearness
from ..router import hybrid_scores
from ..state import Calibration, RouterState, Samples
from .calibrate import (
    calibrate,
    fit_curve,
    fit_foreign_threshold,
    fit_hybrid_weight,
    fit_temperature,
    platt_smoothing,
)
from .clusters import centroids as mean_centroids
from .discriminant import Discriminant, fit_discriminant, joined_head
from .figures import Figures
from .heads import Head, fit_head
from .held import HeldOut, centred_cosines, cut_folds, hold_out, linear_logits

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
    for fewer rows. classifier: the head's kind. false_routing: share of foreign texts that may pass the
    threshold, in place of `rejected`.
    """

    folds: int = 5
    rejected: float = 0.03
    hybrid_weight: float | None = 0.5
    centring: bool | None = None
    samples: int = 128
    shrinkage: float | None = None
    seed: int = 0
    classifier: Head = "discriminant"
    false_routing: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Outside:
    """A classifier that is fitted elsewhere, such as a fine-tuned transformer, and replaces the head.

    rows: numbers [m] of the rows that it has not seen. logits: its calibrated log-probabilities of them
    [m, k]. foreign: those of the foreign texts; None without such texts.
    """

    rows: Labels
    logits: Scores
    foreign: Scores | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """A fitted router, and how it does by strategy on rows that were held out of the fit."""

    state: RouterState
    figures: dict[Strategy, Figures]


def fit_router(
    vectors: Vectors,
    labels: Labels,
    experts: Sequence[str],
    encoder: EncoderSpec,
    options: RouterFitOptions | None = None,
    general: Vectors | None = None,
) -> RouterState:
    """As `fit_with_figures`, without the figures."""
    return fit_with_figures(vectors, labels, experts, encoder, options, general).state


def fit_with_figures(
    vectors: Vectors,
    labels: Labels,
    experts: Sequence[str],
    encoder: EncoderSpec,
    options: RouterFitOptions | None = None,
    general: Vectors | None = None,
    *,
    outside: Outside | None = None,
    foreign: Vectors | None = None,
) -> Fit:
    """Unit vectors [n, d] of the routing texts and their expert numbers [n] -> a calibrated router.

    `general`: unit vectors [b, d] of texts about anything (`general_texts`), which the familiarity holds the
    experts' own against; None fits it without. `outside`: a classifier in place of the head; the state has
    none then. `foreign`: vectors [m, d] of texts that no expert is for, on which the rate of false routing is
    measured; without, every held-out row is one to the experts that are not its own. Deterministic for a
    seed. Raises RouterError when an expert has fewer than 2 rows.
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
    return _calibrated(
        vectors, labels, tuple(experts), encoder, means, mean, centring, options, general, outside, foreign
    )


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
    return _calibrated(rows, labels, experts, state.encoder, means, mean, centring, options, general).state


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
    outside: Outside | None = None,
    foreign_vectors: Vectors | None = None,
) -> Fit:
    shrinkage, k = _shrinkage(vectors, options), len(experts)
    fold = cut_folds(labels, k, options.folds, options.seed)
    head = options.classifier if outside is None else "discriminant"
    held = hold_out(vectors, labels, fold, k, mean, centring, shrinkage, general, head)
    fitted = fit_discriminant(vectors, labels, k, shrinkage)
    foreign = held.foreign(labels)
    distances = Distances(fitted.means, fitted.precision)
    everyday = None if general is None else everyday_distances(general, fitted.precision)
    if general is not None and everyday is not None:
        nearest = distances(general).min(axis=1)
        foreign = np.concatenate([foreign, nearness(nearest, everyday(general)[:, 0])])
    center, scale = fit_curve(nearness(held.nearest, held.everyday), foreign)
    classifier = None
    if outside is None:
        temperature = fit_temperature(held.logits, labels, platt_smoothing(len(labels)))
        whole = fitted.head() if head == "discriminant" else fit_head(head, vectors, labels, k, shrinkage)
        classifier = whole.cooled(temperature)
    else:
        temperature = 1.0
        held = held.with_logits(outside.rows, outside.logits)
    own = labels if outside is None else labels[outside.rows]
    probabilities = held.probabilities(temperature, center, scale)
    weight = options.hybrid_weight
    if weight is None:
        weight = fit_hybrid_weight(held.cosines, probabilities, own).weight
    if foreign_vectors is not None and len(foreign_vectors):
        logits = linear_logits(whole, foreign_vectors) if outside is None else outside.foreign
        if logits is None:
            raise RouterError("the classifier says nothing about the foreign texts")
        strangers: HeldOut | None = HeldOut(
            centred_cosines(foreign_vectors, means, mean, centring),
            logits,
            distances(foreign_vectors),
            None if everyday is None else everyday(foreign_vectors)[:, 0],
        )
    else:
        strangers = held.without_own(own)
    tables = _tables(held.cosines, probabilities, weight)
    others: dict[Strategy, Scores] = {}
    if strangers is not None:
        odds = strangers.probabilities(temperature, center, scale)
        others = _tables(strangers.cosines, odds, weight)
    calibration = {
        name: _calibration(table, own, others.get(name), options) for name, table in tables.items()
    }
    state = RouterState(
        experts=experts,
        encoder=encoder,
        centroids=means,
        corpus_mean=mean,
        classifier=classifier,
        calibration=calibration,
        hybrid_weight=weight,
        centring=centring,
        samples=_samples(vectors, labels, k, options),
        familiarity=Familiarity(fitted.means, fitted.precision, center, scale, general),
    )
    figures = {
        name: Figures.of(name, table, own, calibration[name], others.get(name))
        for name, table in tables.items()
    }
    return Fit(state, figures)


def _tables(cosines: Scores, probabilities: Scores, weight: float) -> dict[Strategy, Scores]:
    return {
        "similarity": cosines,
        "classifier": probabilities,
        "hybrid": hybrid_scores(cosines, probabilities, weight),
    }


def _calibration(
    scores: Scores, labels: Labels, foreign: Scores | None, options: RouterFitOptions
) -> Calibration:
    found = calibrate(scores, labels, options.rejected)
    if options.false_routing is None:
        return found
    if foreign is None:
        raise RouterError("a pool of one expert needs foreign texts to fit the rate of false routing")
    return replace(found, threshold=fit_foreign_threshold(foreign, options.false_routing))


def _shrinkage(vectors: Vectors, options: RouterFitOptions) -> float:
    """More for fewer rows a dimension, between 0.1 and 0.6; docs/routing.md has the trial."""
    if options.shrinkage is not None:
        return options.shrinkage
    count, dimension = vectors.shape
    return float(min(0.6, max(0.1, 10 * dimension / count)))


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
