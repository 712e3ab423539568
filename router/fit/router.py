"""Fit a whole router from routing vectors and cluster labels; add an expert to it; take one out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..classifier import LinearClassifier
from ..decision import Strategy
from ..encoder import EncoderSpec, normalize_rows
from ..errors import RouterError
from ..index import CentroidIndex
from ..router import hybrid_scores
from ..state import Calibration, RouterState, Samples
from .calibrate import calibrate, fit_hybrid_weight, fit_temperature
from .classifier import fit_linear, with_temperature
from .clusters import centroids as mean_centroids

Vectors = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RouterFitOptions:
    """How a router is fitted.

    held_out: share of each expert's rows kept for calibration. rejected: share of in-domain held-out texts
    that may fall below the threshold. hybrid_weight: the cosine's share, None learns it. centring: None
    decides by the corpus (on when two random texts have a cosine above 0.25, as with E5). samples: vectors
    kept per expert.
    """

    held_out: float = 0.1
    rejected: float = 0.005
    hybrid_weight: float | None = 0.5
    centring: bool | None = None
    samples: int = 128
    l2: float = 1e-5
    seed: int = 0


def fit_router(
    vectors: Vectors,
    labels: Labels,
    experts: Sequence[str],
    encoder: EncoderSpec,
    options: RouterFitOptions | None = None,
) -> RouterState:
    """Unit vectors [n, d] of the routing texts and their expert numbers [n] -> a calibrated router.

    Deterministic for a seed. Raises RouterError when an expert has fewer than 2 rows.
    """
    options = options or RouterFitOptions()
    counts = np.bincount(labels, minlength=len(experts))
    if len(vectors) != len(labels) or len(counts) != len(experts) or counts.min() < 2:
        raise RouterError(f"each of {len(experts)} experts needs at least 2 rows; got {counts.tolist()}")
    held = _held_out(labels, len(experts), options.held_out, options.seed)
    means = mean_centroids(vectors[~held], labels[~held], len(experts))
    mean = vectors[~held].astype(np.float64).mean(axis=0).astype(np.float32)
    centring = options.centring
    if centring is None:
        centring = bool(mean @ mean > 0.25) and len(experts) > 1
    return _calibrated(vectors, labels, held, tuple(experts), encoder, means, mean, centring, options)


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
    held = _held_out(labels, count + 1, max(options.held_out, 0.2), options.seed)
    experts = (*state.experts, expert)
    return _calibrated(
        rows, labels, held, experts, state.encoder, means, state.corpus_mean, state.centring, options
    )


def remove_expert(state: RouterState, expert: str) -> RouterState:
    """Take an expert out; the others keep centroids, classifier rows and calibration. Raises RouterError."""
    if expert not in state.experts:
        raise RouterError(f"expert {expert} is not in the router")
    if len(state.experts) == 1:
        raise RouterError(f"expert {expert} is the last one; a router needs at least one")
    gone = state.experts.index(expert)
    classifier, samples = state.classifier, state.samples
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
    )


def _calibrated(
    vectors: Vectors,
    labels: Labels,
    held: npt.NDArray[np.bool_],
    experts: tuple[str, ...],
    encoder: EncoderSpec,
    means: Vectors,
    mean: Vectors,
    centring: bool,
    options: RouterFitOptions,
) -> RouterState:
    head = fit_linear(vectors[~held], labels[~held], len(experts), l2=options.l2)
    rows, own = vectors[held], labels[held]
    logits = rows.astype(np.float64) @ head.weight.T.astype(np.float64) + head.bias
    head = with_temperature(head, fit_temperature(logits, own))
    probabilities = head.probabilities([""] * len(rows), rows).astype(np.float64)
    cosines = _cosines(rows, means, mean, centring)
    weight = options.hybrid_weight
    if weight is None:
        weight = fit_hybrid_weight(cosines, probabilities, own).weight
    scores: dict[Strategy, Scores] = {
        "similarity": cosines,
        "classifier": probabilities,
        "hybrid": hybrid_scores(cosines, probabilities, weight),
    }
    calibration: dict[Strategy, Calibration] = {
        strategy: calibrate(table, own, options.rejected) for strategy, table in scores.items()
    }
    return RouterState(
        experts=experts,
        encoder=encoder,
        centroids=means,
        corpus_mean=mean,
        classifier=head,
        calibration=calibration,
        hybrid_weight=weight,
        centring=centring,
        samples=_samples(vectors, labels, len(experts), options),
    )


def _cosines(vectors: Vectors, means: Vectors, mean: Vectors, centring: bool) -> Scores:
    if centring:
        vectors, means = normalize_rows(vectors - mean), normalize_rows(means - mean)
    return CentroidIndex(means).similarities(vectors).astype(np.float64)


def _held_out(labels: Labels, count: int, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """A share of every expert's rows, at least one and never all."""
    generator = np.random.default_rng(seed)
    held = np.zeros(len(labels), np.bool_)
    for expert in range(count):
        rows = np.flatnonzero(labels == expert)
        size = min(len(rows) - 1, max(1, round(share * len(rows))))
        held[generator.choice(rows, size, replace=False)] = True
    return held


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
