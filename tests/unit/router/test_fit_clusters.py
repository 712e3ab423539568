"""k-means, centroids and names of clusters."""

import numpy as np
import pytest

from loramux.router.encoder import normalize_rows
from loramux.router.errors import RouterError
from loramux.router.fit.clusters import centroids, kmeans, pair_vectors, top_terms
from tests.unit.router.kit import TOPICS, topic_pairs


def blobs(sizes: list[int], seed: int, spread: float = 0.15) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around random directions, shuffled, with the direction's number."""
    generator = np.random.default_rng(seed)
    centres = np.linalg.qr(generator.normal(size=(32, len(sizes))))[0].T
    labels = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    noise = generator.normal(size=(len(labels), 32)) * spread
    return normalize_rows((centres[labels] + noise).astype(np.float32)), labels


def test_separate_groups_are_found_and_ordered_by_size() -> None:
    vectors, truth = blobs([40, 160, 80, 120], seed=1)
    found = kmeans(vectors, 4, seed=3)
    assert found.sizes.tolist() == [160, 120, 80, 40]
    for cluster in range(4):
        assert len(set(truth[found.labels == cluster])) == 1
    assert 0.5 < found.cohesion <= 1


def test_the_same_seed_gives_the_same_clusters() -> None:
    vectors, _ = blobs([60, 60, 60], seed=4, spread=0.5)
    first, second = kmeans(vectors, 5, seed=9), kmeans(vectors, 5, seed=9)
    assert np.array_equal(first.labels, second.labels)
    assert first.cohesion == second.cohesion


def test_small_clusters_are_dissolved_into_their_neighbours() -> None:
    vectors, _ = blobs([100, 100, 4], seed=5, spread=0.05)
    assert kmeans(vectors, 3, seed=0).sizes.tolist() == [100, 100, 4]
    found = kmeans(vectors, 3, seed=0, min_size=10)
    assert len(found.sizes) == 2
    assert found.sizes.sum() == len(found.labels) == 204
    assert set(found.labels.tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("k", "min_size", "match"), [(0, 1, "k = 0"), (11, 1, "k = 11"), (4, 3, "cannot fill")]
)
def test_impossible_requests_are_refused(k: int, min_size: int, match: str) -> None:
    with pytest.raises(RouterError, match=match):
        kmeans(blobs([10], seed=6)[0], k, min_size=min_size)


def test_vectors_that_are_not_finite_are_refused() -> None:
    with pytest.raises(RouterError, match="finite"):
        kmeans(np.full((5, 3), np.nan, np.float32), 2)


def test_pairs_lie_half_way_and_a_blank_output_changes_nothing() -> None:
    texts, outputs = np.eye(4, dtype=np.float32)[:3], np.eye(4, dtype=np.float32)[1:]
    outputs[2] = 0
    got = pair_vectors(texts, outputs)
    np.testing.assert_allclose(got[0], [0.5**0.5, 0.5**0.5, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(got[2], texts[2])
    with pytest.raises(RouterError, match="shape"):
        pair_vectors(texts, outputs[:2])


def test_centroids_are_unit_means_and_an_empty_cluster_is_an_error() -> None:
    vectors, labels = blobs([30, 20], seed=7)
    got = centroids(vectors, labels, 2)
    for cluster in range(2):
        mean = vectors[labels == cluster].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(got[cluster], mean / np.linalg.norm(mean), atol=1e-6)
    with pytest.raises(RouterError, match="cluster 2"):
        centroids(vectors, labels, 3)


def test_terms_name_the_topic_and_not_the_filler() -> None:
    pairs, labels = topic_pairs(400, seed=8)
    terms = top_terms([text for text, _ in pairs], labels, len(TOPICS), count=5)
    for words, found in zip(TOPICS.values(), terms, strict=True):
        assert len(found) == 5
        assert set(found) <= set(words)


def test_terms_of_texts_without_words() -> None:
    assert top_terms(["123", "!!"], np.array([0, 1]), 2) == [[], []]
    assert top_terms(["the and of"] * 5, np.zeros(5, np.int64), 1) == [[]]
