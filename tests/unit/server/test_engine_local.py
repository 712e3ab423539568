"""The engine against transformers' own generate, alone and in mixed batches."""

import asyncio
from typing import Any

import psutil
import pytest
import torch

from loramux.kernels.gated_lora.tabled import TabledForm
from loramux.kernels.team import release_team
from loramux.server.engine.attention import _zeros
from loramux.server.engine.graphs import StepGraphs
from loramux.server.engine.protocol import (
    Finished,
    PromptScored,
    Started,
)
from tests.teams import settled, threads, work
from tests.tiny import (
    greedy,
    random_experts,
    random_prompt,
    running,
    same_tokens,
    tiny_llama,
    with_delta,
)

MIXTURES = [{}, {"a": 1.0}, {"b": 0.7, "c": 0.3}, {"a": 0.5, "b": 0.25, "c": 0.25}, {"c": -0.6, "a": 1.4}]


def test_each_mixture_says_what_the_dense_sum_says() -> None:
    model = tiny_llama()
    experts = random_experts(model, (4, 8, 3))
    by_name = {expert.id: expert for expert in experts}
    prompts = [random_prompt(n) for n in (1, 5, 17, 70, 33)]
    expected = [
        greedy(with_delta(model, [(by_name[n], w) for n, w in mixture.items()]), prompt, 24)
        for mixture, prompt in zip(MIXTURES, prompts, strict=True)
    ]

    async def scenario() -> list[list[int]]:
        async with running(model, experts) as rig:
            return [(await rig.ask(p, m)).tokens for p, m in zip(prompts, MIXTURES, strict=True)]

    assert asyncio.run(scenario()) == expected


@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_sixteen_concurrent_streams_equal_their_isolated_runs(prefix_sharing: bool) -> None:
    """Half of them share one prompt under different blends, the case in which shared KV would contaminate."""
    model = tiny_llama()
    experts = random_experts(model, (4, 8, 3))
    shared = random_prompt(40)
    jobs = [(shared if i % 2 else random_prompt(3 + 7 * i), MIXTURES[i % 5]) for i in range(16)]

    async def scenario() -> tuple[list[Any], list[Any], int]:
        async with running(model, experts, prefix_sharing=prefix_sharing) as rig:
            alone = [await rig.ask(*job, logprobs=2) for job in jobs]
            together = await asyncio.gather(*(rig.ask(*job) for job in jobs))
            return alone, together, rig.engine.stats().prefix_hit_tokens

    alone, together, hits = asyncio.run(scenario())
    same_tokens(together, alone)
    assert (hits > 0) == prefix_sharing
    by_mixture = {
        str(mixture): answer.scores[0].logprob
        for (prompt, mixture), answer in zip(jobs, alone, strict=True)
        if prompt is shared
    }
    assert len(set(by_mixture.values())) == len(MIXTURES)


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="one processor has no teams")
def test_who_starts_an_engine_keeps_no_team_of_threads() -> None:
    """Two teams have more threads than there are processors, and then every one of a step's products waits to
    be woken."""

    async def scenario() -> None:
        work()
        async with running(tiny_llama()):
            before = threads()
            release_team()
            assert settled(before)

    asyncio.run(scenario())


def test_captured_steps_say_what_plain_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the capture is off and the rest is on: fixed buffers, padding, tables that are filled before a
    step."""
    model = tiny_llama()
    experts = random_experts(model, (4, 8, 3))
    jobs = [(random_prompt(2 + 5 * i), MIXTURES[i % 5], 5 + 3 * i) for i in range(9)]
    kinds: list[dict[str, Any]] = [{}, {"temperature": 0.9, "top_p": 0.8}, {"temperature": 1.2, "top_k": 9}]
    replays: list[bool] = []
    replay = StepGraphs.replay

    def counted(self: StepGraphs, slots: Any) -> Any:
        found = replay(self, slots)
        replays.append(found is not None)
        return found

    monkeypatch.setattr(StepGraphs, "replay", counted)

    async def scenario(**options: Any) -> list[list[int]]:
        async with running(with_delta(model, []), experts, **options) as rig:
            asks = (
                rig.ask(p, m, max_tokens=n, logprobs=1, seed=i, **kinds[i % 2 + (i == 8)])
                for i, (p, m, n) in enumerate(jobs)
            )
            answers = await asyncio.gather(*asks)
            short = await rig.ask(random_prompt(1), {}, max_tokens=1)  # a prompt that is a single token
            assert len(short.tokens) == 1
            return [answer.tokens for answer in answers]

    plain = asyncio.run(scenario(max_running=6))
    assert not replays
    assert asyncio.run(scenario(max_running=6, graphs=True, form=TabledForm())) == plain
    assert replays.count(True) > 20
    # Blends of more rows than a table has room for, and forms without tables, run as they did.
    monkeypatch.setattr("loramux.server.engine.graphs.MOST_ROWS", 9)
    before = len(replays)
    assert asyncio.run(scenario(max_running=6, graphs=True, form=TabledForm(), rows=16)) == plain
    assert False in replays[before:]
    assert asyncio.run(scenario(max_running=6, graphs=True)) == plain


def test_prefixes_are_shared_within_a_blend_and_never_across() -> None:
    model = tiny_llama()
    experts = random_experts(model, (4, 4))
    prompt = random_prompt(41)

    async def cached(rig: Any, mixture: dict[str, float]) -> int:
        answer = await rig.ask(prompt, mixture, max_tokens=1)
        assert isinstance(answer.events[0], Started)
        return answer.events[0].cached_tokens

    async def scenario() -> list[int]:
        async with running(model, experts) as rig:
            mixtures = [{}, {"a": 1.0}, {"a": 0.99}, {}, {"a": 1.0}, {"b": 1.0}]
            return [await cached(rig, mixture) for mixture in mixtures]

    assert asyncio.run(scenario()) == [0, 0, 0, 40, 40, 0]


def test_a_seeded_request_draws_the_same_tokens_alone_and_in_a_batch() -> None:
    model = tiny_llama()
    experts = random_experts(model, (4, 8, 3))
    prompt = random_prompt(20)
    options = {"temperature": 1.3, "top_p": 0.95, "top_k": 40, "seed": 77, "max_tokens": 40}

    async def scenario() -> tuple[list[int], list[list[int]], list[int]]:
        async with running(model, experts) as rig:
            alone = (await rig.ask(prompt, {"a": 0.6}, **options)).tokens
            noise = [rig.ask(random_prompt(9 + i), {"b": 0.5}, temperature=1.0) for i in range(6)]
            answers = await asyncio.gather(
                rig.ask(prompt, {"a": 0.6}, **options), *noise, rig.ask(prompt, {"a": 0.6}, **options)
            )
            other = (await rig.ask(prompt, {"a": 0.6}, **{**options, "seed": 78})).tokens
            return alone, [answers[0].tokens, answers[-1].tokens], other

    alone, batched, other = asyncio.run(scenario())
    assert batched == [alone, alone]
    assert other != alone


def test_prompt_scores_equal_the_models_own_across_chunks() -> None:
    model = tiny_llama()
    prompt = random_prompt(150)  # more than two chunks of 64
    logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)

    async def scenario() -> list[Any]:
        async with running(model) as rig:
            await rig.ask(prompt)  # leaves its prefix in the cache, which scoring must not start from
            answer = await rig.ask(prompt, prompt_logprobs=2, max_tokens=0)
            return answer.events

    _, scored, finished = asyncio.run(scenario())
    assert isinstance(scored, PromptScored)
    assert finished == Finished("length")
    assert [score.id for score in scored.scores] == list(prompt)
    assert scored.scores[0].logprob is None
    for position, score in enumerate(scored.scores[1:]):
        assert score.logprob == pytest.approx(float(logprobs[position, score.id]), abs=2e-5)
        assert [token for token, _ in score.top] == logprobs[position].topk(2).indices.tolist()


def test_log_probabilities_of_the_answer_are_the_models() -> None:
    model = tiny_llama()
    prompt = random_prompt(12)

    async def scenario() -> Any:
        async with running(model) as rig:
            return await rig.ask(prompt, logprobs=3, temperature=0.7, seed=5, logit_bias={4: 3.0})

    answer = asyncio.run(scenario())
    sequence = torch.tensor([[*prompt, *answer.tokens]])
    logprobs = model(sequence).logits[0, len(prompt) - 1 :].log_softmax(-1)
    for row, score in zip(logprobs, answer.scores, strict=False):
        assert score.logprob == pytest.approx(float(row[score.id]), abs=2e-5)
        assert len(score.top) == 3


def test_a_cache_too_small_for_all_takes_turns_and_changes_nothing() -> None:
    model = tiny_llama()
    experts = random_experts(model, (4, 8, 3))
    jobs = [(random_prompt(20 + i), MIXTURES[i % 5]) for i in range(8)]

    async def scenario(kv_tokens: int) -> list[list[int]]:
        # The model is changed by an engine, so each one gets its own copy.
        async with running(with_delta(model, []), experts, kv_tokens=kv_tokens) as rig:
            answers = await asyncio.gather(*(rig.ask(*job, max_tokens=40) for job in jobs))
            return [answer.tokens for answer in answers]

    assert asyncio.run(scenario(136)) == asyncio.run(scenario(4096))


def test_stop_tokens_end_the_answer_and_are_not_part_of_it() -> None:
    model = tiny_llama()
    prompt = random_prompt(8)
    plain = greedy(model, prompt, 24)
    stop = next(t for i, t in enumerate(plain) if i > 3 and t not in plain[:i])

    async def scenario() -> tuple[Any, Any, Any]:
        async with running(model, eos_ids=[stop]) as rig:
            return (
                await rig.ask(prompt),
                await rig.ask(prompt, ignore_eos=True),
                await rig.ask(prompt, ignore_eos=True, stop_token_ids=frozenset({plain[2]})),
            )

    at_eos, ignoring, at_own = asyncio.run(scenario())
    assert at_eos.tokens == plain[: plain.index(stop)]
    assert at_eos.finished == Finished("stop", stop)
    assert ignoring.tokens == plain
    assert ignoring.finished == Finished("length")
    assert at_own.tokens == plain[: plain.index(plain[2])]


def test_a_cache_that_is_not_written_takes_no_memory() -> None:
    before = psutil.Process().memory_info().rss
    cache = _zeros((1000, 16, 8, 1000), torch.bfloat16, torch.device("cpu"))
    assert cache.nbytes == 256_000_000
    assert cache.data_ptr() % 64 == 0
    assert psutil.Process().memory_info().rss - before < 2**26
    cache[7, 3] = 1.0
    assert float(cache[6:9].float().sum()) == 8000
