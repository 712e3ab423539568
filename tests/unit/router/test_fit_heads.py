"""Heads against plain formulas, thresholds from a rate of false routing, figures, a fine-tuned encoder."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertModel

from loramux.router.classifier import TransformerClassifier, softmax
from loramux.router.encoder import Encoder, normalize_rows
from loramux.router.errors import RouterError, RouterFileError
from loramux.router.fit.calibrate import fit_foreign_threshold
from loramux.router.fit.figures import Figures
from loramux.router.fit.heads import HEADS, LOGISTIC_C, fit_head
from loramux.router.fit.router import Outside, RouterFitOptions, fit_with_figures
from loramux.router.fit.transformer import TransformerFitOptions, fit_transformer
from loramux.router.router import Router
from loramux.router.state import Calibration
from tests.unit.router.bert import config, wordpiece
from tests.unit.router.kit import TOPICS, topic_pairs, write_static_encoder

EXPERTS = list(TOPICS)


def clouds(rows: int, k: int, dimension: int, spread: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around k random centres, and which each is around."""
    generator = np.random.default_rng(np.random.randint(2**31))
    centres = normalize_rows(generator.normal(size=(k, dimension)).astype(np.float32))
    labels = np.concatenate([np.arange(k), generator.integers(0, k, rows - k)])
    noise = spread * generator.normal(size=(rows, dimension)) / np.sqrt(dimension)
    return normalize_rows((centres[labels] + noise).astype(np.float32)), labels


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("kind", HEADS)
def test_every_head_tells_clouds_apart_that_it_has_not_seen(kind: str, k: int) -> None:
    vectors, labels = clouds(120 + k, k, 17, spread=0.3)
    head = fit_head(kind, vectors[::2], labels[::2], k, 0.2)  # type: ignore[arg-type]
    found = head.probabilities([""] * len(vectors[1::2]), vectors[1::2])
    assert found.shape == (len(vectors[1::2]), k)
    assert (found.argmax(axis=1) == labels[1::2]).mean() > 0.9


def test_ridge_is_least_squares_with_a_penalty_on_the_weights_alone() -> None:
    vectors, labels = clouds(60, 3, 11)
    head = fit_head("ridge", vectors, labels, 3, 0.3)
    rows, targets = vectors.astype(np.float64), np.eye(3)[labels]
    centred = rows - rows.mean(axis=0)
    penalty = 0.3 * (centred**2).sum() / 11
    # The penalty as rows of their own: plain least squares then has the same solution.
    design = np.concatenate(
        [np.hstack([rows, np.ones((60, 1))]), np.hstack([np.sqrt(penalty) * np.eye(11), np.zeros((11, 1))])]
    )
    wanted, *_ = np.linalg.lstsq(design, np.concatenate([targets, np.zeros((11, 3))]), rcond=None)
    np.testing.assert_allclose(head.weight, wanted[:11].T, atol=1e-5)
    np.testing.assert_allclose(head.bias, wanted[11], atol=1e-5)


@pytest.mark.parametrize("k", [2, 4])
def test_the_logistic_head_has_no_gradient_left(k: int) -> None:
    vectors, labels = clouds(80, k, 9, spread=1.5)
    head = fit_head("logistic", vectors, labels, k, 0.2)
    rows = vectors.astype(np.float64)
    odds = softmax(rows @ head.weight.T.astype(np.float64) + head.bias).astype(np.float64)
    # With two classes the penalty of a symmetric pair of rows is that of their difference, halved.
    penalty = head.weight * (2 if k == 2 else 1)
    gradient = LOGISTIC_C * (odds - np.eye(k)[labels]).T @ rows + penalty
    assert np.abs(gradient).max() < 0.02 * np.abs(LOGISTIC_C * np.eye(k)[labels].T @ rows).max()


def test_a_class_without_rows_is_refused() -> None:
    vectors, labels = clouds(20, 3, 5)
    with pytest.raises(RouterError, match="rows for each of 4 experts"):
        fit_head("ridge", vectors, labels, 4, 0.2)


@pytest.mark.parametrize("passed", [0.0, 0.05, 0.3])
def test_no_lower_threshold_keeps_the_rate_of_false_routing(passed: float) -> None:
    foreign = np.random.default_rng().uniform(-0.5, 0.9, size=(211, 4))
    threshold = fit_foreign_threshold(foreign, passed)
    best = foreign.max(axis=1)
    assert (best >= threshold).mean() <= passed
    next_lower = best[best < threshold].max()
    assert (best >= next_lower).mean() > passed


def test_figures_are_those_of_their_definitions() -> None:
    scores = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.55, 0.45]])
    labels = np.array([0, 0, 1, 1])
    found = Figures.of("hybrid", scores, labels, Calibration(0.5, 0.58), np.array([[0.7, 0.1], [0.2, 0.3]]))
    odds = np.exp(scores / 0.5) / np.exp(scores / 0.5).sum(axis=1, keepdims=True)
    assert found.accuracy == 0.75
    assert found.nll == pytest.approx(-np.log(odds[np.arange(4), labels]).mean())
    confident, right = odds.max(axis=1), np.array([1, 1, 1, 0])
    bins = (confident * 10).astype(int)
    gaps = [abs((right - confident)[bins == n].sum()) for n in set(bins)]
    assert found.ece == pytest.approx(sum(gaps) / 4)
    assert (found.lost, found.false_routing, found.rows) == (0.25, 0.5, 4)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    texts = [text for text, _ in topic_pairs(400, seed=1)[0]]
    return Encoder.load(write_static_encoder(tmp_path_factory.mktemp("e") / "static", texts, dimension=48))


def test_a_fit_keeps_the_rate_of_false_routing_on_its_foreign_texts_and_says_so(encoder: Encoder) -> None:
    pairs, labels = topic_pairs(400, seed=1)
    vectors = encoder.encode([text for text, _ in pairs]).vectors
    own, foreign = labels < 3, vectors[labels == 3]
    for head in HEADS:
        options = RouterFitOptions(classifier=head, false_routing=0.1, hybrid_weight=None)
        fit = fit_with_figures(vectors[own], labels[own], EXPERTS[:3], encoder.spec, options, foreign=foreign)
        router = Router(fit.state, encoder)
        texts = [pair[0] for pair, label in zip(pairs, labels, strict=True) if label == 3]
        routed = [not decision.fallback for decision in router.decide(texts)]
        assert np.mean(routed) == pytest.approx(fit.figures["hybrid"].false_routing, abs=0.011)
        assert 0 < fit.figures["hybrid"].false_routing <= 0.1  # type: ignore[operator]
        assert fit.figures["classifier"].accuracy > 0.9


def test_a_pool_of_one_needs_foreign_texts_for_a_rate(encoder: Encoder) -> None:
    vectors = encoder.encode([text for text, _ in topic_pairs(40, seed=1)[0]]).vectors
    with pytest.raises(RouterError, match="needs foreign texts"):
        fit_with_figures(
            vectors, np.zeros(40, np.int64), ["one"], encoder.spec, RouterFitOptions(false_routing=0.1)
        )


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(1)
    BertModel(config(layers=1, hidden=48)).save_pretrained(folder)
    wordpiece().save_pretrained(folder)
    return folder


def test_a_fine_tuned_encoder_is_served_as_it_was_measured(
    bert: Path, encoder: Encoder, tmp_path: Path
) -> None:
    pairs, labels = topic_pairs(160, seed=1)
    texts, held = [text for text, _ in pairs], np.arange(0, 160, 5)
    options = TransformerFitOptions(epochs=12, rate=2e-3)
    found = fit_transformer(bert, texts, labels, held, EXPERTS, tmp_path / "c", options, prefix="query: ")
    served = TransformerClassifier.load(tmp_path / "c", EXPERTS, prefix="query: ")
    odds = served.probabilities([texts[n] for n in held], np.zeros((len(held), 1), np.float32))
    np.testing.assert_allclose(np.log(odds), found, atol=1e-4)
    assert (odds.argmax(axis=1) == labels[held]).mean() > 0.8
    vectors = encoder.encode(texts).vectors
    fit = fit_with_figures(vectors, labels, EXPERTS, encoder.spec, outside=Outside(held, found))
    assert fit.state.classifier is None
    figures = fit.figures["classifier"]
    assert figures.rows == len(held)
    router = Router(fit.state, encoder, served)
    assert router.decide([texts[0]])[0].candidates[0].id == EXPERTS[labels[0]]


def test_what_cannot_be_fine_tuned_is_refused(bert: Path, encoder: Encoder, tmp_path: Path) -> None:
    texts, labels = ["a", "b"], np.array([0, 1])
    with pytest.raises(RouterError, match="training rows of every expert"):
        fit_transformer(bert, texts, labels, np.array([0]), ["x", "y"], tmp_path / "c")
    static = write_static_encoder(tmp_path / "static", ["a b"])
    with pytest.raises(RouterFileError, match="nothing to fine-tune"):
        fit_transformer(
            static, [*texts, *texts], np.tile(labels, 2), np.array([0]), ["x", "y"], tmp_path / "c"
        )
    with pytest.raises(RouterError, match="must be positive"):
        TransformerFitOptions(rate=0.0)
