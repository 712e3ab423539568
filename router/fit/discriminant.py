"""Fit the linear head in closed form: a linear discriminant with a shared, shrunken covariance.

Row e of the head is P μ_e and its bias -½ μ_eᵀ P μ_e, so its logits are minus half the squared Mahalanobis
distances up to a term that all experts share (Fisher 1936; Ledoit and Wolf 2004 on why the covariance of few
rows is to be shrunk towards a multiple of the identity). Unlike a logistic regression it stays finite on rows
that a plane separates perfectly, and an expert can join without the others being fitted again.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..classifier import LinearClassifier
from ..errors import RouterError

Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
# Vectors have length 1, so a variance below this is that of copies of one text.
_LEAST_VARIANCE = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Discriminant:
    """means [k, d] and the precision [d, d] that the experts share."""

    means: Vectors
    precision: Vectors

    def head(self) -> LinearClassifier:
        """The experts' log-likelihoods up to a shared term, as weight [k, d] and bias [k]."""
        means, precision = self.means.astype(np.float64), self.precision.astype(np.float64)
        weight = means @ precision
        bias = -0.5 * np.einsum("kd,kd->k", weight, means)
        return LinearClassifier(weight.astype(np.float32), bias.astype(np.float32))


def fit_discriminant(vectors: Vectors, labels: Labels, k: int, shrinkage: float) -> Discriminant:
    """Unit rows [n, d] with labels [n] in 0..k-1 -> means and precision, computed in float64.

    `shrinkage` from 0 to 1 is the share of the identity, scaled to the mean variance, in the covariance.
    Raises RouterError when a class has no rows.
    """
    counts = np.bincount(labels, minlength=k)
    if len(labels) != len(vectors) or len(counts) != k or (counts == 0).any():
        raise RouterError(f"the classifier needs rows for each of {k} experts; got {counts.tolist()}")
    rows = vectors.astype(np.float64)
    means = np.zeros((k, rows.shape[1]))
    np.add.at(means, labels, rows)
    means /= counts[:, None]
    rest = rows - means[labels]
    covariance = rest.T @ rest / max(len(rows) - k, 1)
    variance = max(float(np.trace(covariance)) / len(covariance), _LEAST_VARIANCE)
    shrunk = (1 - shrinkage) * covariance + shrinkage * variance * np.eye(len(covariance))
    precision = np.linalg.inv(shrunk)
    return Discriminant(means.astype(np.float32), ((precision + precision.T) / 2).astype(np.float32))
