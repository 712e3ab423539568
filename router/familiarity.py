"""How likely a text is one that the pool knows at all, by its distance to the experts' texts.

The distance is Mahalanobis': (x - μ)ᵀ P (x - μ) to the nearest expert's mean μ, P the inverse of the
covariance within the experts (Lee et al. 2018, "A Simple Unified Framework for Detecting Out-of-Distribution
Samples").
Cosines cannot say this: to a text about something else one centroid is always the nearest, and a softmax over
the experts is then as sure as ever.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import RouterError

Vectors = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Familiarity:
    """means [k, d] of the experts' unit vectors (not normalised), precision [d, d], and a logistic curve.

    `center` is the squared distance at which a text is as likely foreign as known, `scale` the width of the
    change. Raises RouterError when the parts do not fit together.
    """

    means: Vectors
    precision: Vectors
    center: float
    scale: float

    def __post_init__(self) -> None:
        dimension = self.means.shape[-1]
        if self.means.ndim != 2 or self.precision.shape != (dimension, dimension):
            raise RouterError(f"familiarity: means {self.means.shape}, precision {self.precision.shape}")
        if not (np.isfinite(self.means).all() and np.isfinite(self.precision).all()):
            raise RouterError("familiarity holds NaN or infinity")
        if not (np.isfinite(self.center) and np.isfinite(self.scale) and self.scale > 0):
            raise RouterError(f"familiarity: center {self.center} and scale {self.scale} are no curve")

    def probability(self, vectors: Vectors) -> Scores:
        """[n, d] unit vectors -> [n] from 0 (foreign) to 1 (as an expert's own texts)."""
        nearest = squared_distances(vectors, self.means, self.precision).min(axis=1)
        return known(nearest, self.center, self.scale)


def known(nearest: Scores, center: float, scale: float) -> Scores:
    """Squared distances to the nearest mean [n] -> 1 / (1 + exp((distance - center) / scale))."""
    result: Scores = 1 / (1 + np.exp(np.clip((nearest - center) / scale, -500, 500)))
    return result


def squared_distances(vectors: Vectors, means: Vectors, precision: Vectors) -> Scores:
    """[n, d] rows -> (x - μ)ᵀ P (x - μ) to every mean [n, k], in float64."""
    rows, centres, inverse = (part.astype(np.float64) for part in (vectors, means, precision))
    own = np.einsum("nd,nd->n", rows @ inverse, rows)
    projected = centres @ inverse
    constant = np.einsum("kd,kd->k", projected, centres)
    result: Scores = np.maximum(own[:, None] - 2 * rows @ projected.T + constant, 0.0)
    return result
