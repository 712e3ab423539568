"""Servers that start anew, break off, refuse, or are others than was said."""

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from loramux.adapters.blend import Blend
from loramux.adapters.lora import LoraAdapter
from loramux.server.backend.errors import BackendDown, BackendError
from loramux.server.engine.protocol import (
    EngineOverloaded,
    GrammarError,
)
from tests.backend_kit import (
    BASE,
    PROMPT,
    Behind,
    Run,
    behind,
    loaded_at,
    written,
)
from tests.fake_vllm import FakeVllm, listening

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def test_a_restart_is_repaired_by_loading_again(run: Run) -> None:
    async def test(found: Behind) -> None:
        blend = found.blend(a=0.7, b=0.3)
        before = await found.ask(blend, PROMPT)
        found.fakes[0].restart()
        after = await asyncio.gather(*(found.ask(blend, PROMPT) for _ in range(4)))
        assert [answer.tokens for answer in after] == [before.tokens] * 4
        assert len(set(loaded_at(found.fakes[0]))) == 1

    run(test)


def test_a_restart_with_another_base_is_told(run: Run, servers: Any) -> None:
    async def test(found: Behind) -> None:
        await found.ask(found.blend(a=1.0))
        fake = found.fakes[0]
        fake.restart()
        fake.name, fake.root = "other-base", "/models/other"
        try:
            with pytest.raises(BackendError, match=r"serves 'other-base' .*the pool is for 'tiny-base'"):
                await found.ask(found.blend(a=1.0))
        finally:
            fake.name, fake.root = BASE, None
        await found.ask(found.blend(a=1.0))

    run(test)


def test_a_blend_has_its_home_and_another_when_that_is_gone(run: Run) -> None:
    async def test(found: Behind) -> None:
        blends = [found.blend(a=number / 16) for number in range(1, 17)]
        for blend in blends * 2:
            await found.ask(blend, PROMPT)
        loads = [loaded_at(fake) for fake in found.fakes]
        assert sorted(loads[0] + loads[1]) == sorted(folder.name for folder in written(found))
        assert min(map(len, loads)) >= 1
        found.fakes[0].refuse = 503
        answers = [await found.ask(blend, PROMPT) for blend in blends]
        assert all(len(answer.tokens) == 4 for answer in answers)
        bare = await found.ask(Blend.bare(), PROMPT)
        assert len(bare.tokens) == 4
        found.fakes[1].refuse = 503
        with pytest.raises(BackendDown, match="503"):
            await found.ask(blends[0], PROMPT)
        found.fakes[0].refuse = found.fakes[1].refuse = None
        assert (await found.ask(blends[0], PROMPT)).tokens == answers[0].tokens

    run(test, count=2, adapters=16)


def test_a_backend_that_comes_back_gets_its_share_again(run: Run) -> None:
    async def test(found: Behind) -> None:
        blends = [found.blend(a=number / 32) for number in range(1, 17)]
        first, second = found.fleet.members
        found.fakes[0].refuse = 503
        for blend in blends:
            await found.ask(blend)
        assert first.down is not None
        assert second.down is None
        found.fakes[0].refuse = None
        async with asyncio.timeout(20):
            while first.down is not None:
                await asyncio.sleep(0.01)
        count = len(found.fakes[0].bodies)
        for blend in blends:
            await found.ask(blend)
        assert len(found.fakes[0].bodies) > count

    run(test, count=2, adapters=16)


def test_one_that_dies_is_missed_though_nobody_asks(run: Run) -> None:
    async def test(found: Behind) -> None:
        first, second = found.fleet.members
        found.fakes[0].refuse = 503
        async with asyncio.timeout(20):
            while first.down is None:
                await asyncio.sleep(0.01)
            assert found.engine.stats().is_live
            found.fakes[1].refuse = 503
            while second.down is None:
                await asyncio.sleep(0.01)
        assert second.down in (found.engine.stats().stalled or "")
        found.fakes[1].refuse = None
        async with asyncio.timeout(20):
            while not found.engine.stats().is_live:
                await asyncio.sleep(0.01)

    run(test, count=2)


def test_a_backend_with_another_base_is_passed_over(run: Run) -> None:
    async def test(found: Behind) -> None:
        for fake in found.fakes:
            fake.restart()
        found.fakes[0].name, found.fakes[0].root = "other-base", "/models/other"
        for member in found.fleet.members:
            member.lost("as if it had been")
        try:
            for number in range(1, 9):
                await found.ask(found.blend(a=number / 16))
            assert not loaded_at(found.fakes[0])
        finally:
            found.fakes[0].name, found.fakes[0].root = BASE, None

    run(test, count=2, adapters=8)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logprobs": 2},
        {"prompt_logprobs": 1},
        {"repetition_penalty": 1.3, "logit_bias": {9: 1.0}, "seed": 3},
        {"temperature": 1.0},  # without a seed: some tokens, as many as were asked for
    ],
    ids=str,
)
@pytest.mark.parametrize("after", [0, 1, 4])
def test_an_answer_that_breaks_off_goes_on_at_another_backend(
    run: Run, after: int, options: dict[str, Any]
) -> None:
    async def test(found: Behind) -> None:
        blend = found.blend(a=0.6, b=0.4)
        expected = await found.ask(blend, PROMPT, 6, **options)
        home = next(fake for fake in found.fakes if loaded_at(fake))
        other = next(fake for fake in found.fakes if fake is not home)
        home.break_after = after
        answer = await found.ask(blend, PROMPT, 6, **options)
        assert [type(event) for event in answer.events] == [type(event) for event in expected.events]
        if options.get("temperature") is None:
            assert answer.tokens == expected.tokens
            for own, theirs in zip(answer.scores, expected.scores, strict=True):
                assert own.logprob == pytest.approx(theirs.logprob, abs=1e-5)
        assert answer.finished.reason == expected.finished.reason
        last = other.bodies[-1]
        assert last["prompt"] == [*PROMPT, *answer.tokens[:after]]
        assert last["max_tokens"] == 6 - after
        scored = [body for fake in found.fakes for body in fake.bodies if "prompt_logprobs" in body]
        assert len(scored) == 2 * ("prompt_logprobs" in options)

    run(test, count=2)


def test_a_lost_backend_whose_answer_was_whole_ends_it(run: Run) -> None:
    async def test(found: Behind) -> None:
        found.fakes[0].break_after = 6  # before the usage
        assert len((await found.ask(found.blend(a=1.0), PROMPT, 6)).tokens) == 6
        assert found.fleet.members[0].down is None

    run(test)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 1.0, "seed": 5}, {"presence_penalty": 0.5}, {"frequency_penalty": 0.5}],
    ids=str,
)
def test_what_counts_the_tokens_of_an_answer_is_not_gone_on_with(run: Run, options: dict[str, Any]) -> None:
    async def test(found: Behind) -> None:
        blend = found.blend(a=0.6, b=0.4)
        expected = await found.ask(blend, PROMPT, 6, **options)
        home = next(fake for fake in found.fakes if loaded_at(fake))
        home.break_after = 2
        with pytest.raises(BackendDown):
            await found.ask(blend, PROMPT, 6, **options)
        # Before its first token there is nothing to go on with: it is sent again.
        home.break_after = 0
        assert (await found.ask(blend, PROMPT, 6, **options)).tokens == expected.tokens

    run(test, count=2)


def test_an_answer_that_breaks_off_everywhere_is_told(run: Run) -> None:
    async def test(found: Behind) -> None:
        blend = found.blend(a=1.0)
        await found.ask(blend, PROMPT, 6)
        for fake in found.fakes:
            fake.break_after = 2
            fake.bodies.clear()
        with pytest.raises(BackendDown, match=r"127.0.0.1:\d+: .*; backend http://127.0.0.1:\d+: "):
            await found.ask(blend, PROMPT, 6)
        asked = [body["prompt"] for fake in found.fakes for body in fake.bodies]
        ours = sorted(len(prompt) for prompt in asked if tuple(prompt[: len(PROMPT)]) == PROMPT)
        assert ours == [len(PROMPT), len(PROMPT) + 2]

    run(test, count=2)


def test_an_answer_that_breaks_off_is_told_and_not_repeated(run: Run) -> None:
    async def test(found: Behind) -> None:
        await found.ask(found.blend(a=1.0))
        found.fakes[0].break_after = 2
        count = len(found.fakes[0].bodies)
        with pytest.raises(BackendDown, match=r"backend http://127.0.0.1:\d+: "):
            await found.ask(found.blend(a=1.0), PROMPT, 6)
        assert len(found.fakes[0].bodies) == count + 1
        found.fakes[0].break_after = None
        assert len((await found.ask(found.blend(a=1.0), PROMPT, 6)).tokens) == 6

    run(test)


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (429, EngineOverloaded, "queue"),
        (500, BackendError, "answered 500: no"),
        (400, BackendError, "400: no"),
    ],
)
def test_refusals_are_told(run: Run, status: int, error: type[Exception], message: str) -> None:
    async def test(found: Behind) -> None:
        await found.ask(found.blend(a=1.0))
        found.fakes[0].refuse = status
        with pytest.raises(error, match=message):
            await found.ask(found.blend(a=1.0))
        if status == 400:
            with pytest.raises(GrammarError):
                await found.ask(found.blend(a=1.0), grammar="start: /a/")

    run(test)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "x", "root": "/models/x"}, "serves 'x' .from /models/x., and the pool is for 'tiny-base'"),
        ({"token_ids": False}, "no token_ids; vLLM 0.10.2 or newer"),
        ({"raw_logprobs": False}, "--logprobs-mode raw_logprobs"),
        ({"key": "secret"}, "401"),
    ],
    ids=["another base", "old", "processed", "key"],
)
def test_a_server_that_will_not_do_stops_the_start(
    place: Path, tmp_path: Path, experts: dict[str, LoraAdapter], fields: dict[str, Any], message: str
) -> None:
    fake = FakeVllm(place / "base", **{"name": BASE, **fields})

    async def main(url: str) -> None:
        async with behind(tmp_path, [fake], [url], experts):
            raise AssertionError("it started")

    with ExitStack() as stack:
        url = stack.enter_context(listening(fake))
        with pytest.raises(BackendError, match=message):
            asyncio.run(main(url))


def test_a_server_that_is_not_there_is_named(
    place: Path, tmp_path: Path, experts: dict[str, LoraAdapter]
) -> None:
    async def main() -> None:
        async with behind(tmp_path, [FakeVllm(place / "base")], ["http://127.0.0.1:9"], experts):
            raise AssertionError("it started")

    with pytest.raises(BackendDown, match=r"backend http://127\.0\.0\.1:9: "):
        asyncio.run(main())
