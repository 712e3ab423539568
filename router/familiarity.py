"""How likely a text is one that the pool knows at all, by its distance to the experts' texts.

The distance is Mahalanobis': (x - μ)ᵀ P (x - μ) to the nearest expert's mean μ, P the inverse of the
covariance within the experts (Lee et al. 2018, "A Simple Unified Framework for Detecting Out-of-Distribution
Samples").
Cosines cannot say this: to a text about something else one centroid is always the nearest, and a softmax over
the experts is then as sure as ever.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .errors import RouterError

Vectors = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]


#: Share of the distance to the general texts that is taken off the distance to the nearest expert.
GENERAL_WEIGHT = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Familiarity:
    """means [k, d] of the experts' unit vectors (not normalised), precision [d, d], and a logistic curve.

    `center` is the squared distance at which a text is as likely foreign as known, `scale` the width of the
    change. `general`: unit vectors [b, d] of texts that are about anything, or None; with them, half the
    distance to their mean is taken off, so that a text has to be nearer to an expert than to everyday talk.
    Raises RouterError when the parts do not fit together.
    """

    means: Vectors
    precision: Vectors
    center: float
    scale: float
    general: Vectors | None = None
    _nearness: "Nearness" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        dimension = self.means.shape[-1]
        if self.means.ndim != 2 or self.precision.shape != (dimension, dimension):
            raise RouterError(f"familiarity: means {self.means.shape}, precision {self.precision.shape}")
        if not (np.isfinite(self.means).all() and np.isfinite(self.precision).all()):
            raise RouterError("familiarity holds NaN or infinity")
        if not (np.isfinite(self.center) and np.isfinite(self.scale) and self.scale > 0):
            raise RouterError(f"familiarity: center {self.center} and scale {self.scale} are no curve")
        if self.general is not None and (self.general.ndim != 2 or self.general.shape[1:] != (dimension,)):
            raise RouterError(f"familiarity: general texts {self.general.shape}, dimension {dimension}")
        object.__setattr__(self, "_nearness", Nearness(self.means, self.precision, self.general))

    def probability(self, vectors: Vectors) -> Scores:
        """[n, d] unit vectors -> [n] from 0 (foreign) to 1 (as an expert's own texts)."""
        return known(self._nearness(vectors).min(axis=1), self.center, self.scale)


def known(nearest: Scores, center: float, scale: float) -> Scores:
    """Distances to the nearest mean [n] -> 1 / (1 + exp((distance - center) / scale))."""
    result: Scores = 1 / (1 + np.exp(np.clip((nearest - center) / scale, -500, 500)))
    return result


class Distances:
    """Rows [n, d] -> (x - μ)ᵀ P (x - μ) to every mean [n, k], in float64; what no row changes is kept."""

    def __init__(self, means: Vectors, precision: Vectors) -> None:
        centres, self._precision = means.astype(np.float64), precision.astype(np.float64)
        self._projected = centres @ self._precision
        self._constant = np.einsum("kd,kd->k", self._projected, centres)

    def __call__(self, vectors: Vectors) -> Scores:
        rows = vectors.astype(np.float64)
        own = np.einsum("nd,nd->n", rows @ self._precision, rows)
        found = own[:, None] - 2 * rows @ self._projected.T + self._constant
        result: Scores = np.maximum(found, 0.0)
        return result


class Nearness:
    """Rows [n, d] -> distance to every mean [n, k], less the share of that to the general texts' mean."""

    def __init__(self, means: Vectors, precision: Vectors, general: Vectors | None) -> None:
        """`general` None or empty takes nothing off."""
        self._own = Distances(means, precision)
        self._general: Distances | None = None
        if general is not None and len(general):
            mean = general.astype(np.float64).mean(axis=0, keepdims=True).astype(np.float32)
            self._general = Distances(mean, precision)

    def __call__(self, vectors: Vectors) -> Scores:
        found = self._own(vectors)
        if self._general is not None:
            found = found - GENERAL_WEIGHT * self._general(vectors)
        return found
