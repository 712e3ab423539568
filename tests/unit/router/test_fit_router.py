"""Fitting a whole router on texts of four topics, adding and removing experts, and what it generalises to."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loramux.router.decision import STRATEGIES, RoutingOptions
from loramux.router.encoder import Encoder, EncoderSpec, normalize_rows
from loramux.router.errors import RouterError
from loramux.router.fit.discriminant import fit_discriminant
from loramux.router.fit.general_texts import GENERAL_TEXTS, general_vectors
from loramux.router.fit.router import RouterFitOptions, add_expert, fit_router, remove_expert
from loramux.router.header import read_header
from loramux.router.router import Router, Vectors
from loramux.router.state import RouterState
from loramux.router.store import load_state, save_router
from tests.unit.router.kit import TOPICS, topic_pairs, write_static_encoder

EXPERTS = list(TOPICS)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    pairs, _ = topic_pairs(400, seed=1)
    folder = write_static_encoder(
        tmp_path_factory.mktemp("encoder") / "static", [text for text, _ in pairs], dimension=48
    )
    return Encoder.load(folder)


def fitted(encoder: Encoder, topics: int = 4, **options: object) -> RouterState:
    pairs, labels = topic_pairs(400, seed=1)
    keep = labels < topics
    vectors = encoder.encode([text for text, _ in pairs]).vectors
    chosen = RouterFitOptions(**options)  # type: ignore[arg-type]
    return fit_router(vectors[keep], labels[keep], EXPERTS[:topics], encoder.spec, chosen)


@pytest.fixture(scope="module")
def state(encoder: Encoder) -> RouterState:
    return fitted(encoder)


def right(router: Router, strategy: str, seed: int = 99) -> float:
    pairs, labels = topic_pairs(200, seed=seed)
    decisions = router.decide([text for text, _ in pairs], RoutingOptions(strategy=strategy, threshold=-1.0))  # type: ignore[arg-type]
    right = [EXPERTS[n] == d.candidates[0].id for n, d in zip(labels, decisions, strict=True)]
    return sum(right) / len(right)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_new_texts_find_their_topic(encoder: Encoder, state: RouterState, strategy: str) -> None:
    assert right(Router(state, encoder), strategy) >= 0.85


def test_typos_case_and_other_languages_still_decide(encoder: Encoder, state: RouterState) -> None:
    router = Router(state, encoder)
    texts = [
        "ANCHOR the VESSEL sailor dock",
        "anchr the vesel sailor rudder keel",
    ]
    found = router.decide(texts, RoutingOptions(threshold=-1.0))
    assert [decision.candidates[0].id for decision in found] == ["harbour", "harbour"]
    for decision in router.decide(
        ["今天天气怎么样", "Où est l'anchor?", "x", "a" * 100_000], RoutingOptions(threshold=-1.0)
    ):
        assert sum(expert.weight for expert in decision.experts) == pytest.approx(1)
    for decision in router.decide(["🚢", "\u200b", "\u0000", "?! …"], RoutingOptions(threshold=-1.0)):
        assert decision.fallback


def test_few_held_out_texts_fall_below_the_threshold(encoder: Encoder) -> None:
    router = Router(fitted(encoder, rejected=0.05), encoder)
    pairs, _ = topic_pairs(400, seed=55)
    for strategy in STRATEGIES:
        decisions = router.decide([text for text, _ in pairs], RoutingOptions(strategy=strategy))
        assert np.mean([decision.fallback for decision in decisions]) < 0.2


def test_fitting_is_deterministic_and_follows_the_seed(encoder: Encoder, state: RouterState) -> None:
    again, other = fitted(encoder), fitted(encoder, seed=5)
    np.testing.assert_array_equal(again.centroids, state.centroids)
    assert again.classifier is not None
    assert state.classifier is not None
    np.testing.assert_array_equal(again.classifier.weight, state.classifier.weight)
    assert dict(again.calibration) == dict(state.calibration)
    assert dict(other.calibration) != dict(state.calibration)


def test_centring_switches_itself_on_for_crowded_cosines(encoder: Encoder) -> None:
    generator = np.random.default_rng(6)
    labels = generator.integers(0, 4, 400)
    spread = normalize_rows((np.eye(48)[labels] + generator.normal(size=(400, 48)) * 0.7).astype(np.float32))
    assert not fit_router(spread, labels, EXPERTS, encoder.spec).centring
    crowded = normalize_rows(spread + 2 * np.eye(48, dtype=np.float32)[47])
    assert (crowded @ crowded.T).mean() > 0.7
    centred = fit_router(crowded, labels, EXPERTS, encoder.spec)
    assert centred.centring
    plain = fit_router(crowded, labels, EXPERTS, encoder.spec, RouterFitOptions(centring=False))
    # Centring spreads the scores, so the same certainty needs a less extreme temperature.
    assert centred.calibration["similarity"].temperature > plain.calibration["similarity"].temperature


def test_a_learned_hybrid_weight_is_stored(encoder: Encoder) -> None:
    weight = fitted(encoder, hybrid_weight=None).hybrid_weight
    assert 0 <= weight <= 1
    assert round(weight * 20) == pytest.approx(weight * 20)


def test_an_added_expert_is_found_and_the_others_stay(encoder: Encoder, state: RouterState) -> None:
    three = fitted(encoder, topics=3)
    pairs, labels = topic_pairs(200, seed=31)
    texts = [text for (text, _), label in zip(pairs, labels, strict=True) if label == 3]
    grown = add_expert(three, "orchestra", encoder.encode(texts).vectors)
    assert grown.experts == tuple(EXPERTS)
    np.testing.assert_array_equal(grown.centroids[:3], three.centroids)
    assert grown.samples is not None
    assert set(grown.samples.labels.tolist()) == {0, 1, 2, 3}
    for strategy in STRATEGIES:
        assert right(Router(grown, encoder), strategy) >= 0.8
    with pytest.raises(RouterError, match="already"):
        add_expert(grown, "orchestra", encoder.encode(texts).vectors)
    with pytest.raises(RouterError, match="no sample vectors"):
        add_expert(replace(three, samples=None), "orchestra", encoder.encode(texts).vectors)


def test_a_removed_expert_is_gone_and_the_others_stay(encoder: Encoder, state: RouterState) -> None:
    less = remove_expert(state, "garden")
    assert less.experts == ("kitchen", "harbour", "orchestra")
    assert less.samples is not None
    assert set(less.samples.labels.tolist()) == {0, 1, 2}
    [decision] = Router(less, encoder).decide(
        ["violin conductor tempo cello"], RoutingOptions(threshold=-1.0)
    )
    assert decision.candidates[0].id == "orchestra"
    with pytest.raises(RouterError, match="cellar"):
        remove_expert(less, "cellar")
    with pytest.raises(RouterError, match="last"):
        remove_expert(remove_expert(remove_expert(less, "kitchen"), "harbour"), "orchestra")


def test_an_expert_with_one_row_cannot_be_fitted(encoder: Encoder) -> None:
    vectors = encoder.encode(["onion", "garlic", "tide"]).vectors
    with pytest.raises(RouterError, match=r"at least 2 rows; got \[2, 1\]"):
        fit_router(vectors, np.array([0, 0, 1]), EXPERTS[:2], encoder.spec)


def test_the_head_is_the_discriminant_of_a_shared_covariance() -> None:
    generator = np.random.default_rng(3)
    labels = np.arange(300) % 3
    vectors = normalize_rows((np.eye(10)[labels] + generator.normal(size=(300, 10))).astype(np.float32))
    fitted = fit_discriminant(vectors, labels, 3, shrinkage=0.25)
    means = np.stack([vectors[labels == number].astype(np.float64).mean(axis=0) for number in range(3)])
    rest = vectors - means[labels]
    covariance = sum(np.outer(row, row) for row in rest) / 297
    shrunk = 0.75 * covariance + 0.25 * np.trace(covariance) / 10 * np.eye(10)
    np.testing.assert_allclose(fitted.precision @ shrunk, np.eye(10), atol=1e-4)
    densities = np.stack(
        [[-0.5 * (row - mean) @ np.linalg.solve(shrunk, row - mean) for mean in means] for row in vectors]
    )
    expected = np.exp(densities) / np.exp(densities).sum(axis=1, keepdims=True)
    head = fitted.head()
    got = head.probabilities([""] * 300, vectors)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    cooler = head.cooled(2.0).probabilities([""] * 300, vectors).astype(np.float64)
    sharp = got.astype(np.float64)
    np.testing.assert_allclose(cooler, np.sqrt(sharp) / np.sqrt(sharp).sum(axis=1, keepdims=True), atol=1e-5)
    with pytest.raises(RouterError, match="needs rows for each"):
        fit_discriminant(vectors, labels, 4, shrinkage=0.5)
    with pytest.raises(RouterError, match="positive"):
        head.cooled(0.0)


def test_few_rows_that_separate_perfectly_once_ended_in_certainty() -> None:
    generator = np.random.default_rng(4)
    labels = np.arange(60) % 3
    vectors = normalize_rows(
        (np.eye(32)[labels] * 3 + generator.normal(size=(60, 32)) * 0.2).astype(np.float32)
    )
    spec = EncoderSpec("test", "", "mean", True, 32, 64)
    state = fit_router(vectors, labels, EXPERTS[:3], spec)
    assert state.classifier is not None
    probabilities = state.classifier.probabilities([""] * 60, vectors)
    assert (probabilities.argmax(axis=1) == labels).all()
    assert 0.9 < probabilities.max() < 1 - 1e-4
    for calibration in state.calibration.values():
        assert calibration.temperature > 5e-3


def test_what_is_foreign_to_the_pool_falls_back_and_its_own_does_not(encoder: Encoder) -> None:
    """Every choice of three topics of four: the fourth's texts are foreign."""
    pairs, labels = topic_pairs(400, seed=1)
    fresh, topics = topic_pairs(400, seed=77)
    vectors = encoder.encode([text for text, _ in pairs]).vectors
    for gone in range(4):
        keep = labels != gone
        numbers = labels[keep] - (labels[keep] > gone)
        names = [name for number, name in enumerate(EXPERTS) if number != gone]
        router = Router(fit_router(vectors[keep], numbers, names, encoder.spec), encoder)
        for strategy in ("classifier", "hybrid"):
            decisions = router.decide([text for text, _ in fresh], RoutingOptions(strategy=strategy))
            fell = np.array([decision.fallback for decision in decisions])
            assert fell[topics != gone].mean() < 0.12
            assert fell[topics == gone].mean() > 0.4
            best = np.array([decision.candidates[0].score for decision in decisions])
            own, foreign = best[topics != gone], best[topics == gone]
            assert (own[:, None] > foreign[None, :]).mean() > 0.85  # the area under the ROC curve


def test_probabilities_leave_room_for_none_of_these(encoder: Encoder, state: RouterState) -> None:
    router = Router(state, encoder)
    texts = ["anchor mast sailor", "quantum zebra helicopter 4f6e65"]
    rows = router.probabilities(texts, encoder.encode(texts).vectors)
    bare = Router(replace(state, familiarity=None), encoder)
    plain = bare.probabilities(texts, encoder.encode(texts).vectors)
    assert rows is not None
    assert plain is not None
    np.testing.assert_allclose(plain.sum(axis=1), 1, atol=1e-6)
    assert rows[0].sum() > 0.8
    assert rows[1].sum() < 0.5


def test_everyday_texts_count_as_foreign_and_stay_so(encoder: Encoder, tmp_path: Path) -> None:
    pairs, labels = topic_pairs(400, seed=1)
    fresh, topics = topic_pairs(200, seed=77)
    vectors = encoder.encode([text for text, _ in pairs]).vectors
    new = encoder.encode([text for text, _ in fresh]).vectors
    general = new[topics == 3]  # what a pool of the first three topics is not for
    keep = labels < 3
    without = fit_router(vectors[keep], labels[keep], EXPERTS[:3], encoder.spec)
    state = fit_router(vectors[keep], labels[keep], EXPERTS[:3], encoder.spec, general=general)
    unseen = vectors[labels == 3]

    def known(one: RouterState, texts: Vectors) -> float:
        assert one.familiarity is not None
        return float(one.familiarity.probability(texts).mean())

    assert known(state, unseen) < 0.6 * known(without, unseen)
    assert known(state, new[topics < 3]) > 0.85
    save_router(state, tmp_path, encoder_path=None)
    assert read_header(tmp_path / "router.json").general
    again = load_state(tmp_path)
    assert known(again, unseen) == known(state, unseen)
    # Who comes later is held against the same texts.
    grown = add_expert(again, "new", vectors[labels == 3])
    assert grown.familiarity is not None
    np.testing.assert_array_equal(grown.familiarity.general, general)
    assert known(remove_expert(again, EXPERTS[0]), unseen) <= known(again, unseen)


def test_one_expert_is_told_from_everyday_texts(encoder: Encoder) -> None:
    pairs, labels = topic_pairs(400, seed=1)
    vectors = encoder.encode([text for text, _ in pairs]).vectors
    own, general, unseen = vectors[labels == 0], vectors[labels == 1][:50], vectors[labels == 1][50:]
    state = fit_router(own, np.zeros(len(own), np.int64), EXPERTS[:1], encoder.spec, general=general)
    assert state.familiarity is not None
    assert state.familiarity.probability(own).mean() > 0.85
    assert state.familiarity.probability(unseen).mean() < 0.3


def test_the_general_texts_are_texts_of_many_kinds(encoder: Encoder) -> None:
    assert len(set(GENERAL_TEXTS)) == len(GENERAL_TEXTS) >= 80
    assert general_vectors(encoder).shape == (len(GENERAL_TEXTS), encoder.spec.dimension)
