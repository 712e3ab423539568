"""Centroid search: every similarity of every query, the same alone and in a batch."""

import numpy as np
import pytest

from loramux.router.encoder import normalize_rows
from loramux.router.errors import RouterError
from loramux.router.index import CentroidIndex


def unit(rows: int, dimension: int, seed: int) -> np.ndarray:
    return normalize_rows(np.random.default_rng(seed).normal(size=(rows, dimension)).astype(np.float32))


@pytest.mark.parametrize(("rows", "count", "dimension"), [(1, 1, 1), (7, 3, 5), (50, 16, 384), (33, 40, 24)])
def test_equals_float64_inner_products(rows: int, count: int, dimension: int) -> None:
    queries, centroids = unit(rows, dimension, 1), unit(count, dimension, 2)
    got = CentroidIndex(centroids).similarities(queries)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, queries.astype(np.float64) @ centroids.astype(np.float64).T, atol=1e-6)


def test_a_batch_gives_the_bits_of_single_queries() -> None:
    queries, index = unit(75, 192, 3), CentroidIndex(unit(12, 192, 4))
    batch = index.similarities(queries)
    single = np.concatenate([index.similarities(queries[row : row + 1]) for row in range(75)])
    assert np.array_equal(batch, single)


def test_no_queries_and_a_zero_query() -> None:
    index = CentroidIndex(unit(4, 6, 5))
    assert index.similarities(np.zeros((0, 6), np.float32)).shape == (0, 4)
    assert not index.similarities(np.zeros((1, 6), np.float32)).any()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda rows: rows * 2, "length 2"),
        (lambda rows: rows * np.nan, "NaN"),
        (lambda rows: rows[:0], "matrix"),
        (lambda rows: rows[0], "matrix"),
    ],
)
def test_bad_centroids_are_refused(change: object, match: str) -> None:
    with pytest.raises(RouterError, match=match):
        CentroidIndex(change(unit(4, 6, 6)))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("query", "match"),
    [
        (np.full((1, 6), np.nan), "NaN"),
        (np.ones((1, 6)), "not normalised"),
        (np.ones((1, 5)), "dimension 6"),
        (np.ones(6), "dimension 6"),
    ],
)
def test_bad_queries_are_refused(query: np.ndarray, match: str) -> None:
    with pytest.raises(RouterError, match=match):
        CentroidIndex(unit(4, 6, 7)).similarities(query.astype(np.float32))
