"""Everything a fitted router knows besides its encoder: what `store` writes and `fit` produces."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .classifier import LinearClassifier
from .decision import STRATEGIES, Strategy
from .encoder import EncoderSpec
from .errors import RouterError
from .familiarity import Familiarity

Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Softmax temperature and fallback threshold, on the score scale of one strategy."""

    temperature: float
    threshold: float


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """A few training vectors per expert [s, d] and their expert numbers [s]: what adding an expert needs."""

    vectors: Vectors
    labels: Labels


@dataclass(frozen=True, slots=True, eq=False)
class RouterState:
    """A fitted router.

    experts: ids in centroid order. centroids: unit rows [k, d]. corpus_mean: mean of the training texts' unit
    vectors [d], subtracted from both sides when `centring`. classifier: the linear head, or None (no
    classifier, or one kept in its own directory). hybrid_weight: the share of the cosine in the hybrid score.
    familiarity: what the probabilities are multiplied by, so that they leave room for "none of these"; None
    (routers of version 1) leaves them as they are.
    Raises RouterError when the parts do not fit together.
    """

    experts: tuple[str, ...]
    encoder: EncoderSpec
    centroids: Vectors
    corpus_mean: Vectors
    classifier: LinearClassifier | None
    calibration: Mapping[Strategy, Calibration]
    hybrid_weight: float = 0.5
    centring: bool = False
    samples: Samples | None = None
    familiarity: Familiarity | None = None

    def __post_init__(self) -> None:
        count, dimension = len(self.experts), self.encoder.dimension
        if not count or len(set(self.experts)) != count:
            raise RouterError("experts must be a non-empty list of different ids")
        _expect("centroids", self.centroids, (count, dimension))
        _expect("corpus_mean", self.corpus_mean, (dimension,))
        if self.classifier is not None:
            _expect("classifier.weight", self.classifier.weight, (count, dimension))
        if self.familiarity is not None:
            _expect("familiarity.means", self.familiarity.means, (count, dimension))
        if self.samples is not None:
            _expect("samples.vectors", self.samples.vectors, (len(self.samples.labels), dimension))
            labels = self.samples.labels
            if len(labels) and not (labels.min() >= 0 and labels.max() < count):
                raise RouterError(f"samples.labels must be from 0 to {count - 1}")
        if not 0 <= self.hybrid_weight <= 1:
            raise RouterError(f"hybrid_weight must be from 0 to 1, got {self.hybrid_weight}")
        missing = [strategy for strategy in STRATEGIES if strategy not in self.calibration]
        if missing:
            raise RouterError(f"calibration is missing for {', '.join(missing)}")


def _expect(name: str, array: Vectors, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise RouterError(f"{name} has shape {array.shape}, expected {shape}")
    if not np.isfinite(array).all():
        raise RouterError(f"{name} holds NaN or infinity")
