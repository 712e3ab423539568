"""Temperatures, thresholds and the hybrid weight against brute force."""

import numpy as np
import pytest

from loramux.router.errors import RouterError
from loramux.router.fit.calibrate import (
    calibrate,
    fit_curve,
    fit_hybrid_weight,
    fit_temperature,
    fit_threshold,
    negative_log_likelihood,
    platt_smoothing,
)


def noisy(rows: int, k: int, signal: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, k, rows)
    scores = generator.normal(size=(rows, k))
    scores[np.arange(rows), labels] += signal
    return scores, labels


@pytest.mark.parametrize(("signal", "scale"), [(1.0, 1.0), (2.5, 1.0), (1.0, 0.02), (0.3, 5.0)])
def test_the_temperature_is_the_best_on_a_fine_grid(signal: float, scale: float) -> None:
    scores, labels = noisy(400, 6, signal, seed=1)
    scores = scores * scale
    got = fit_temperature(scores, labels)
    grid = np.exp(np.linspace(np.log(1e-3), np.log(1e2), 4000))
    best = min(negative_log_likelihood(scores, labels, t) for t in grid)
    assert negative_log_likelihood(scores, labels, got) <= best + 1e-6


def test_nll_is_minus_the_mean_log_softmax() -> None:
    scores, labels = noisy(50, 4, 1.0, seed=2)
    powers = np.exp(scores / 0.7)
    expected = -np.log((powers / powers.sum(axis=1, keepdims=True))[np.arange(50), labels]).mean()
    assert negative_log_likelihood(scores, labels, 0.7) == pytest.approx(expected)


def test_temperatures_stay_in_range_for_perfect_and_useless_scores() -> None:
    perfect = np.eye(5)[np.arange(50) % 5]
    assert fit_temperature(perfect, np.arange(50) % 5) == pytest.approx(1e-3, rel=1e-2)
    useless = np.random.default_rng(3).normal(size=(50, 5))
    wrong = useless.argmin(axis=1)
    assert fit_temperature(useless, wrong) == pytest.approx(1e2, rel=1e-2)


def test_smoothed_targets_keep_perfect_scores_from_certainty() -> None:
    perfect, labels = np.eye(5)[np.arange(50) % 5], np.arange(50) % 5
    doubt = platt_smoothing(50)
    assert doubt == pytest.approx(1 / 52)
    temperature = fit_temperature(perfect, labels, doubt)
    # softmax(1 / t) of the own expert is then 1 - doubt.
    own = np.exp(1 / temperature) / (np.exp(1 / temperature) + 4)
    assert own == pytest.approx(1 - doubt, abs=1e-3)


def test_the_curve_is_the_best_logistic_of_a_fine_grid() -> None:
    generator = np.random.default_rng(8)
    own, foreign = generator.normal(10, 2, 500), generator.normal(18, 3, 500)

    def loss(center: float, scale: float) -> float:
        a, b = (own - center) / scale, (foreign - center) / scale
        doubt = platt_smoothing(500)  # log(1 + exp(a)) is -log of the curve, log(1 + exp(-a)) of the rest
        known = (1 - doubt) * np.logaddexp(0, a) + doubt * np.logaddexp(0, -a)
        other = (1 - doubt) * np.logaddexp(0, -b) + doubt * np.logaddexp(0, b)
        return float(0.8 * known.mean() + 0.2 * other.mean())

    center, scale = fit_curve(own, foreign, known_share=0.8)
    best = min(loss(c, s) for c in np.linspace(10, 20, 101) for s in np.linspace(0.2, 4, 77))
    assert loss(center, scale) <= best + 1e-3


def test_a_curve_without_foreign_texts_or_without_a_difference_lets_own_texts_through() -> None:
    own = np.random.default_rng(9).normal(10, 2, 400)
    for foreign in (np.zeros(0), own - 5, own):
        center, scale = fit_curve(own, foreign)
        assert (1 / (1 + np.exp((own - center) / scale)) > 0.5).mean() > 0.95


def test_the_threshold_rejects_the_asked_share() -> None:
    scores, labels = noisy(2000, 5, 0.2, seed=4)
    scores = np.tanh(scores / 4)
    threshold = fit_threshold(scores, 0.01)
    assert (scores.max(axis=1) < threshold).mean() == pytest.approx(0.01, abs=1e-3)
    assert fit_threshold(scores, 0.0) == pytest.approx(scores.max(axis=1).min())
    assert fit_threshold(scores * 100, 0.5) == 1.0
    assert calibrate(scores, labels, 0.01).threshold == threshold
    with pytest.raises(RouterError, match="rejected"):
        fit_threshold(scores, 1.0)


@pytest.mark.parametrize(("good", "expected"), [("cosine", 0.75), ("probability", 0.25)])
def test_the_hybrid_weight_leans_on_the_better_score(good: str, expected: float) -> None:
    strong, labels = noisy(600, 6, 3.0, seed=5)
    weak = np.random.default_rng(6).normal(size=strong.shape)
    pair = (strong, weak) if good == "cosine" else (weak, strong)
    fit = fit_hybrid_weight(*pair, labels)
    assert (fit.weight >= expected) == (good == "cosine")
    even = 0.5 * pair[0] + 0.5 * pair[1]
    assert fit.nll < negative_log_likelihood(even, labels, fit_temperature(even, labels))


def test_no_held_out_rows_is_an_error() -> None:
    with pytest.raises(RouterError, match="held-out"):
        fit_temperature(np.zeros((0, 3)), np.zeros(0, np.int64))
