"""Pools of hundreds of experts: arrays and blocks give what lists and single products of float64 give."""

from itertools import pairwise

import numpy as np
import pytest

import loramux.router.router as routing
from loramux.router.classifier import LinearClassifier
from loramux.router.decision import STRATEGIES, Decision, RoutingOptions
from loramux.router.encoder import normalize_rows
from loramux.router.errors import RouterError
from loramux.router.familiarity import Distances, Familiarity, everyday_distances, familiar
from loramux.router.index import CentroidIndex
from loramux.router.policy import POLICIES, Policy
from loramux.router.products import FEW, products
from loramux.router.ranked import Ranked
from loramux.router.router import ScoreTable
from tests.unit.router.test_decision_numbers import random_case

COUNTS = [FEW + 1, 2003]


def unit(rows: int, dimension: int, generator: np.random.Generator) -> np.ndarray:
    return normalize_rows(generator.normal(size=(rows, dimension)).astype(np.float32))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dimension", [5, 192])
def test_similarities_are_those_of_float64_and_the_same_bits_in_any_batch(count: int, dimension: int) -> None:
    generator = np.random.default_rng()
    centroids, queries = unit(count, dimension, generator), unit(19, dimension, generator)
    index = CentroidIndex(centroids)
    batch = index.similarities(queries)
    np.testing.assert_allclose(batch, queries.astype(np.float64) @ centroids.T.astype(np.float64), atol=1e-6)
    for row in range(len(queries)):
        np.testing.assert_array_equal(index.similarities(queries[row : row + 1])[0], batch[row])
    assert index.similarities(queries[:0]).shape == (0, count)


def test_faiss_finds_the_same_first_ones() -> None:
    """The exact search over the same rows: no expert is passed over."""
    import faiss

    generator = np.random.default_rng()
    centroids, queries = unit(2000, 48, generator), unit(50, 48, generator)
    flat = faiss.IndexFlatIP(48)
    flat.add(centroids)
    _, places = flat.search(queries, 3)
    found = CentroidIndex(centroids).similarities(queries)
    for row, wanted in enumerate(places):
        best = np.sort(found[row])[::-1][:3]
        np.testing.assert_allclose(found[row][wanted], best, atol=1e-6)


@pytest.mark.parametrize("spread", [0.1, 3.0, 300.0])
def test_probabilities_are_those_of_float64_in_any_batch(spread: float) -> None:
    generator = np.random.default_rng()
    weight = (generator.normal(size=(1500, 24)) * spread).astype(np.float32)
    head = LinearClassifier(weight, generator.normal(size=1500).astype(np.float32))
    rows = unit(9, 24, generator)
    got = head.probabilities([""] * 9, rows)
    logits = rows.astype(np.float64) @ weight.T.astype(np.float64) + head.bias
    exact = np.exp(logits - logits.max(axis=1, keepdims=True))
    exact /= exact.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(got, exact, rtol=2e-7, atol=1e-12)
    for row in range(9):
        np.testing.assert_array_equal(head.probabilities([""], rows[row : row + 1])[0], got[row])


@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("general", [False, True])
def test_the_nearest_expert_is_as_far_as_the_nearest_of_all(scale: float, general: bool) -> None:
    generator = np.random.default_rng()
    mixing = generator.normal(size=(16, 16))
    precision = ((mixing @ mixing.T + np.eye(16)) * scale).astype(np.float32)
    means = (unit(900, 16, generator) * 0.7).astype(np.float32)
    means[300:600] = means[:300] + np.float32(1e-6)  # many that are almost equally near
    rows = np.concatenate([unit(20, 16, generator), unit(1, 16, generator) * 0])
    everyday = unit(30, 16, generator) if general else None
    known = Familiarity(means, precision, 10.0 * scale, 2.0 * scale, everyday)
    distances = Distances(means, precision)
    whole = distances(rows).min(axis=1)
    np.testing.assert_allclose(distances.nearest(rows), whole, rtol=1e-12, atol=1e-9 * scale)
    assert (distances.nearest(rows) >= 0).all()
    to = everyday_distances(everyday, precision)
    wanted = familiar(whole, None if to is None else to(rows)[:, 0], known.center, known.scale)
    np.testing.assert_allclose(known.probability(rows), wanted, rtol=1e-9, atol=1e-12)


def both_ways(
    monkeypatch: pytest.MonkeyPatch,
    table: ScoreTable,
    router: routing.Router,
    row: int,
    options: RoutingOptions,
) -> tuple[Decision, Decision]:
    """Of arrays, and of lists."""
    many = router.choose(table, row, options)
    with monkeypatch.context() as patch:
        patch.setattr(routing, "FEW", 10_000)
        few = router.choose(table, row, options)
    assert isinstance(many.candidates, Ranked)
    assert isinstance(few.candidates, tuple)
    return many, few


def same(many: Decision, few: Decision) -> None:
    for name in ("strategy", "fallback", "reason", "truncated", "margin", "blank", "threshold", "experts"):
        assert getattr(many, name) == getattr(few, name), name
    assert many.entropy == pytest.approx(few.entropy, abs=1e-9)
    assert tuple(many.candidates) == tuple(few.candidates)
    assert many.candidates == few.candidates
    assert len(many.candidates) == len(few.candidates)
    assert [many.candidates[n] for n in (0, -1)] == [few.candidates[n] for n in (0, -1)]
    assert many.candidates[80:90:3] == few.candidates[80:90:3]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_arrays_decide_what_lists_decide(
    monkeypatch: pytest.MonkeyPatch, strategy: str, policy: Policy, seed: int
) -> None:
    router, table = random_case(seed, 300)
    generator = np.random.default_rng(seed)
    for top_m, temperature, threshold in ((1, 1.0, -1.0), (3, 0.05, 0.3), (64, 1e-2, 0.0), (2, 1.0, 0.99)):
        options = RoutingOptions(strategy, top_m, policy, temperature, threshold)  # type: ignore[arg-type]
        for row in range(0, len(table), 9):
            many, few = both_ways(monkeypatch, table, router, row, options)
            same(many, few)
            served = {id: f"as {id}" if generator.random() < 0.1 else id for id in router.experts}
            for gone in generator.choice(router.experts, int(generator.integers(1, 299)), replace=False):
                del served[str(gone)]
            same(many.among(served), few.among(served))
            first = few.candidates[0].id
            same(*(one.among({id: id for id in router.experts if id != first}) for one in (many, few)))
            assert many.among({}).reason == few.among({}).reason
            assert len(many.among({}).candidates) == 0


def test_equal_scores_stay_in_the_order_of_the_pool() -> None:
    scores = np.zeros(500)
    scores[[7, 400]] = 1
    names = [f"e{n}" for n in range(500)]
    ranked = Ranked(names, scores.astype(np.float32), None, scores)
    assert [one.id for one in ranked[:5]] == ["e7", "e400", "e0", "e1", "e2"]
    assert all(int(a.id[1:]) < int(b.id[1:]) for a, b in pairwise(ranked[2:]))
    assert ranked[3].probability is None


def test_a_score_that_is_not_finite_is_refused() -> None:
    scores = np.zeros(300)
    scores[200] = np.nan
    with pytest.raises(RouterError, match="finite"):
        Ranked([""] * 300, scores.astype(np.float32), None, scores)


def test_blocks_cover_a_matrix_of_any_height() -> None:
    generator = np.random.default_rng()
    for height, width in ((1, 1), (1023, 700), (3, 200_000)):
        matrix, rows = generator.normal(size=(height, width)), generator.normal(size=(2, width))
        np.testing.assert_allclose(products(matrix, rows), rows @ matrix.T, rtol=1e-9, atol=1e-9)
