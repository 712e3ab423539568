"""Temperatures, thresholds and the hybrid weight against brute force."""

import numpy as np
import pytest

from loramux.router.errors import RouterError
from loramux.router.fit.calibrate import (
    calibrate,
    fit_hybrid_weight,
    fit_temperature,
    fit_threshold,
    negative_log_likelihood,
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
