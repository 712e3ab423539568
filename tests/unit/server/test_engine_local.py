"""The engine against transformers' own generate, alone and in mixed batches, and when things go wrong."""

import asyncio
import time
from contextlib import aclosing
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from loramux.adapters.base_shapes import BaseShapes
from loramux.kernels.gated_lora.tabled import TabledForm
from loramux.server.engine import local
from loramux.server.engine.attention import PagedAttention
from loramux.server.engine.graphs import StepGraphs
from loramux.server.engine.protocol import (
    EngineClosed,
    EngineError,
    EngineOverloaded,
    Finished,
    PromptScored,
    Started,
    Token,
)
from loramux.server.engine.runner import Runner
from loramux.server.engine.sampler import Sampler
from tests.tiny import VOCABULARY, greedy, random_adapter, random_prompt, running, tiny_llama, with_delta


def make_experts(model: torch.nn.Module, ranks: tuple[int, ...]) -> list[Any]:
    shapes = BaseShapes.from_model(model, "tiny")
    return [random_adapter(shapes, rank, name) for rank, name in zip(ranks, "abcdefgh", strict=False)]


MIXTURES = [{}, {"a": 1.0}, {"b": 0.7, "c": 0.3}, {"a": 0.5, "b": 0.25, "c": 0.25}, {"c": -0.6, "a": 1.4}]


def test_each_mixture_says_what_the_dense_sum_says() -> None:
    model = tiny_llama()
    experts = make_experts(model, (4, 8, 3))
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
    experts = make_experts(model, (4, 8, 3))
    shared = random_prompt(40)
    jobs = [(shared if i % 2 else random_prompt(3 + 7 * i), MIXTURES[i % 5]) for i in range(16)]

    async def scenario() -> tuple[list[Any], list[Any], int]:
        async with running(model, experts, prefix_sharing=prefix_sharing) as rig:
            alone = [await rig.ask(*job, logprobs=0) for job in jobs]
            together = await asyncio.gather(*(rig.ask(*job) for job in jobs))
            return alone, together, rig.engine.stats().prefix_hit_tokens

    alone, together, hits = asyncio.run(scenario())
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    assert (hits > 0) == prefix_sharing
    by_mixture = {
        str(mixture): answer.scores[0].logprob
        for (prompt, mixture), answer in zip(jobs, alone, strict=True)
        if prompt is shared
    }
    assert len(set(by_mixture.values())) == len(MIXTURES)


def test_captured_steps_say_what_plain_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the capture is off and the rest is on: fixed buffers, padding, tables that are filled before a
    step."""
    model = tiny_llama()
    experts = make_experts(model, (4, 8, 3))
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
    experts = make_experts(model, (4, 4))
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
    experts = make_experts(model, (4, 8, 3))
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
    experts = make_experts(model, (4, 8, 3))
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


def test_leaving_frees_the_adapter_only_after_the_last_step_that_uses_it() -> None:
    model = tiny_llama()
    experts = make_experts(model, (4,))

    async def scenario() -> None:
        async with running(model, experts) as rig:
            async with aclosing(rig.events(random_prompt(10), {"a": 1.0}, max_tokens=400)) as events:
                async for event in events:
                    if isinstance(event, Token):
                        break
                assert rig.residency.stats().pinned_bytes > 0
            assert rig.residency.stats().pinned_bytes == 0
            stats = rig.engine.stats()
            assert (stats.running, stats.waiting) == (0, 0)
            steps = stats.steps
            await rig.ask(random_prompt(4), max_tokens=3)
            # The abandoned request wanted 400 tokens; had it gone on, its steps would be counted here.
            assert rig.engine.stats().steps <= steps + 6

    asyncio.run(scenario())


def test_a_full_queue_is_refused_and_the_rest_is_served() -> None:
    model = tiny_llama()

    async def scenario() -> list[Any]:
        async with running(model, max_running=1, max_waiting=2) as rig:
            return await asyncio.gather(
                *(rig.ask(random_prompt(5), max_tokens=60) for _ in range(8)), return_exceptions=True
            )

    answers = asyncio.run(scenario())
    refused = [answer for answer in answers if isinstance(answer, EngineOverloaded)]
    served = [answer for answer in answers if not isinstance(answer, BaseException)]
    assert refused
    assert len(refused) + len(served) == 8
    assert all(len(answer.tokens) == 60 for answer in served)
    assert refused[0].retry_after >= 1


def test_a_full_queue_once_said_one_second_to_everybody_of_the_first_burst() -> None:
    model = tiny_llama()

    def slow(module: torch.nn.Module, arguments: Any) -> None:
        time.sleep(0.05)

    model.register_forward_pre_hook(slow)

    async def scenario() -> int:
        async with running(model, max_running=1, max_waiting=8) as rig:
            asks = [asyncio.create_task(rig.ask(random_prompt(5), max_tokens=30)) for _ in range(10)]
            done, others = await asyncio.wait(asks, return_when=asyncio.FIRST_EXCEPTION)
            [refused] = [ask.exception() for ask in done if ask.exception() is not None][:1]
            for ask in others:
                ask.cancel()
            await asyncio.wait(others)
            assert isinstance(refused, EngineOverloaded)
            return refused.retry_after

    # Eight times thirty tokens and a prompt, one after the other, 0.05 seconds each and what the model takes.
    assert 12 <= asyncio.run(scenario()) <= 60


def test_a_step_that_raises_fails_its_requests_and_no_others() -> None:
    model = tiny_llama()
    poison = 299
    prompt = tuple(token for token in random_prompt(7) if token != poison)

    def refuse(module: torch.nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        if (keywords["input_ids"] == poison).any():
            raise RuntimeError("CUDA out of memory, for example")

    model.register_forward_pre_hook(refuse, with_kwargs=True)

    async def scenario() -> None:
        async with running(model) as rig:
            before = (await rig.ask(prompt, logit_bias={poison: -100})).tokens
            with pytest.raises(EngineError, match="out of memory"):
                await rig.ask((5, poison, 6))
            after = (await rig.ask(prompt, logit_bias={poison: -100})).tokens
            assert after == before
            assert rig.engine.stats().running == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("stage", "owner", "name"),
    [
        ("inputs", Runner, "_write"),
        ("plan", Runner, "_plan_for"),
        ("attention of the second layer", PagedAttention, "attend"),
        ("forward", Runner, "_forward"),
        ("prompt scores", local, "prompt_scores"),
        ("sampler", Sampler, "choose"),
    ],
)
@pytest.mark.parametrize("when", ["prompt", "answer"])
def test_memory_that_runs_out_fails_the_step_and_harms_nothing_else(
    monkeypatch: pytest.MonkeyPatch, stage: str, owner: Any, name: str, when: str
) -> None:
    model = tiny_llama()
    experts = make_experts(model, (4,))
    prompt = random_prompt(21)
    original = getattr(owner, name)
    calls = 0
    armed = False

    def fail(*arguments: Any, **named: Any) -> Any:
        nonlocal calls, armed
        calls += armed
        # Two layers: the second call of a step is its second layer.
        if armed and (when == "prompt" or calls > 6) and not (name == "attend" and calls % 2):
            armed = False
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(*arguments, **named)

    async def scenario() -> None:
        nonlocal armed
        async with running(model, experts) as rig:
            wanted = (await rig.ask(prompt, {"a": 0.5}, prompt_logprobs=0)).tokens
            monkeypatch.setattr(owner, name, fail)
            armed = True
            if name == "prompt_scores" and when == "answer":
                armed = False  # they are part of the prompt's steps only
            else:
                with pytest.raises(EngineError, match="out of memory"):
                    await rig.ask(prompt, {"a": 0.5}, prompt_logprobs=0)
            assert not armed
            assert rig.engine._scheduler.is_idle
            assert rig.engine.stats().kv_usage == 0
            both = await asyncio.gather(*(rig.ask(prompt, {"a": 0.5}) for _ in range(2)))
            assert [answer.tokens for answer in both] == [wanted, wanted]

    asyncio.run(scenario())


def test_a_row_without_numbers_fails_alone() -> None:
    model = tiny_llama()
    poison = 299

    def spoil(module: torch.nn.Module, arguments: Any, keywords: dict[str, Any], output: Any) -> Any:
        last = keywords["input_ids"][0] == poison
        if output.logits.shape[1] == len(last):
            output.logits[0, last] = float("nan")
        return output

    model.register_forward_hook(spoil, with_kwargs=True)
    prompt = tuple(token for token in random_prompt(9) if token != poison)

    async def scenario() -> None:
        async with running(model) as rig:
            options = {"temperature": 1.0, "seed": 3, "logit_bias": {poison: -100}}
            wanted = (await rig.ask(prompt, **options)).tokens
            forced = {"temperature": 1.0, "seed": 4, "logit_bias": {poison: 100}}
            answers = await asyncio.gather(
                rig.ask(prompt, **options), rig.ask(prompt, **forced), return_exceptions=True
            )
            assert isinstance(answers[1], EngineError)
            assert "not finite" in str(answers[1])
            assert not isinstance(answers[0], BaseException)
            assert answers[0].tokens == wanted

    asyncio.run(scenario())


def test_what_could_never_run_is_refused_at_once() -> None:
    model = tiny_llama()

    async def scenario() -> None:
        async with running(model) as rig:
            with pytest.raises(EngineError, match="512"):
                await rig.ask(random_prompt(500), max_tokens=13)
            with pytest.raises(EngineError, match="empty"):
                await rig.ask(())
            assert len((await rig.ask(random_prompt(500), max_tokens=12)).tokens) == 12

    asyncio.run(scenario())


def test_a_stop_lets_running_requests_finish_and_refuses_new_ones() -> None:
    model = tiny_llama()

    async def scenario() -> None:
        async with running(model) as rig:
            task = asyncio.create_task(rig.ask(random_prompt(5), max_tokens=50))
            while not rig.engine.stats().running:
                await asyncio.sleep(0)
            await rig.engine.stop(30)
            assert len((await task).tokens) == 50
            with pytest.raises(EngineClosed):
                await rig.ask(random_prompt(5))

    asyncio.run(scenario())


def test_a_stop_that_may_not_wait_ends_running_requests_with_an_error() -> None:
    model = tiny_llama()

    async def scenario() -> None:
        async with running(model) as rig:
            task = asyncio.create_task(rig.ask(random_prompt(5), max_tokens=500))
            while not rig.engine.stats().running:
                await asyncio.sleep(0)
            await rig.engine.stop(0)
            with pytest.raises(EngineError):
                await task

    asyncio.run(scenario())


@pytest.mark.parametrize("family", ["mistral with a window", "gemma 2 with soft caps"])
def test_windows_and_soft_caps_equal_the_models_own_attention(family: str) -> None:
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 16,
        "initializer_range": 0.15,
        "max_position_embeddings": 256,
    }
    model: Any
    if family.startswith("mistral"):
        model = MistralForCausalLM(MistralConfig(**common, attn_implementation="eager"))
    else:
        model = Gemma2ForCausalLM(
            Gemma2Config(**common, attn_implementation="eager", query_pre_attn_scalar=16)
        )
    model.eval().requires_grad_(False)
    prompts = [random_prompt(n) for n in (4, 30, 100)]
    expected = [greedy(model, prompt, 24) for prompt in prompts]

    async def scenario() -> list[list[int]]:
        async with running(model) as rig:
            return [a.tokens for a in await asyncio.gather(*(rig.ask(p) for p in prompts))]

    assert asyncio.run(scenario()) == expected


def test_an_engine_that_cannot_take_its_first_step_once_said_it_was_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError("Memory footprint 12251269376 is more than available memory 9696782745")

    monkeypatch.setattr(Runner, "run", refuse)

    async def scenario() -> None:
        with pytest.raises(EngineError, match=r"first step failed.*Memory footprint"):
            async with running(tiny_llama()):
                raise AssertionError("it started")

    asyncio.run(scenario())


def test_a_started_engine_that_dies_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with running(tiny_llama()) as rig:
            assert rig.engine.stats().dead is None
            assert rig.engine.stats().steps == 0  # the first step is not traffic

            def fail(*_: object) -> None:
                raise RuntimeError("the device is gone")

            monkeypatch.setattr(rig.engine._scheduler, "next", fail)
            with pytest.raises(EngineError, match="device is gone"):
                await rig.ask(random_prompt(4))
            thread = rig.engine._thread
            assert thread is not None
            await asyncio.to_thread(thread.join, 30)
            with pytest.raises(EngineClosed, match="device is gone"):
                await rig.ask(random_prompt(4))
            assert "device is gone" in (rig.engine.stats().dead or "")

    asyncio.run(scenario())
