"""Sampling against transformers' own warpers, and draws against the distribution they come from."""

import secrets
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loramux.server.engine.protocol import Sampling
from loramux.server.engine.sampler import (
    ATTEMPTS,
    NOT_FINITE,
    UNSETTLED,
    Draws,
    Sampler,
    draw,
    draw_captured,
    token_score,
    truncated,
    uniforms,
)
from tests.tiny import Alone, sequence


def drawn(logits: torch.Tensor, sampling: Sampling, count: int) -> torch.Tensor:
    """How often each token comes in so many draws."""
    draws = Draws.of([sampling] * count, len(logits), logits.device)
    numbers = torch.from_numpy(uniforms([secrets.randbits(63)] * count, list(range(count))))
    return draw(logits.expand(count, -1), draws, numbers).bincount(minlength=len(logits)).double()


def expected_distribution(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """What transformers' own warpers make of float64 logits."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    warped: torch.Tensor = warpers(torch.zeros(1, 1, dtype=torch.long), logits[None].double())[0]
    return warped.softmax(-1)


OPTIONS = [
    {"temperature": 0.7},
    {"temperature": 1.6, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.2, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 0.01},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_draws_follow_the_distribution_of_the_reference_warpers(options: dict[str, float]) -> None:
    logits = torch.randn(23) * 1.5
    sampling = Sampling(max_tokens=1, **options)  # type: ignore[arg-type]
    expected = expected_distribution(logits, sampling)
    draws = 6000
    counts = drawn(logits, sampling, draws)
    assert counts[expected == 0].sum() == 0
    kept = draws * expected > 0.5
    chi_square = ((counts - draws * expected) ** 2 / (draws * expected))[kept].sum()
    assert chi_square < 75  # 22 degrees of freedom at most: exceeded once in 3,000,000 runs


@pytest.mark.parametrize("top_p", [0.02, 0.5, 0.9, 0.999])
def test_a_flat_distribution_is_cut_where_sorting_cuts_it(top_p: float) -> None:
    logits = torch.randn(5000) * 0.5
    sampling = Sampling(max_tokens=1, top_p=top_p)
    expected = expected_distribution(logits, sampling)
    counts = drawn(logits, sampling, 400)
    # The reference sums in another order: of 5,000 tokens, the one at the edge may be on either side.
    edge = expected[expected > 0].min()
    outside = (counts > 0) & (logits.softmax(-1) / logits.softmax(-1).max() < 0.999 * edge / expected.max())
    assert outside.sum() == 0
    assert (counts > 0).sum() > min(100, 0.5 * (expected > 0).sum())


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (7, 1.0), (7, 0.5), (300, 0.8), (40, 0.99), (299, 1e-9)]
)
def test_what_is_kept_is_what_sorting_keeps(top_k: int, top_p: float) -> None:
    weights = torch.rand(4, 300)
    weights[3, 5:9] = weights[3].max()  # ties stay together
    kept = truncated(weights, torch.full((4, 1), top_k), torch.full((4, 1), top_p)) > 0
    for row, found in zip(weights, kept, strict=True):
        order = row.sort(descending=True).indices[:top_k]
        share = row[order].double() / row[order].double().sum()
        count = int((share.cumsum(0) - share < top_p).sum()) if top_p < 1 else len(order)
        assert torch.equal(found, row >= row[order[max(count, 1) - 1]])


def test_seeds_decide_and_nothing_else_does() -> None:
    logits = torch.randn(50)

    def tokens(seed: int | None) -> list[int]:
        sampler = Alone(Sampling(max_tokens=99, seed=seed))
        torch.rand(3)
        chosen = []
        for _ in range(20):
            chosen.append(sampler.sample(logits).id)
            sampler.accept(chosen[-1])
        return chosen

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(4)
    assert tokens(None) != tokens(None)


def test_presence_and_frequency_count_the_answer_only() -> None:
    logits = torch.zeros(10)
    sampler = Alone(
        Sampling(max_tokens=9, temperature=0, presence_penalty=0.5, frequency_penalty=0.25, logprobs=0),
        (7, 7, 7),
    )
    for token in (2, 2, 4):
        sampler.accept(token)
    adjusted = sampler.adjusted(logits)
    expected = torch.zeros(10)
    expected[2], expected[4] = -1.0, -0.75
    assert torch.equal(adjusted, expected)


def test_repetition_penalty_equals_the_reference_over_prompt_and_answer() -> None:
    logits = torch.randn(30)
    sampler = Alone(Sampling(max_tokens=9, temperature=0, repetition_penalty=1.7), (1, 5, 9))
    for token in (9, 20):
        sampler.accept(token)
    reference = RepetitionPenaltyLogitsProcessor(1.7)
    expected = reference(torch.tensor([[1, 5, 9, 9, 20]]), logits[None].clone())[0]
    assert torch.allclose(sampler.adjusted(logits), expected)


def test_logit_bias_forces_and_forbids() -> None:
    logits = torch.randn(30)
    best = int(logits.argmax())
    assert (
        Alone(Sampling(max_tokens=1, temperature=0, logit_bias={best: -100.0}), ()).sample(logits).id != best
    )
    assert Alone(Sampling(max_tokens=1, logit_bias={17: 100.0}), ()).sample(logits).id == 17


def test_the_logits_are_left_as_they_were() -> None:
    logits = torch.randn(30)
    before = logits.clone()
    options = {
        "repetition_penalty": 2.0,
        "presence_penalty": 1.0,
        "logit_bias": {1: 5.0},
        "top_k": 3,
        "min_p": 0.1,
    }
    sampler = Alone(Sampling(max_tokens=1, logprobs=2, **options), (2, 3))  # type: ignore[arg-type]
    sampler.accept(4)
    sampler.sample(logits)
    assert torch.equal(logits, before)


def test_scores_are_those_of_the_model_before_sampling_parameters() -> None:
    logits = torch.randn(30)
    score = Alone(Sampling(max_tokens=1, temperature=0, logit_bias={3: 100.0}, logprobs=2), ()).sample(logits)
    logprobs = logits.log_softmax(-1)
    assert score.id == 3
    assert score.logprob == pytest.approx(float(logprobs[3]))
    assert [token for token, _ in score.top] == logprobs.topk(2).indices.tolist()
    assert token_score(logits, 3, None).logprob is None
    assert token_score(logits, 3, 0).top == ()


@pytest.mark.parametrize("temperature", [5e-324, 1e-60, 1e-46, 1e-38, 9e-6])
def test_a_temperature_that_underflows_once_chose_the_last_token_for_ever(temperature: float) -> None:
    for _ in range(5):
        logits = torch.randn(50) * 10
        sampler = Alone(Sampling(max_tokens=1, temperature=temperature, seed=1, logprobs=0), (1, 2))
        assert sampler.sample(logits).id == int(logits.argmax())


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 2.0])
@pytest.mark.parametrize("penalty", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("top_p", [1e-45, 1e-9, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 1e-45, 1.0])
def test_distributions_are_finite_at_the_edges(
    temperature: float, penalty: float, top_p: float, min_p: float
) -> None:
    sampling = Sampling(
        max_tokens=4, temperature=temperature, repetition_penalty=penalty, top_p=top_p, min_p=min_p, seed=3,
        presence_penalty=2.0, frequency_penalty=-2.0, logit_bias={5: 100.0, 6: -100.0}, logprobs=2,
    )  # fmt: skip
    sampler = Alone(sampling, tuple(range(20)))
    for _ in range(4):
        score = sampler.sample(torch.randn(50) * 30)
        sampler.accept(score.id)
        assert 0 <= score.id < 50
        assert score.logprob is not None
        assert score.logprob <= 0


def test_a_row_without_numbers_is_an_error_of_its_own_and_not_a_token() -> None:
    logits = torch.randn(3, 50)
    logits[1] = float("nan")
    rows = [sequence(Sampling(max_tokens=1, temperature=1.0, seed=n, top_p=0.9)) for n in range(3)]
    alone = [Sampler().choose(logits[n : n + 1], [rows[n]])[0] for n in range(3)]
    assert Sampler().choose(logits, rows) == alone
    assert [score is None for score in alone] == [False, True, False]


def test_a_mixed_batch_chooses_what_each_row_chooses_alone() -> None:
    options = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.9, "seed": 5},
        {"temperature": 0.0, "logit_bias": {7: 100.0}, "logprobs": 1},
        {"temperature": 1.4, "top_k": 3, "min_p": 0.1, "seed": 6, "repetition_penalty": 1.3},
        {"temperature": 1.0, "seed": 7, "logprobs": 0},
    ]
    rows = [sequence(Sampling(max_tokens=9, **one), (1, 2, 3)) for one in options]  # type: ignore[arg-type]
    sampler = Sampler()
    for _ in range(6):
        logits = torch.randn(len(rows), 300) * 2
        together = sampler.choose(logits, rows)
        alone = [Sampler().choose(logits[n : n + 1], [row])[0] for n, row in enumerate(rows)]
        assert [s and s.id for s in together] == [s and s.id for s in alone]
        for row, score in zip(rows, together, strict=True):
            assert score is not None
            row.accept(score)


def test_uniforms_are_uniform_and_depend_on_seed_and_position_only() -> None:
    many = uniforms(list(range(200)) * 50, [n for n in range(50) for _ in range(200)])[:, 0]
    assert len(set(many.tolist())) == len(many)
    assert abs(float(many.mean()) - 0.5) < 0.02
    counts = torch.histc(torch.from_numpy(many).float(), 10, 0, 1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 40  # 9 degrees of freedom
    assert (uniforms([3, 4], [8, 8])[0] == uniforms([3], [8])[0]).all()
    assert len(set(uniforms([2**63 - 1], [2**20])[0].tolist())) == ATTEMPTS


def test_draws_invert_the_cumulative_distribution_in_the_order_of_ids() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.3]]).log()
    draws = Draws.of([Sampling(max_tokens=1)], 3, logits.device)
    found = [
        int(draw(logits, draws, torch.full((1, ATTEMPTS), u, dtype=torch.float64)))
        for u in (0.0, 0.49, 0.51, 0.69, 0.71, 1 - 2**-53)
    ]
    assert found == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
def test_what_is_forbidden_is_never_drawn(u: float, temperature: float) -> None:
    logits = torch.full((1, 300), -torch.inf)
    logits[0, 171] = -3.0
    draws = Draws.of([Sampling(max_tokens=1, temperature=temperature)], 300, logits.device)
    assert int(draw(logits, draws, torch.full((1, ATTEMPTS), u, dtype=torch.float64))) == 171
    assert (
        int(draw(logits - torch.inf, draws, torch.full((1, ATTEMPTS), u, dtype=torch.float64))) == NOT_FINITE
    )


def test_a_captured_draw_says_what_a_plain_one_does_or_that_it_does_not_know() -> None:
    options = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.9, "seed": 5},
        {"temperature": 1.3, "top_p": 0.05, "seed": 8},
        {"temperature": 1.4, "min_p": 0.1, "seed": 6},
        {"temperature": 1.0, "seed": 7, "top_p": 0.5, "min_p": 0.02},
    ]
    rows = [sequence(Sampling(max_tokens=99, **one), (1, 2, 3)) for one in options]  # type: ignore[arg-type]
    sampler, unsettled = Sampler(), 0
    for step in range(40):
        logits = torch.randn(len(rows), 700) * 2
        if step == 20:
            logits[3] = float("nan")
        best = logits.argmax(-1)

        def captured(parameters: Any, uniform: Any, logits: Any = logits, best: Any = best) -> torch.Tensor:
            nonlocal unsettled
            found = draw_captured(logits, best, torch.from_numpy(parameters), torch.from_numpy(uniform))
            unsettled += int((found == UNSETTLED).sum())
            return found

        found = sampler.choose(logits, rows, best, captured)
        assert found == Sampler().choose(logits, rows)
        for row, score in zip(rows, found, strict=True):
            if score is not None:
                row.accept(score)
    assert unsettled > 10
