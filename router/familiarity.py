"""How likely a text is one that the pool knows at all, by its distance to the experts' texts.

The distance is Mahalanobis': (x - μ)ᵀ P (x - μ) to the nearest expert's mean μ, P the inverse of the
covariance within the experts (Lee et al. 2018, "A Simple Unified Framework for Detecting Out-of-Distribution
Samples").
Cosines cannot say this: to a text about something else one centroid is always the nearest, and a softmax over
the experts is then as sure as ever.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .errors import RouterError
from .products import FEW, products

Vectors = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]


#: Share of the distance to the general texts that is taken off the distance to the nearest expert.
GENERAL_WEIGHT = 0.5
#: Half the difference of two squared distances is the logit of a discriminant: its width in distance is 2.
LOGIT = 2.0
#: The share of texts that are expected to be an expert's: the prior of the curve and of the discriminant.
KNOWN_SHARE = 0.95
#: Where such a discriminant is undecided: everyday talk has to be nearer by this.
UNDECIDED = LOGIT * math.log(KNOWN_SHARE / (1 - KNOWN_SHARE))


@dataclass(frozen=True, slots=True, eq=False)
class Familiarity:
    """means [k, d] of the experts' unit vectors (not normalised), precision [d, d], and a logistic curve.

    `center` is the squared distance at which a text is as likely foreign as known, `scale` the width of the
    change. `general`: unit vectors [b, d] of texts that are about anything, or None; with them the pool's
    texts have one more class beside the experts, that of everyday talk (`familiar`).
    Raises RouterError when the parts do not fit together.
    """

    means: Vectors
    precision: Vectors
    center: float
    scale: float
    general: Vectors | None = None
    _own: "Distances" = field(init=False, repr=False)
    _everyday: "Distances | None" = field(init=False, repr=False)

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
        object.__setattr__(self, "_own", Distances(self.means, self.precision))
        object.__setattr__(self, "_everyday", everyday_distances(self.general, self.precision))

    def probability(self, vectors: Vectors) -> Scores:
        """[n, d] unit vectors -> [n] from 0 (foreign) to 1 (as an expert's own texts)."""
        everyday = None if self._everyday is None else self._everyday(vectors)[:, 0]
        return familiar(self._own.nearest(vectors), everyday, self.center, self.scale)


def familiar(nearest: Scores, everyday: Scores | None, center: float, scale: float) -> Scores:
    """Squared distances [n] to the nearest expert's mean and to that of everyday talk -> probability [n].

    A text is known if it is near to an expert, which is told by a curve over the distance less half of that
    to everyday talk, and if it is not everyday talk to a discriminant that expects 95 % of an expert's. One
    alone is not enough: the first calls everyday talk known that resembles an expert's texts, the second
    whatever is far from both.
    """
    if everyday is None:
        return known(nearest, center, scale)
    is_expert = known(nearest - everyday, UNDECIDED, LOGIT)
    found: Scores = known(nearness(nearest, everyday), center, scale) * is_expert
    return found


def nearness(distances: Scores, everyday: Scores | None) -> Scores:
    """Distances [n] or [n, k] less the share of those to everyday talk [n]."""
    if everyday is None:
        return distances
    found: Scores = (distances.T - GENERAL_WEIGHT * everyday).T
    return found


def everyday_distances(general: Vectors | None, precision: Vectors) -> "Distances | None":
    """Distances to the mean of the general texts; None without any."""
    if general is None or not len(general):
        return None
    return Distances(general.astype(np.float64).mean(axis=0, keepdims=True).astype(np.float32), precision)


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
        self._narrow = self._projected.astype(np.float32)
        # What a float32 product of a unit row can be off by, twice: of the least and of another.
        lengths = np.linalg.norm(self._projected, axis=1)
        unit = float(np.finfo(np.float32).eps)
        self._margin = 2 * unit * (2 * means.shape[1] * float(lengths.max(initial=0)) + 1)

    def __call__(self, vectors: Vectors) -> Scores:
        rows = vectors.astype(np.float64)
        own = np.einsum("nd,nd->n", rows @ self._precision, rows)
        found = own[:, None] - 2 * rows @ self._projected.T + self._constant
        result: Scores = np.maximum(found, 0.0)
        return result

    def nearest(self, vectors: Vectors) -> Scores:
        """Unit rows [n, d] -> the least of their distances [n], the same number as that of all.

        Of many means those that may be the nearest are found in float32, with half the memory to read, and
        only they are computed in float64.
        """
        if len(self._projected) <= FEW:
            result: Scores = self(vectors).min(axis=1)
            return result
        rows = vectors.astype(np.float64)
        least = np.empty(len(rows))
        for number, narrow in enumerate(products(self._narrow, vectors.astype(np.float32))):
            row = rows[number]
            rough = self._constant - 2.0 * narrow
            near = np.flatnonzero(rough <= rough.min() + 2 * self._margin)
            exact = self._constant[near] - 2 * (self._projected[near] @ row)
            least[number] = max(0.0, float(row @ self._precision @ row) + float(exact.min()))
        return least
