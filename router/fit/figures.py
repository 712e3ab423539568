"""How well a fit does on rows that it was not fitted on: one line for each strategy."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..decision import Strategy
from ..state import Calibration
from .calibrate import negative_log_likelihood

Scores = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
_BINS = 10


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one strategy over held-out rows [rows].

    accuracy: share whose best expert is their own. nll: nats of the own expert under softmax(score /
    temperature). ece: expected calibration error of the best one's probability there, in 10 bins. lost: share
    of them that the threshold sends to the base. false_routing: share of foreign texts that it lets through;
    None without foreign texts.
    """

    strategy: Strategy
    rows: int
    accuracy: float
    nll: float
    ece: float
    temperature: float
    threshold: float
    lost: float
    false_routing: float | None

    @classmethod
    def of(
        cls,
        strategy: Strategy,
        scores: Scores,
        labels: Labels,
        calibration: Calibration,
        foreign: Scores | None,
    ) -> "Figures":
        """Held-out scores [n, k] and own experts [n], and the scores of foreign texts [m, any]."""
        best = scores.max(axis=1)
        right = scores.argmax(axis=1) == labels
        powers = np.exp((scores - best[:, None]) / calibration.temperature)
        passed = None
        if foreign is not None and len(foreign):
            passed = float((foreign.max(axis=1) >= calibration.threshold).mean())
        return cls(
            strategy,
            len(labels),
            float(right.mean()),
            negative_log_likelihood(scores, labels, calibration.temperature),
            calibration_error(1 / powers.sum(axis=1), right),
            calibration.temperature,
            calibration.threshold,
            float((best < calibration.threshold).mean()),
            passed,
        )


def calibration_error(confidence: Scores, right: npt.NDArray[np.bool_]) -> float:
    """Expected calibration error over intervals of equal width (Naeini et al. 2015)."""
    number = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = [abs(float((right[number == n] - confidence[number == n]).sum())) for n in np.unique(number)]
    return sum(gaps) / max(len(right), 1)
