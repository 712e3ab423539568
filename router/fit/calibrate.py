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


def negative_log_likelihood(scores: Scores, labels: Labels, temperature: float) -> float:
    """Mean of -log softmax(scores / temperature)[label] over rows [n, k], in nats."""
    logits = scores / temperature
    logits = logits - logits.max(axis=1, keepdims=True)
    chosen = logits[np.arange(len(labels)), labels]
    return float((np.log(np.exp(logits).sum(axis=1)) - chosen).mean())


def fit_temperature(scores: Scores, labels: Labels) -> float:
    """The temperature in [0.001, 100] with the least held-out NLL, by golden-section search on its logarithm.

    NLL is convex in 1/temperature, so it has one valley on the log scale too.
    """
    _check(scores, labels)
    ratio = (np.sqrt(5) - 1) / 2
    low, high = _LOG_RANGE
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if negative_log_likelihood(scores, labels, np.exp(left)) <= negative_log_likelihood(
            scores, labels, np.exp(right)
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


def calibrate(scores: Scores, labels: Labels, rejected: float) -> Calibration:
    """Temperature and threshold of one strategy from held-out scores [n, k] and own experts [n]."""
    return Calibration(fit_temperature(scores, labels), fit_threshold(scores, rejected))


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
