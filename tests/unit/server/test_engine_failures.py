"""The engine when things go wrong, when it is full, and when somebody leaves."""

import asyncio
import time
from contextlib import aclosing
from typing import Any

import pytest
import torch

from loramux.server.engine import local
from loramux.server.engine.attention import PagedAttention
from loramux.server.engine.protocol import (
    EngineClosed,
    EngineError,
    EngineExhausted,
    EngineOverloaded,
    Token,
)
from loramux.server.engine.runner import Runner
from loramux.server.engine.sampler import Sampler
from tests.tiny import random_experts, random_prompt, running, tiny_llama


def test_leaving_frees_the_adapter_only_after_the_last_step_that_uses_it() -> None:
    model = tiny_llama()
    experts = random_experts(model, (4,))

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
    experts = random_experts(model, (4,))
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
                with pytest.raises(EngineExhausted, match="out of memory"):
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
