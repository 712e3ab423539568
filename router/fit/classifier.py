"""Fit the linear classifier head: multinomial logistic regression on the routing texts' unit vectors."""

import numpy as np
import numpy.typing as npt

from ..classifier import LinearClassifier
from ..errors import RouterError

Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


def fit_linear(
    vectors: Vectors,
    labels: Labels,
    k: int,
    *,
    l2: float = 1e-5,
    iterations: int = 60,
) -> LinearClassifier:
    """Minimise mean cross-entropy + l2 · ‖W‖² over unit rows [n, d] with labels [n] in 0..k-1 (L-BFGS).

    Starts from zero, so the same rows give the same head. Computed in float64, returned in float32.
    Raises RouterError when a class has no rows.
    """
    import torch

    counts = np.bincount(labels, minlength=k)
    if len(labels) != len(vectors) or len(counts) != k or (counts == 0).any():
        raise RouterError(f"the classifier needs rows for each of {k} experts; got {counts.tolist()}")
    rows, targets = torch.from_numpy(vectors.astype(np.float64)), torch.from_numpy(labels)
    weight = torch.zeros(k, rows.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(k, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(rows @ weight.T + bias, targets) + l2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return LinearClassifier(
        weight.detach().numpy().astype(np.float32), bias.detach().numpy().astype(np.float32)
    )


def with_temperature(classifier: LinearClassifier, temperature: float) -> LinearClassifier:
    """The same head with its logits divided by `temperature` (> 0), so that it is calibrated."""
    if not temperature > 0:
        raise RouterError(f"temperature must be positive, got {temperature}")
    scale = np.float32(1 / temperature)
    return LinearClassifier(classifier.weight * scale, classifier.bias * scale)
