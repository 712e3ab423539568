"""The three policies against their definitions, their invariants, and the degenerate cases."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from loramux.router.errors import RouterError
from loramux.router.policy import POLICIES, Policy, blend_weights, entropy, ranking

SCORES = hnp.arrays(np.float64, st.integers(1, 20), elements=st.floats(-1, 1))
POSITIVE = hnp.arrays(np.float64, st.integers(2, 20), elements=st.floats(0.01, 1), unique=True)
MANY = st.integers(1, 25)


def blended(scores: np.ndarray, m: int, policy: Policy, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Positions and weights of the chosen experts."""
    order = ranking(scores.tolist())
    weights = blend_weights(scores[order].tolist(), m, policy, temperature)
    return np.array(order[:m]), np.array(weights)


@given(SCORES, MANY, st.sampled_from(POLICIES), st.floats(1e-4, 1e4))
def test_weights_are_ordered_finite_and_at_most_m(
    scores: np.ndarray, m: int, policy: Policy, temperature: float
) -> None:
    chosen, weights = blended(scores, m, policy, temperature)
    assert len(chosen) == len(weights) == min(m, len(scores))
    assert len(set(chosen.tolist())) == len(chosen)
    assert np.isfinite(weights).all()
    assert (weights >= 0).all()
    assert (weights <= 1 + 1e-12).all()
    assert (np.diff(weights) <= 1e-12).all()
    assert weights[0] > 0
    assert scores[chosen].min() >= np.delete(scores, chosen).max(initial=-np.inf)
    if policy != "hydra_minmax":
        assert weights.sum() == pytest.approx(1)
    else:
        assert weights[0] == 1


@given(POSITIVE, MANY)
def test_proportional_is_the_share_of_the_score(scores: np.ndarray, m: int) -> None:
    chosen, weights = blended(scores, m, "proportional", 1.0)
    np.testing.assert_allclose(weights, scores[chosen] / scores[chosen].sum())


@given(SCORES, MANY, st.floats(0.05, 10))
def test_softmax_ratios(scores: np.ndarray, m: int, temperature: float) -> None:
    chosen, weights = blended(scores, m, "softmax", temperature)
    expected = np.exp((scores[chosen] - scores[chosen][0]) / temperature)
    np.testing.assert_allclose(weights / weights[0], expected, rtol=1e-9)


@given(POSITIVE, MANY)
def test_hydra_is_zeroing_by_value_then_min_max(scores: np.ndarray, m: int) -> None:
    kept = np.where(scores >= np.sort(scores)[-min(m, len(scores))], scores, 0.0)
    span = kept.max() - kept.min()
    chosen, weights = blended(scores, m, "hydra_minmax", 1.0)
    np.testing.assert_allclose(weights, (kept[chosen] - kept.min()) / span)


def test_hydra_gives_score_over_best_and_does_not_sum_to_one() -> None:
    chosen, weights = blended(np.array([0.74, 0.86, 0.80, 0.1]), 3, "hydra_minmax", 1.0)
    assert chosen.tolist() == [1, 2, 0]
    np.testing.assert_allclose(weights, [1, 0.80 / 0.86, 0.74 / 0.86])


def test_hydra_zeroes_the_worst_when_all_are_chosen() -> None:
    _, weights = blended(np.array([0.9, 0.5, 0.7]), 3, "hydra_minmax", 1.0)
    np.testing.assert_allclose(weights, [1, 0.5, 0])


def test_hydra_with_all_scores_equal_does_not_divide_by_zero() -> None:
    np.testing.assert_array_equal(blended(np.full(3, 0.4), 3, "hydra_minmax", 1.0)[1], [1, 1, 1])
    np.testing.assert_array_equal(blended(np.full(5, 0.4), 2, "hydra_minmax", 1.0)[1], [1, 1])
    np.testing.assert_array_equal(blended(np.array([0.4]), 3, "hydra_minmax", 1.0)[1], [1])


@pytest.mark.parametrize("policy", ["proportional", "hydra_minmax"])
def test_without_a_positive_score_the_best_alone_counts(policy: Policy) -> None:
    chosen, weights = blended(np.array([-0.5, -0.1, -0.3]), 2, policy, 1.0)
    assert chosen.tolist() == [1, 2]
    np.testing.assert_array_equal(weights, [1, 0])
    np.testing.assert_array_equal(blended(np.zeros(3), 3, policy, 1.0)[1], [1, 0, 0])


@pytest.mark.parametrize("policy", ["proportional", "hydra_minmax"])
def test_a_negative_score_counts_as_zero(policy: Policy) -> None:
    _, weights = blended(np.array([0.5, -0.2, -0.9]), 2, policy, 1.0)
    np.testing.assert_array_equal(weights, [1, 0])


def test_ties_are_cut_in_expert_order() -> None:
    scores = np.array([0.2, 0.7, 0.7, 0.7, 0.1])
    for _ in range(5):
        assert ranking(scores.tolist()) == [1, 2, 3, 0, 4]


@pytest.mark.parametrize("scores", [[0.1, math.nan], [math.inf], []])
def test_scores_that_are_no_scores_are_refused(scores: list[float]) -> None:
    with pytest.raises(RouterError, match="finite"):
        ranking(scores)


@given(SCORES, st.floats(1e-4, 1e4))
def test_entropy_is_that_of_the_softmax(scores: np.ndarray, temperature: float) -> None:
    logits = np.sort(scores)[::-1] / temperature
    spread = np.exp(logits - logits[0]) / np.exp(logits - logits[0]).sum()
    expected = -sum(p * math.log(p) for p in spread if p > 0)
    assert entropy(np.sort(scores)[::-1].tolist(), temperature) == pytest.approx(expected, abs=1e-9)


def test_the_smallest_temperature_does_not_overflow() -> None:
    _, weights = blended(np.array([1.0, -1.0]), 2, "softmax", 1e-4)
    np.testing.assert_array_equal(weights, [1, 0])
