"""A map of the experts: centroids on the two axes along which they differ most, and texts among them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """Principal components of unit centroids [k, d].

    positions: of the centroids [k, 2]. explained: the share of the centroids' variance on either axis [2].
    An axis is a sum of centroids, so a text is placed by its k cosines alone: `weights` [k, 2] and `offset`
    [2] take them to its position, and no embedding is kept. With fewer than three centroids, or equal ones,
    the axes that do not exist are zero.
    """

    positions: Numbers
    explained: Numbers
    weights: Numbers
    offset: Numbers

    @classmethod
    def of(cls, centroids: npt.NDArray[np.float32]) -> "Projection":
        """Unit rows [k, d]; on each axis the centroid that lies farthest out is on the positive side."""
        rows = centroids.astype(np.float64)
        mean = rows.mean(axis=0)
        left, lengths, _ = np.linalg.svd(rows - mean, full_matrices=False)
        count = min(2, len(lengths))
        real = lengths[:count] > 1e-6
        outer, long = np.zeros((len(rows), 2)), np.zeros(2)
        outer[:, :count] = left[:, :count] * real
        long[:count] = lengths[:count] * real
        farthest = np.abs(outer).argmax(axis=0)
        outer *= np.where(outer[farthest, [0, 1]] < 0, -1.0, 1.0)
        weights = outer / np.where(long == 0, 1.0, long)
        total = float(np.square(lengths).sum())
        explained = np.square(long) / total if total > 1e-12 else np.zeros(2)
        return cls(outer * long, explained, weights, weights.T @ (rows @ mean))

    def place(self, similarities: Sequence[float]) -> tuple[float, float]:
        """Where a text lies, from its raw cosines to the k centroids in their order."""
        x, y = self.weights.T @ np.asarray(similarities, np.float64) - self.offset
        return float(x), float(y)
