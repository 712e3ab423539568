"""Every number of a decision against the same formulas written with float64 arrays, on random scores."""

import numpy as np
import pytest

from loramux.router.classifier import LinearClassifier
from loramux.router.decision import STRATEGIES, Decision, RoutingOptions, RoutingPlan, Strategy
from loramux.router.policy import POLICIES, Policy
from loramux.router.router import Router, ScoreTable
from tests.unit.router.kit import HashBackend, make_router


def random_case(seed: int, experts: int) -> tuple[Router, ScoreTable]:
    """A router and scores that it did not make; every third row has a tie, the last text is blank."""
    generator = np.random.default_rng(seed)
    head = LinearClassifier(
        generator.normal(size=(experts, 8)).astype(np.float32), np.zeros(experts, np.float32)
    )
    router = make_router(
        HashBackend(), generator.normal(size=(experts, 8)), head, hybrid_weight=float(generator.random())
    )
    count = 30
    similarity, ranked = generator.uniform(-1, 1, (2, count, experts)).astype(np.float32)
    ranked[::3] = np.round(ranked[::3], 1)
    probability = generator.dirichlet(np.ones(experts), count).astype(np.float32)
    probability[::3] = 1 / experts
    blank = np.arange(count) == count - 1
    return router, ScoreTable(similarity, ranked, probability, generator.random(count) < 0.5, blank)


def weighed(scores: np.ndarray, order: np.ndarray, plan: RoutingPlan) -> np.ndarray:
    """Weights [k] in the experts' order by the policies' definitions."""
    weights = np.zeros(len(scores))
    chosen = order[: plan.top_m]
    if plan.policy == "softmax":
        powers = np.exp((scores[chosen] - scores.max()) / plan.temperature)
        weights[chosen] = powers / powers.sum()
        return weights
    kept = np.zeros(len(scores))
    kept[chosen] = np.maximum(scores[chosen], 0)
    if not kept.any():
        weights[order[0]] = 1
    elif plan.policy == "proportional":
        weights = kept / kept.sum()
    elif kept.min() == kept.max():
        weights[chosen] = 1
    else:
        weights[chosen] = (kept[chosen] - kept.min()) / (kept.max() - kept.min())
    return weights


def check(decision: Decision, router: Router, table: ScoreTable, row: int, plan: RoutingPlan) -> None:
    assert table.probability is not None
    cosine, probability = table.ranked[row].astype(np.float64), table.probability[row].astype(np.float64)
    share = router.state.hybrid_weight
    scores = {
        "similarity": cosine,
        "classifier": probability,
        "hybrid": share * cosine + (1 - share) * probability,
    }[plan.strategy]
    order = np.argsort(-scores, kind="stable")
    fallback = bool(table.blank[row] or scores[order[0]] < plan.threshold)
    weights = np.zeros(len(scores)) if fallback else weighed(scores, order, plan)
    spread = np.exp((scores - scores.max()) / plan.temperature)
    spread /= spread.sum()
    assert [candidate.id for candidate in decision.candidates] == [router.experts[n] for n in order]
    assert decision.fallback is fallback
    assert decision.experts == (() if fallback else decision.candidates[: plan.top_m])
    assert decision.truncated is bool(table.truncated[row])
    assert [c.similarity for c in decision.candidates] == table.similarity[row, order].tolist()
    assert [c.probability for c in decision.candidates] == table.probability[row, order].tolist()
    assert [c.score for c in decision.candidates] == scores[order].tolist()
    np.testing.assert_allclose([c.weight for c in decision.candidates], weights[order], rtol=0, atol=1e-12)
    second = scores[order[1]] if len(order) > 1 else 0.0
    assert decision.margin == scores[order[0]] - second
    expected = -(spread * np.log(np.maximum(spread, 1e-300))).sum()
    assert decision.entropy == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("experts", [1, 2, 12, 40])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_decision_has_the_numbers_of_its_formulas(
    policy: Policy, strategy: Strategy, experts: int, seed: int
) -> None:
    router, table = random_case(seed, experts)
    for top_m, temperature, threshold in ((1, 1.0, -1.0), (3, 0.05, 0.3), (64, 1e-4, 0.0)):
        options = RoutingOptions(strategy, top_m, policy, temperature, threshold)
        for row in range(len(table)):
            decision = router.choose(table, row, options)
            check(decision, router, table, row, router.resolve(options))
