"""The map of the experts, against principal components from the covariance matrix."""

import numpy as np
import pytest

from loramux.router.encoder import normalize_rows
from loramux.router.projection import Projection


@pytest.mark.parametrize(("count", "dimension"), [(12, 192), (3, 7), (5, 4), (40, 3)])
def test_it_is_the_projection_on_the_two_first_principal_axes(count: int, dimension: int) -> None:
    centroids = normalize_rows(np.random.randn(count, dimension).astype(np.float32))
    texts = normalize_rows(np.random.randn(9, dimension).astype(np.float32))
    chart = Projection.of(centroids)
    rows = centroids.astype(np.float64)
    values, vectors = np.linalg.eigh(np.cov(rows.T, bias=True))
    axes = vectors[:, [-1, -2]]
    expected = (rows - rows.mean(0)) @ axes
    signs = np.where((expected * chart.positions).sum(0) < 0, -1, 1)
    np.testing.assert_allclose(chart.positions, expected * signs, atol=1e-6)
    np.testing.assert_allclose(chart.explained, values[[-1, -2]] / values.sum(), atol=1e-9)
    placed = [chart.place((rows @ text).tolist()) for text in texts.astype(np.float64)]
    np.testing.assert_allclose(placed, (texts - rows.mean(0)) @ axes * signs, atol=1e-6)
    farthest = np.abs(chart.positions).argmax(axis=0)
    assert (chart.positions[farthest, [0, 1]] > 0).all()


@pytest.mark.parametrize("rows", [[[1, 0, 0]], [[1, 0, 0], [1, 0, 0]], [[1, 0], [0, 1]], [[1], [1], [-1]]])
def test_axes_that_do_not_exist_are_zero(rows: list[list[float]]) -> None:
    centroids = np.array(rows, np.float32)
    chart = Projection.of(centroids)
    assert chart.positions.shape == (len(rows), 2)
    assert np.isfinite(chart.positions).all()
    assert not chart.positions[:, 1].any()
    assert chart.explained[1] == 0
    similarities = (centroids @ centroids[0]).tolist()
    np.testing.assert_allclose(chart.place(similarities), chart.positions[0], atol=1e-6)
