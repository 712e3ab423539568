"""Partition rows into clusters with FAISS k-means on unit vectors, and name what each cluster is about.

Rows are clustered on text and output together (the mean of the two unit vectors), because that is what an
expert will be trained on; routing sees only texts, so the centroids are the means of the *text* vectors.
No label of any kind is read.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..encoder import normalize_rows
from ..errors import RouterError

Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
_WORD = re.compile(r"[^\W\d_][\w'+#-]+")
# Words that never name a topic; they keep "was" and "what" out of the names of clusters of English questions.
_FUNCTION_WORDS = """
    a about after all also am an and any are as at be because been before being between but by can could did
    do does doing down each for from get had has have having he her here him his how i if in into is it its
    just know like many may me more most much must my no not of off on one only or other our out over own
    please same she should so some such than that the their them then there these they this those to too
    under up us use used using very was we were what when where which while who whom why will with would you
    your yours
"""


@dataclass(frozen=True, slots=True, eq=False)
class Clusters:
    """`labels` [n] in 0..k-1 (largest cluster first), `sizes` [k], mean cosine to the own centre."""

    labels: Labels
    sizes: Labels
    cohesion: float


def pair_vectors(text_vectors: Vectors, output_vectors: Vectors) -> Vectors:
    """[n, d] and [n, d] unit rows -> unit rows half way between; a zero output leaves the text's vector."""
    if text_vectors.shape != output_vectors.shape:
        raise RouterError(f"texts {text_vectors.shape} and outputs {output_vectors.shape} differ in shape")
    return normalize_rows(text_vectors + output_vectors)


def kmeans(
    vectors: Vectors,
    k: int,
    *,
    seed: int = 0,
    restarts: int = 5,
    iterations: int = 30,
    min_size: int = 1,
) -> Clusters:
    """Spherical k-means (FAISS) on unit rows [n, d], best of `restarts` by the objective.

    A cluster smaller than `min_size` is dissolved: its centre is removed and its rows go to the nearest
    remaining centre, so fewer than k clusters may come back. The same input and seed give the same labels.
    Raises RouterError when k or the vectors are impossible.
    """
    import faiss

    rows = np.ascontiguousarray(vectors, np.float32)
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise RouterError("k-means needs a finite matrix [rows, dimension]")
    if not 1 <= k <= len(rows):
        raise RouterError(f"k-means needs 1 <= k <= {len(rows)} rows, got k = {k}")
    if min_size * k > len(rows):
        raise RouterError(f"{len(rows)} rows cannot fill {k} clusters of at least {min_size}")
    machine = faiss.Kmeans(
        rows.shape[1],
        k,
        niter=iterations,
        nredo=restarts,
        seed=seed + 1,  # FAISS reads seed 0 as "unset"
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=len(rows),
    )
    machine.train(rows)
    centres = normalize_rows(np.asarray(machine.centroids))
    for _ in range(k):
        labels, cosines = _assign(rows, centres)
        sizes = np.bincount(labels, minlength=len(centres))
        smallest = int(sizes.argmin())
        if sizes[smallest] >= min_size:
            break
        centres = np.delete(centres, smallest, axis=0)
    order = np.argsort(-sizes, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return Clusters(rank[labels], sizes[order], float(cosines.mean()))


def centroids(text_vectors: Vectors, labels: Labels, k: int) -> Vectors:
    """Unit mean of each cluster's text vectors, [k, d]. Raises RouterError for an empty or zero cluster."""
    sums = np.zeros((k, text_vectors.shape[1]), np.float64)
    np.add.at(sums, labels, text_vectors.astype(np.float64))
    norms = np.linalg.norm(sums, axis=1)
    if (norms == 0).any():
        raise RouterError(f"cluster {int(norms.argmin())} has no rows, or its texts cancel out")
    unit: Vectors = (sums / norms[:, None]).astype(np.float32)
    return unit


def top_terms(texts: Sequence[str], labels: Labels, k: int, count: int = 8) -> list[list[str]]:
    """The words that set each cluster apart: class-based tf-idf (Grootendorst 2022, BERTopic, eq. 2).

    Counts texts that hold a word, not occurrences, so that one long text cannot name a cluster.
    """
    ignored = frozenset(_FUNCTION_WORDS.split())
    per_cluster: list[Counter[str]] = [Counter() for _ in range(k)]
    for text, label in zip(texts, labels, strict=True):
        per_cluster[label].update(set(_WORD.findall(text.lower())) - ignored)
    total: Counter[str] = Counter()
    for words in per_cluster:
        total.update(words)
    # Sorted, so that words of equal score come in the same order in every process.
    vocabulary = sorted(word for word, seen in total.items() if seen >= min(3, len(texts)))
    if not vocabulary:
        return [[] for _ in range(k)]
    table = np.array([[words[word] for word in vocabulary] for words in per_cluster], np.float64)
    size = np.maximum(np.bincount(labels, minlength=k)[:, None], 1)
    idf = np.log(1 + (table.sum() / k) / table.sum(axis=0))
    share = table / size
    lift = share / np.maximum(share.mean(axis=0), 1e-12)
    score = share * idf * np.log1p(lift)
    best = np.argsort(-score, axis=1, kind="stable")[:, :count]
    return [[vocabulary[column] for column in row if table[c, column] > 0] for c, row in enumerate(best)]


def _assign(rows: Vectors, centres: Vectors) -> tuple[Labels, Vectors]:
    labels = np.empty(len(rows), np.int64)
    cosines = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), 8192):
        similar = rows[start : start + 8192] @ centres.T
        labels[start : start + 8192] = similar.argmax(axis=1)
        cosines[start : start + 8192] = similar.max(axis=1)
    return labels, cosines
