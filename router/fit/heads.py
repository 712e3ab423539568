"""Linear heads on the embedding beside the discriminant: ridge in closed form, and logistic regression."""

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from ..classifier import LinearClassifier
from .discriminant import fit_discriminant

Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Head = Literal["discriminant", "ridge", "logistic"]
HEADS: tuple[Head, ...] = get_args(Head)
#: Inverse strength of the penalty of the logistic regression; unit vectors need a weak one.
LOGISTIC_C = 100.0


def fit_head(kind: Head, vectors: Vectors, labels: Labels, k: int, shrinkage: float) -> LinearClassifier:
    """Unit rows [n, d] with labels [n] in 0..k-1 -> a head whose logits a temperature has yet to calibrate.

    `shrinkage` is that of the discriminant, and of the ridge its share of the mean variance.
    Raises RouterError when a class has no rows.
    """
    fitted = fit_discriminant(vectors, labels, k, shrinkage)  # checks the classes too
    if kind == "discriminant":
        return fitted.head()
    if kind == "ridge":
        return _ridge(vectors, labels, k, shrinkage)
    return _logistic(vectors, labels, k)


def _ridge(vectors: Vectors, labels: Labels, k: int, shrinkage: float) -> LinearClassifier:
    """Least squares from the centred vectors to one-hot targets (Hoerl and Kennard 1970), in float64."""
    rows, targets = vectors.astype(np.float64), np.eye(k)[labels]
    mean, share = rows.mean(axis=0), targets.mean(axis=0)
    centred = rows - mean
    gram = centred.T @ centred
    penalty = shrinkage * np.trace(gram) / len(gram)
    weight = np.linalg.solve(gram + max(penalty, 1e-9) * np.eye(len(gram)), centred.T @ (targets - share)).T
    return LinearClassifier(weight.astype(np.float32), (share - weight @ mean).astype(np.float32))


def _logistic(vectors: Vectors, labels: Labels, k: int) -> LinearClassifier:
    """Multinomial logistic regression with an L2 penalty (scikit-learn, L-BFGS)."""
    if k == 1:
        return LinearClassifier(np.zeros((1, vectors.shape[1]), np.float32), np.zeros(1, np.float32))
    from sklearn.linear_model import LogisticRegression

    found = LogisticRegression(C=LOGISTIC_C, max_iter=2000).fit(vectors.astype(np.float64), labels)
    weight, bias = found.coef_, found.intercept_
    if k == 2:  # one row stands for the difference of the two
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return LinearClassifier(weight.astype(np.float32), bias.astype(np.float32))
