"""Decisions: the report's worked example, strategies, fallback, centring, and what a batch may not change."""

import math
from dataclasses import replace

import numpy as np
import pytest

from loramux.router.classifier import LinearClassifier
from loramux.router.decision import MAX_TOP_M, STRATEGIES, RoutingOptions
from loramux.router.encoder import normalize_rows
from loramux.router.errors import RouterError, RoutingOptionsError
from loramux.router.policy import POLICIES
from loramux.router.router import Router
from tests.unit.router.kit import HashBackend, constant_classifier, hash_encoder, make_router

PROMPT = "write a program about food macros"


def report_router(**options: object) -> Router:
    """The QLoRA-MoE report's example (§3.2): cosines 0.8, 0.6, 0.2 and probabilities 0.7, 0.25, 0.05."""
    cosines = np.array([0.6, 0.2, 0.8])
    centroids = np.zeros((3, 4), np.float32)
    centroids[:, 0] = cosines
    centroids[range(3), range(1, 4)] = np.sqrt(1 - cosines**2)
    backend = HashBackend(4)
    backend.fixed[PROMPT] = np.array([3, 0, 0, 0], np.float32)
    return make_router(backend, centroids, constant_classifier([0.25, 0.05, 0.7], 4), **options)  # type: ignore[arg-type]


def test_the_worked_example_of_the_report() -> None:
    [decision] = report_router().decide([PROMPT], RoutingOptions(policy="proportional"))
    assert [candidate.id for candidate in decision.candidates] == ["e2", "e0", "e1"]
    assert [candidate.score for candidate in decision.candidates] == pytest.approx([0.75, 0.425, 0.125])
    assert [candidate.similarity for candidate in decision.candidates] == pytest.approx([0.8, 0.6, 0.2])
    assert [candidate.probability for candidate in decision.candidates] == pytest.approx([0.7, 0.25, 0.05])
    weights = [expert.weight for expert in decision.experts]
    assert weights == pytest.approx([0.75 / 1.3, 0.425 / 1.3, 0.125 / 1.3])
    assert decision.margin == pytest.approx(0.325)
    assert not decision.fallback


@pytest.mark.parametrize(
    ("strategy", "scores"),
    [("similarity", [0.8, 0.6, 0.2]), ("classifier", [0.7, 0.25, 0.05]), ("hybrid", [0.725, 0.3375, 0.0875])],
)
def test_each_strategy_ranks_by_its_own_score(strategy: str, scores: list[float]) -> None:
    router = report_router(hybrid_weight=0.25)
    [decision] = router.decide([PROMPT], RoutingOptions(strategy=strategy, top_m=2))  # type: ignore[arg-type]
    assert [candidate.score for candidate in decision.candidates] == pytest.approx(scores)
    assert [expert.id for expert in decision.experts] == ["e2", "e0"]
    assert decision.candidates[2].weight == 0
    logits = np.array(scores)
    spread = np.exp(logits) / np.exp(logits).sum()
    assert decision.entropy == pytest.approx(-(spread * np.log(spread)).sum())


def test_below_the_threshold_the_base_answers_alone() -> None:
    router = report_router()
    [kept] = router.decide([PROMPT], RoutingOptions(threshold=0.7499))
    [dropped] = router.decide([PROMPT], RoutingOptions(threshold=0.7501))
    assert kept.experts
    assert not kept.fallback
    assert dropped.fallback
    assert dropped.experts == ()
    assert all(candidate.weight == 0 for candidate in dropped.candidates)
    assert dropped.candidates[0].score == kept.candidates[0].score
    assert "below the threshold 0.750" in dropped.reason
    assert "base" in dropped.reason


def test_a_blank_text_always_goes_to_the_base() -> None:
    for strategy in STRATEGIES:
        [decision] = report_router().decide([" \n"], RoutingOptions(strategy=strategy, threshold=-1.0))
        assert decision.fallback
        assert (
            decision.reason == "the text is blank, or nothing that the encoder reads: the base answers alone"
        )
        assert all(math.isfinite(candidate.score) for candidate in decision.candidates)


def random_router(seed: int, experts: int = 7, **options: object) -> tuple[Router, list[str]]:
    generator = np.random.default_rng(seed)
    head = LinearClassifier(
        generator.normal(size=(experts, 8)).astype(np.float32),
        generator.normal(size=experts).astype(np.float32),
    )
    router = make_router(HashBackend(), generator.normal(size=(experts, 8)), head, **options)  # type: ignore[arg-type]
    return router, [f"text {number} {generator.integers(1 << 30)}" for number in range(45)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_decides_what_single_calls_decide(strategy: str, policy: str) -> None:
    router, texts = random_router(11)
    options = RoutingOptions(strategy=strategy, policy=policy, threshold=0.2, temperature=0.3)  # type: ignore[arg-type]
    for text, decision in zip(texts, router.decide(texts, options), strict=True):
        [single] = router.decide([text], options)
        assert [c.id for c in single.candidates] == [c.id for c in decision.candidates]
        assert (single.fallback, single.truncated) == (decision.fallback, decision.truncated)
        for one, other in zip(single.candidates, decision.candidates, strict=True):
            assert one.weight == pytest.approx(other.weight, abs=1e-6)
            assert one.score == pytest.approx(other.score, abs=1e-6)


def test_centring_ranks_by_centred_cosines_and_reports_raw_ones() -> None:
    generator = np.random.default_rng(5)
    mean = np.array([0.9, 0.1, 0, 0, 0, 0, 0, 0], np.float32)
    centroids = normalize_rows((generator.normal(size=(4, 8)) * 0.2 + mean).astype(np.float32))
    backend = HashBackend()
    router = make_router(backend, centroids, corpus_mean=mean, defaults=RoutingOptions(strategy="similarity"))
    [decision] = router.decide(["some text"])
    vector = hash_encoder(backend).encode(["some text"]).vectors[0].astype(np.float64)
    moved, shifted = centroids.astype(np.float64) - mean, vector - mean
    expected = moved @ shifted / np.linalg.norm(moved, axis=1) / np.linalg.norm(shifted)
    for candidate in decision.candidates:
        number = int(candidate.id[1:])
        assert candidate.score == pytest.approx(expected[number], abs=1e-6)
        assert candidate.similarity == pytest.approx(float(centroids[number] @ vector), abs=1e-6)
    [blank] = router.decide([""])
    assert blank.fallback


def test_truncation_reaches_the_decision() -> None:
    backend = HashBackend(limit=3)
    router = make_router(backend, np.eye(8)[:2], defaults=RoutingOptions(strategy="similarity"))
    short, long = router.decide(["one two three", "one two three four"])
    assert (short.truncated, long.truncated) == (False, True)


def test_ties_follow_the_experts_order() -> None:
    backend = HashBackend(4)
    backend.fixed["tie"] = np.array([1, 1, 1, 0], np.float32)
    router = make_router(backend, np.eye(4), defaults=RoutingOptions(strategy="similarity", top_m=2))
    [decision] = router.decide(["tie"])
    assert [expert.id for expert in decision.experts] == ["e0", "e1"]
    assert decision.margin == 0


def test_one_expert_and_more_asked_than_there_are() -> None:
    router = make_router(
        HashBackend(), np.eye(8)[:1], defaults=RoutingOptions(strategy="similarity", top_m=5)
    )
    [decision] = router.decide(["anything"])
    assert [expert.weight for expert in decision.experts] == [1.0]
    assert decision.margin == decision.candidates[0].score
    assert decision.entropy == pytest.approx(0)


def test_defaults_give_way_to_the_request_and_calibration_fills_the_rest() -> None:
    router = report_router(
        defaults=RoutingOptions(strategy="hybrid", top_m=1, temperature=0.5, threshold=0.1)
    )
    plan = router.resolve()
    assert (plan.strategy, plan.top_m, plan.policy, plan.temperature, plan.threshold) == (
        "hybrid", 1, "softmax", 0.5, 0.1,
    )  # fmt: skip
    asked = router.resolve(RoutingOptions(top_m=2, temperature=0.7))
    assert (asked.top_m, asked.temperature, asked.threshold) == (2, 0.7, 0.1)
    # Another strategy has other score scales: the configured numbers do not apply to it.
    other = router.resolve(RoutingOptions(strategy="similarity"))
    assert (other.temperature, other.threshold) == (1.0, -1.0)


def test_without_a_classifier_only_similarity_can_be_asked() -> None:
    with pytest.raises(RoutingOptionsError, match="needs a classifier"):
        make_router(HashBackend(), np.eye(8)[:2])
    router = make_router(HashBackend(), np.eye(8)[:2], defaults=RoutingOptions(strategy="similarity"))
    [decision] = router.decide(["x"])
    assert all(candidate.probability is None for candidate in decision.candidates)
    with pytest.raises(RoutingOptionsError, match=r"routing\.strategy: hybrid needs"):
        router.decide(["x"], RoutingOptions(strategy="hybrid"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("strategy", "magic"), ("policy", "best"), ("top_m", 0), ("top_m", MAX_TOP_M + 1), ("top_m", 2.0),
        ("top_m", True), ("temperature", 0), ("temperature", -1), ("temperature", math.nan),
        ("temperature", math.inf), ("temperature", "hot"), ("threshold", math.nan), ("threshold", 1.01),
        ("threshold", -2), ("threshold", True),
    ],
)  # fmt: skip
def test_impossible_options_are_named(option: str, value: object) -> None:
    with pytest.raises(RoutingOptionsError, match=rf"routing\.{option}: ") as caught:
        RoutingOptions(**{option: value})  # type: ignore[arg-type]
    assert caught.value.option == option


def test_an_encoder_of_another_space_is_refused() -> None:
    router = report_router()
    other = hash_encoder(HashBackend(4), prefix="passage: ")
    with pytest.raises(RouterError, match="passage"):
        Router(router.state, other)


class Broken:
    """A classifier that gives what it is told."""

    kind = "linear"

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def probabilities(self, texts: object, vectors: object) -> np.ndarray:
        return self.rows


@pytest.mark.parametrize("rows", [np.ones((1, 2)), np.full((1, 3), np.nan)])
def test_a_classifier_of_a_wrong_shape_or_nan_is_an_error(rows: np.ndarray) -> None:
    router = report_router(override=Broken(rows.astype(np.float32)))
    with pytest.raises(RouterError, match="classifier"):
        router.decide([PROMPT])


def test_the_state_must_fit_together() -> None:
    state = report_router().state
    for change, match in [
        ({"experts": ("a", "b")}, "centroids"),
        ({"experts": ("a", "a", "b")}, "different ids"),
        ({"corpus_mean": np.full(4, np.nan, np.float32)}, "corpus_mean"),
        ({"hybrid_weight": 1.5}, "hybrid_weight"),
        ({"calibration": {}}, "calibration"),
    ]:
        with pytest.raises(RouterError, match=match):
            replace(state, **change)  # type: ignore[arg-type]


def test_a_pool_of_fewer_experts_decides_as_if_fitted_without_them() -> None:
    generator = np.random.default_rng(12)
    backend = HashBackend(dimension=6)
    centroids = generator.normal(size=(5, 6)).astype(np.float32)
    cosines = RoutingOptions(strategy="similarity")
    whole = make_router(backend, centroids, threshold=0.3, temperature=0.2, defaults=cosines)
    left = [0, 2, 4]
    less = make_router(backend, centroids[left], threshold=0.3, temperature=0.2, defaults=cosines)
    served = {"e0": "e0", "e2": "e2", "e4": "new"}
    fell = 0
    for top_m in (1, 2, 3):
        for policy in POLICIES:
            options = RoutingOptions(strategy="similarity", top_m=top_m, policy=policy)
            texts = [f"text {number}" for number in range(30)]
            pairs = zip(whole.decide(texts, options), less.decide(texts, options), strict=True)
            for decision, expected in pairs:
                if decision.fallback:
                    continue
                got = decision.among(served)
                names = {"e0": "e0", "e1": "e2", "e2": "new"}
                assert [one.id for one in got.candidates] == [names[one.id] for one in expected.candidates]
                assert [one.weight for one in got.candidates] == [one.weight for one in expected.candidates]
                assert (got.fallback, got.margin, got.entropy) == (
                    expected.fallback,
                    expected.margin,
                    expected.entropy,
                )
                fell += got.fallback
                assert decision.among({one.id: one.id for one in decision.candidates}) is decision
    assert fell
    assert decision.among({}).fallback
