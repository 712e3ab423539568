"""The three policies against their definitions, their invariants, and the degenerate cases."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from loramux.router.errors import RouterError
from loramux.router.policy import POLICIES, Policy, blend_weights, top_m

SCORES = hnp.arrays(np.float64, st.integers(1, 20), elements=st.floats(-1, 1))
POSITIVE = hnp.arrays(np.float64, st.integers(2, 20), elements=st.floats(0.01, 1), unique=True)
MANY = st.integers(1, 25)


@given(SCORES, MANY, st.sampled_from(POLICIES), st.floats(1e-4, 1e4))
def test_weights_are_ordered_finite_and_at_most_m(
    scores: np.ndarray, m: int, policy: Policy, temperature: float
) -> None:
    chosen, weights = blend_weights(scores, m, policy, temperature)
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
    chosen, weights = blend_weights(scores, m, "proportional", 1.0)
    np.testing.assert_allclose(weights, scores[chosen] / scores[chosen].sum())


@given(SCORES, MANY, st.floats(0.05, 10))
def test_softmax_ratios(scores: np.ndarray, m: int, temperature: float) -> None:
    chosen, weights = blend_weights(scores, m, "softmax", temperature)
    expected = np.exp((scores[chosen] - scores[chosen][0]) / temperature)
    np.testing.assert_allclose(weights / weights[0], expected, rtol=1e-9)


@given(POSITIVE, MANY)
def test_hydra_is_zeroing_by_value_then_min_max(scores: np.ndarray, m: int) -> None:
    kept = np.where(scores >= np.sort(scores)[-min(m, len(scores))], scores, 0.0)
    span = kept.max() - kept.min()
    chosen, weights = blend_weights(scores, m, "hydra_minmax", 1.0)
    np.testing.assert_allclose(weights, (kept[chosen] - kept.min()) / span)


def test_hydra_gives_score_over_best_and_does_not_sum_to_one() -> None:
    chosen, weights = blend_weights(np.array([0.74, 0.86, 0.80, 0.1]), 3, "hydra_minmax", 1.0)
    assert chosen.tolist() == [1, 2, 0]
    np.testing.assert_allclose(weights, [1, 0.80 / 0.86, 0.74 / 0.86])


def test_hydra_zeroes_the_worst_when_all_are_chosen() -> None:
    _, weights = blend_weights(np.array([0.9, 0.5, 0.7]), 3, "hydra_minmax", 1.0)
    np.testing.assert_allclose(weights, [1, 0.5, 0])


def test_hydra_with_all_scores_equal_does_not_divide_by_zero() -> None:
    np.testing.assert_array_equal(blend_weights(np.full(3, 0.4), 3, "hydra_minmax", 1.0)[1], [1, 1, 1])
    np.testing.assert_array_equal(blend_weights(np.full(5, 0.4), 2, "hydra_minmax", 1.0)[1], [1, 1])
    np.testing.assert_array_equal(blend_weights(np.array([0.4]), 3, "hydra_minmax", 1.0)[1], [1])


@pytest.mark.parametrize("policy", ["proportional", "hydra_minmax"])
def test_without_a_positive_score_the_best_alone_counts(policy: Policy) -> None:
    chosen, weights = blend_weights(np.array([-0.5, -0.1, -0.3]), 2, policy, 1.0)
    assert chosen.tolist() == [1, 2]
    np.testing.assert_array_equal(weights, [1, 0])
    np.testing.assert_array_equal(blend_weights(np.zeros(3), 3, policy, 1.0)[1], [1, 0, 0])


@pytest.mark.parametrize("policy", ["proportional", "hydra_minmax"])
def test_a_negative_score_counts_as_zero(policy: Policy) -> None:
    _, weights = blend_weights(np.array([0.5, -0.2, -0.9]), 2, policy, 1.0)
    np.testing.assert_array_equal(weights, [1, 0])


def test_ties_are_cut_in_expert_order() -> None:
    scores = np.array([0.2, 0.7, 0.7, 0.7, 0.1])
    for _ in range(5):
        assert top_m(scores, 2).tolist() == [1, 2]


@pytest.mark.parametrize(
    "scores", [np.array([0.1, np.nan]), np.array([np.inf]), np.zeros(0), np.zeros((2, 2))]
)
def test_scores_that_are_no_scores_are_refused(scores: np.ndarray) -> None:
    with pytest.raises(RouterError):
        blend_weights(scores, 1, "softmax", 1.0)


def test_the_smallest_temperature_does_not_overflow() -> None:
    _, weights = blend_weights(np.array([1.0, -1.0]), 2, "softmax", 1e-4)
    np.testing.assert_array_equal(weights, [1, 0])
