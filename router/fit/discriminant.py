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
# Head, means and precision are stored in float32; a head that was fitted in another way is off by far more.
_SAME_HEAD = 1e-4


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


def joined_head(head: LinearClassifier, fitted: Discriminant, vectors: Vectors) -> LinearClassifier:
    """`head`, which is that of `fitted` at some temperature, with a row more; the others stay as they are.

    The row is P m and its bias -½ (mᵀ P m - d / n), at the same temperature, for the mean m of unit vectors
    [n, d] of the new expert's texts. The mean of few texts is noisy, and mᵀ P m is larger for it by
    tr(P Σ) / n = d / n on average (the bias correction of Moran and Murphy 1979, "A Closer Look at Two
    Alternative Methods of Statistical Discrimination"): without it an expert of a handful of texts loses to
    those that were fitted on thousands.
    Raises RouterError when the head is not that of the discriminant.
    """
    temperature = _temperature(head, fitted)
    count, dimension = vectors.shape
    mean = vectors.astype(np.float64).mean(axis=0, keepdims=True).astype(np.float32)
    row = Discriminant(mean, fitted.precision).head()
    row = LinearClassifier(row.weight, row.bias + np.float32(0.5 * dimension / count)).cooled(temperature)
    return LinearClassifier(np.concatenate([head.weight, row.weight]), np.concatenate([head.bias, row.bias]))


def _temperature(head: LinearClassifier, fitted: Discriminant) -> float:
    """What the logits of `fitted` were divided by to give `head`: least squares over the weights.

    Biases say nothing more: those of experts that joined are corrected.
    Raises RouterError when no temperature does.
    """
    whole = fitted.head()
    if whole.weight.shape == head.weight.shape:
        own, given = whole.weight.astype(np.float64), head.weight.astype(np.float64)
        scale = float((own * given).sum() / max(float((own * own).sum()), 1e-30))
        if scale > 0 and np.abs(scale * own - given).max() <= _SAME_HEAD * np.abs(given).max():
            return 1 / scale
    raise RouterError("the classifier is not a linear discriminant over the stored means and precision")
