"""Every row of a fit as one that nothing was fitted on: parts of the rows, each scored by a fit of the
others."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..classifier import LinearClassifier, softmax
from ..encoder import normalize_rows
from ..familiarity import Distances, everyday_distances, familiar, nearness
from ..index import CentroidIndex
from .clusters import centroids as mean_centroids
from .discriminant import fit_discriminant
from .heads import Head, fit_head

Vectors = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """Scores of rows.

    cosines, logits of the classifier's head, and squared distances to the experts' means, each [n, k];
    everyday: distances to the mean of the general texts [n], where there are any.
    """

    cosines: Scores
    logits: Scores
    distances: Scores
    everyday: Scores | None

    @property
    def nearest(self) -> Scores:
        """Distance to the nearest expert [n]."""
        result: Scores = self.distances.min(axis=1)
        return result

    def foreign(self, labels: Labels) -> Scores:
        """Nearness of the nearest of the other experts [n]: what a foreign text looks like to this pool."""
        if self.distances.shape[1] == 1:
            return np.zeros(0)
        others = self.distances.copy()
        others[np.arange(len(labels)), labels] = np.inf
        return nearness(others.min(axis=1), self.everyday)

    def probabilities(self, temperature: float, center: float, scale: float) -> Scores:
        """As the router gives them: softmax of the logits times the familiarity."""
        rows = softmax(self.logits / temperature).astype(np.float64)
        result: Scores = rows * familiar(self.nearest, self.everyday, center, scale)[:, None]
        return result

    def with_logits(self, rows: Labels, logits: Scores) -> "HeldOut":
        """Some of the rows [m] with the logits of another classifier [m, k]."""
        everyday = None if self.everyday is None else self.everyday[rows]
        return HeldOut(self.cosines[rows], logits, self.distances[rows], everyday)

    def without_own(self, labels: Labels) -> "HeldOut | None":
        """The rows as a pool without their own expert would see them, where each of them is foreign; None for
        a pool of one. Each [n, k - 1]."""
        count, k = self.distances.shape
        if k == 1:
            return None
        others = np.arange(k) != labels[:, None]
        cut = (table[others].reshape(count, k - 1) for table in (self.cosines, self.logits, self.distances))
        cosines, logits, distances = cut
        return HeldOut(cosines, logits, distances, self.everyday)


def hold_out(
    vectors: Vectors,
    labels: Labels,
    fold: Labels,
    k: int,
    mean: Vectors,
    centring: bool,
    shrinkage: float,
    general: Vectors | None,
    head: Head = "discriminant",
) -> HeldOut:
    """Score the rows of each fold, a number [n] for every row, by a fit of the others."""
    cosines, logits, distances = (np.zeros((len(labels), k)) for _ in range(3))
    everyday = None if general is None or not len(general) else np.zeros(len(labels))
    for number in range(int(fold.max()) + 1):
        out = fold == number
        rows, own = vectors[~out], labels[~out]
        fitted = fit_discriminant(rows, own, k, shrinkage)
        cosines[out] = centred_cosines(vectors[out], mean_centroids(rows, own, k), mean, centring)
        distances[out] = Distances(fitted.means, fitted.precision)(vectors[out])
        if head == "discriminant":
            # Half the distance is the negative log-likelihood up to a term that the experts share.
            logits[out] = -0.5 * distances[out]
        else:
            logits[out] = linear_logits(fit_head(head, rows, own, k, shrinkage), vectors[out])
        if everyday is not None and general is not None:
            to = everyday_distances(general, fitted.precision)
            if to is not None:
                everyday[out] = to(vectors[out])[:, 0]
    return HeldOut(cosines, logits, distances, everyday)


def linear_logits(head: LinearClassifier, vectors: Vectors) -> Scores:
    """[n, d] -> [n, k] in float64."""
    result: Scores = vectors.astype(np.float64) @ head.weight.astype(np.float64).T + head.bias
    return result


def centred_cosines(vectors: Vectors, means: Vectors, mean: Vectors, centring: bool) -> Scores:
    """Cosines [n, k] to rank by."""
    if centring:
        vectors, means = normalize_rows(vectors - mean), normalize_rows(means - mean)
    return CentroidIndex(means).similarities(vectors).astype(np.float64)


def cut_folds(labels: Labels, k: int, folds: int, seed: int) -> Labels:
    """A fold for every row [n]; each expert's rows are spread over the folds, so that none loses all."""
    generator = np.random.default_rng(seed)
    result = np.zeros(len(labels), np.int64)
    for expert in range(k):
        rows = np.flatnonzero(labels == expert)
        result[generator.permutation(rows)] = np.arange(len(rows)) % max(folds, 2)
    return result
