"""Temperatures, thresholds and the hybrid weight, from rows that nothing was fitted on.

Temperatures minimise the held-out negative log-likelihood of the row's own expert under
softmax(score / temperature) over all experts (Guo et al. 2017, temperature scaling). Each strategy has its
own, because cosines, probabilities and their average live on different scales. The result is sharp where the
router is sure, which is what serving wants: the blend then stays close to the best single expert.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import RouterError
from ..familiarity import KNOWN_SHARE
from ..router import hybrid_scores
from ..state import Calibration

Scores = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
_LOG_RANGE = (np.log(1e-3), np.log(1e2))


@dataclass(frozen=True, slots=True)
class HybridFit:
    """A learned cosine share, and the held-out negative log-likelihood (nats) it reached."""

    weight: float
    nll: float


def platt_smoothing(rows: int) -> float:
    """The share of doubt that `rows` held-out rows leave even if all of them were right: 1 / (rows + 2).

    Without it, rows that are separated perfectly end in certainty (Platt 1999, §2.2: targets of
    (n + 1) / (n + 2)).
    """
    return 1.0 / (rows + 2)


def negative_log_likelihood(
    scores: Scores, labels: Labels, temperature: float, smoothing: float = 0.0
) -> float:
    """Mean of -log softmax(scores / temperature)[label] over rows [n, k], in nats.

    A share `smoothing` of each row's target lies evenly on the other experts.
    """
    logits = scores / temperature
    logits = logits - logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits).sum(axis=1))
    chosen = logits[np.arange(len(labels)), labels]
    count = scores.shape[1]
    if count == 1 or not smoothing:
        return float((total - chosen).mean())
    others = (logits.sum(axis=1) - chosen) / (count - 1)
    return float((total - (1 - smoothing) * chosen - smoothing * others).mean())


def fit_temperature(scores: Scores, labels: Labels, smoothing: float = 0.0) -> float:
    """The temperature in [0.001, 100] with the least held-out NLL, by golden-section search on its logarithm.

    NLL is convex in 1/temperature, so it has one valley on the log scale too, with smoothed targets as well.
    """
    _check(scores, labels)
    ratio = (np.sqrt(5) - 1) / 2
    low, high = _LOG_RANGE
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if negative_log_likelihood(scores, labels, np.exp(left), smoothing) <= negative_log_likelihood(
            scores, labels, np.exp(right), smoothing
        ):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2))


def fit_threshold(scores: Scores, rejected: float) -> float:
    """The best score that only a share `rejected` of in-domain rows stays below, within [-1, 1]."""
    if not 0 <= rejected < 1:
        raise RouterError(f"the rejected share must be from 0 to 1, got {rejected}")
    return float(np.clip(np.quantile(scores.max(axis=1), rejected), -1.0, 1.0))


def fit_foreign_threshold(foreign: Scores, passed: float) -> float:
    """The least score that a share of at most `passed` of foreign texts [m, k] reaches, within [-1, 1]."""
    if not 0 <= passed < 1:
        raise RouterError(f"the share of false routing must be from 0 to 1, got {passed}")
    if not len(foreign):
        raise RouterError("the rate of false routing needs foreign texts")
    ordered = np.sort(foreign.max(axis=1))[::-1]
    first_refused = ordered[int(passed * len(ordered))]
    return float(np.clip(np.nextafter(first_refused, np.inf), -1.0, 1.0))


def calibrate(scores: Scores, labels: Labels, rejected: float) -> Calibration:
    """Temperature and threshold of one strategy from held-out scores [n, k] and own experts [n]."""
    temperature = fit_temperature(scores, labels, platt_smoothing(len(labels)))
    return Calibration(temperature, fit_threshold(scores, rejected))


def fit_curve(own: Scores, foreign: Scores, known_share: float = KNOWN_SHARE) -> tuple[float, float]:
    """Center and scale of a logistic curve over distance, from held-out texts and from foreign ones.

    Minimises the cross-entropy with the groups weighted by what is expected, `known_share` of own texts, and
    with Platt's smoothed targets (Newton's method on two numbers, started between the groups). Without
    foreign texts, as in a pool of one expert, nearly all own texts pass: the center lies two spreads beyond
    them.
    """
    spread = max(float(own.std()), 1e-3 * max(float(np.abs(own).mean()), 1e-3))
    if not len(foreign):
        return float(np.quantile(own, 0.99)) + 2 * spread, spread
    unit = max(float(np.concatenate([own, foreign]).std()), 1e-9)
    middle = (float(own.mean()) + float(foreign.mean())) / 2
    x = (np.concatenate([own, foreign]) - middle) / unit
    doubt_own, doubt_foreign = platt_smoothing(len(own)), platt_smoothing(len(foreign))
    target = np.repeat([1 - doubt_own, doubt_foreign], [len(own), len(foreign)])
    share = np.repeat([known_share / len(own), (1 - known_share) / len(foreign)], [len(own), len(foreign)])
    design = np.stack([x, np.ones_like(x)], axis=1)
    ridge = np.diag([1e-6, 1e-8])
    parameters = np.array([-1.0, 0.0])
    for _ in range(100):
        guess = 1 / (1 + np.exp(-np.clip(design @ parameters, -50, 50)))
        slope = design.T @ (share * (guess - target)) + ridge @ parameters
        curvature = design.T @ (design * (share * guess * (1 - guess))[:, None]) + ridge
        step = np.linalg.solve(curvature, slope)
        parameters = parameters - step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-9:
            break
    # A curve that rises with the distance would call foreign texts known: then let all pass.
    steepness = float(-parameters[0])
    if steepness < 1e-3:
        return float(own.max()) + 20 * spread, spread
    return middle + unit * float(parameters[1]) / steepness, unit / steepness


def fit_hybrid_weight(cosines: Scores, probabilities: Scores, labels: Labels) -> HybridFit:
    """The cosine share on a grid of 0.05 with the least held-out NLL, each at its own best temperature."""
    fits = []
    for step in range(21):
        scores = hybrid_scores(cosines, probabilities, step / 20)
        nll = negative_log_likelihood(scores, labels, fit_temperature(scores, labels))
        fits.append(HybridFit(step / 20, nll))
    return min(fits, key=lambda fit: fit.nll)


def _check(scores: Scores, labels: Labels) -> None:
    if not len(labels) or len(scores) != len(labels):
        raise RouterError(f"calibration needs held-out rows; got {len(scores)} scores, {len(labels)} labels")
