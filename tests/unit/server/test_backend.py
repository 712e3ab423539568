"""Blends in front of vLLM: by value against PEFT, and through everything that a foreign server can do."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux.adapters.blend import Blend
from loramux.adapters.errors import BlendError
from loramux.adapters.lora import LoraAdapter
from loramux.server.backend.errors import BackendDown, BackendError
from loramux.server.backend.folders import PREFIX, BlendFolders
from loramux.server.engine.protocol import (
    EngineOverloaded,
    Finished,
    GrammarError,
    PromptScored,
    Sampling,
    Started,
    Token,
    Work,
)
from loramux.server.errors import StartError
from tests.backend_kit import BASE, Behind, Oracle, behind, fakes_of, save_base, save_experts
from tests.fake_vllm import FakeVllm, listening

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
PROMPT = (5, 60, 71, 8, 200)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("backend")
    save_base(root / "base")
    return root


@pytest.fixture(scope="module")
def experts(place: Path) -> dict[str, LoraAdapter]:
    return save_experts(place / "experts", place / "base", {"a": 4, "b": 6, "c": 3, "d": 20})


@pytest.fixture(scope="module")
def oracle(place: Path, experts: dict[str, LoraAdapter]) -> Oracle:
    return Oracle(place / "base", {name: place / "experts" / name for name in experts})


@pytest.fixture(scope="module")
def running(place: Path) -> Iterator[tuple[list[FakeVllm], list[str]]]:
    with fakes_of(place / "base", 2) as found:
        yield found


@pytest.fixture
def servers(running: tuple[list[FakeVllm], list[str]]) -> tuple[list[FakeVllm], list[str]]:
    for fake in running[0]:
        fake.restart()
        fake.calls.clear()
        fake.bodies.clear()
        fake.refuse = fake.break_after = None
    return running


Test = Callable[[Behind], Coroutine[Any, Any, None]]
Run = Callable[..., None]


@pytest.fixture
def run(tmp_path: Path, servers: tuple[list[FakeVllm], list[str]], experts: dict[str, LoraAdapter]) -> Run:
    """Run a test on the first `count` servers."""

    def go(test: Test, count: int = 1, **room: Any) -> None:
        async def main() -> None:
            fakes, urls = servers
            async with behind(
                tmp_path / "blends", fakes[:count], urls[:count], dict(experts), **room
            ) as found:
                await test(found)

        asyncio.run(main())

    return go


def written(found: Behind) -> list[Path]:
    return sorted(found.folders.root.glob(f"{PREFIX}*"))


def ours(fake: FakeVllm) -> list[str]:
    return [name for action, name in fake.calls if action == "load"]


@pytest.mark.parametrize(
    "weights", [{}, {"a": 1.0}, {"a": 0.71, "b": 0.29}, {"a": 0.5, "b": -0.3, "c": 1.2}], ids=str
)
def test_log_probabilities_are_those_of_pefts_concatenation(
    run: Run, oracle: Oracle, weights: dict[str, float]
) -> None:
    async def test(found: Behind) -> None:
        answer = await found.ask(found.blend(**weights), PROMPT, 6, logprobs=3)
        rows = oracle.logprobs(weights, [*PROMPT, *answer.tokens])[len(PROMPT) - 1 : -1]
        assert answer.tokens == rows.argmax(dim=-1).tolist()
        for score, row in zip(answer.scores, rows, strict=True):
            assert score.logprob == pytest.approx(float(row[score.id]), abs=1e-4)
            best = torch.topk(row, 3)
            assert [id for id, _ in score.top] == best.indices.tolist()
            assert [value for _, value in score.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert isinstance(answer.events[0], Started)
        assert answer.finished == Finished("length")

    run(test)


def test_the_prompt_is_scored_by_the_same_blend(run: Run, oracle: Oracle) -> None:
    async def test(found: Behind) -> None:
        weights = {"a": 0.6, "c": 0.4}
        for tokens in (0, 2):
            answer = await found.ask(found.blend(**weights), PROMPT, tokens, prompt_logprobs=2)
            kinds = [type(event) for event in answer.events]
            assert kinds == [Started, PromptScored, *[Token] * tokens, Finished]
            scored = answer.events[1]
            assert isinstance(scored, PromptScored)
            rows = oracle.logprobs(weights, PROMPT)
            assert [score.id for score in scored.scores] == list(PROMPT)
            assert scored.scores[0].logprob is None
            for score, row in zip(scored.scores[1:], rows[:-1], strict=True):
                assert score.logprob == pytest.approx(float(row[score.id]), abs=1e-4)
                assert [id for id, _ in score.top] == torch.topk(row, 2).indices.tolist()

    run(test)


def test_a_stop_token_ends_and_is_no_token_of_the_answer(run: Run, oracle: Oracle) -> None:
    async def test(found: Behind) -> None:
        blend = found.blend(a=1.0)
        free = await found.ask(blend, PROMPT, 5)
        stop = free.tokens[2]
        first = free.tokens.index(stop)
        ended = await found.ask(blend, PROMPT, 5, stop_token_ids=frozenset({stop}))
        assert ended.tokens == free.tokens[:first]
        assert (ended.finished.reason, ended.finished.stop_token) == ("stop", stop)
        row = oracle.logprobs({"a": 1.0}, [*PROMPT, *ended.tokens])[-1]
        assert ended.finished.score is not None
        assert ended.finished.score.logprob == pytest.approx(float(row[stop]), abs=1e-4)

    run(test)


def test_every_parameter_is_sent_so_that_the_servers_defaults_have_no_say(run: Run) -> None:
    async def test(found: Behind) -> None:
        options = {
            "temperature": 0.8, "top_p": 0.9, "top_k": 7, "min_p": 0.05, "seed": 11, "logprobs": None,
            "presence_penalty": 0.1, "frequency_penalty": 0.2, "repetition_penalty": 1.1,
            "logit_bias": {9: 3.0}, "stop_token_ids": frozenset({17}),
        }  # fmt: skip
        one = await found.ask(found.blend(a=1.0), PROMPT, 8, **options)
        two = await found.ask(found.blend(a=1.0), PROMPT, 8, **options)
        assert one.tokens == two.tokens
        assert all(score.logprob is None for score in one.scores)
        body = found.fakes[0].bodies[-1]
        for name in ("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty"):
            assert body[name] == options[name]
        assert (body["presence_penalty"], body["frequency_penalty"]) == (0.1, 0.2)
        assert body["logit_bias"] == {"9": 3.0}
        assert body["stop_token_ids"] == [2, 17]
        assert body["ignore_eos"] is True
        assert "logprobs" not in body
        await found.ask(found.blend(a=1.0), PROMPT, 1, ignore_eos=True, temperature=1e-7)
        assert found.fakes[0].bodies[-1]["stop_token_ids"] == []
        assert found.fakes[0].bodies[-1]["temperature"] == 0.0

    run(test)


def test_a_blend_is_written_and_loaded_once_under_its_digest(run: Run) -> None:
    async def test(found: Behind) -> None:
        blends = [found.blend(a=0.5, b=0.5), found.blend(b=0.5, a=0.5)]
        answers = await asyncio.gather(*(found.ask(blend, PROMPT) for blend in blends * 4))
        assert len({tuple(answer.tokens) for answer in answers}) == 1
        (folder,) = written(found)
        assert found.fakes[0].calls == [("load", folder.name)]
        assert found.fakes[0].adapters == {folder.name: str(folder)}
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (16, 16, {})
        assert config["base_model_name_or_path"] == BASE
        async with found.residency.lease(blends[0]) as lease:
            assert (lease.cached, lease.rank, lease.method, lease.relative_error) == (True, 10, "exact", 0.0)
            assert lease.key == blends[0].key

    run(test)


def test_the_oldest_blend_is_unloaded_below_the_servers_number(run: Run) -> None:
    async def test(found: Behind) -> None:
        weights = [{"a": 1.0}, {"b": 1.0}, {"c": 1.0}, {"a": 0.5, "b": 0.5}]
        for one in weights[:2]:
            await found.ask(found.blend(**one))
        await found.ask(found.blend(a=1.0))  # now b is the oldest
        await found.ask(found.blend(**weights[2]))
        fake = found.fakes[0]
        assert [action for action, _ in fake.calls] == ["load", "load", "unload", "load"]
        assert fake.calls[2][1] == fake.calls[1][1]
        await asyncio.gather(*(found.ask(found.blend(**one)) for one in weights * 2))
        assert len(fake.adapters) == 2
        assert len(written(found)) == 4

    run(test, adapters=2)


def test_what_is_in_use_is_never_unloaded_and_the_rest_waits(run: Run) -> None:
    async def test(found: Behind) -> None:
        async with found.residency.lease(found.blend(a=1.0)):
            waiting = asyncio.create_task(found.ask(found.blend(b=1.0)))
            for _ in range(50):
                await asyncio.sleep(0.01)
            assert not waiting.done()
            assert len(found.fakes[0].adapters) == 1
        assert len((await waiting).tokens) == 4

    run(test, adapters=1)


def test_adapters_of_others_are_left_alone(run: Run, place: Path, servers: Any) -> None:
    fake = servers[0][0]
    fake._load("theirs", str(place / "experts" / "a"))

    async def test(found: Behind) -> None:
        await found.ask(found.blend(a=1.0))
        await found.ask(found.blend(b=1.0))
        assert "theirs" in fake.adapters
        assert len(fake.adapters) == 2

    run(test, adapters=2)

    async def full(found: Behind) -> None:
        with pytest.raises(BackendError, match="adapters are not loramux's"):
            await found.ask(found.blend(a=1.0))

    fake.adapters.pop(next(name for name in fake.adapters if name != "theirs"))
    run(full, adapters=1)


def test_directories_stay_below_their_limit_of_bytes(run: Run) -> None:
    async def test(found: Behind) -> None:
        await found.ask(found.blend(a=1.0))
        size = found.folders.nbytes
        found.residency._room = type(found.residency._room)((1, 8, 16, 32), 4, int(2.9 * size) + 2**16)
        for number in range(1, 6):
            await found.ask(found.blend(a=number / 8))
            held = sum(file.stat().st_size for folder in written(found) for file in folder.iterdir())
            assert held == found.folders.nbytes <= 2.9 * size + 2**16
        # What was deleted was unloaded before: the server could not read it again.
        assert set(found.fakes[0].adapters) <= {folder.name for folder in written(found)}
        assert found.residency.stats().evictions >= 2
        found.residency._room = type(found.residency._room)((1, 8, 16, 32), 4, 1000)
        with pytest.raises(BlendError, match=r"backend.bytes is 1000"):
            await found.ask(found.blend(b=0.25))

    run(test)


def test_a_restart_is_repaired_by_loading_again(run: Run) -> None:
    async def test(found: Behind) -> None:
        blend = found.blend(a=0.7, b=0.3)
        before = await found.ask(blend, PROMPT)
        found.fakes[0].restart()
        after = await asyncio.gather(*(found.ask(blend, PROMPT) for _ in range(4)))
        assert [answer.tokens for answer in after] == [before.tokens] * 4
        assert len(set(ours(found.fakes[0]))) == 1

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
        blends = [found.blend(a=number / 16) for number in range(1, 9)]
        for blend in blends * 2:
            await found.ask(blend, PROMPT)
        loads = [ours(fake) for fake in found.fakes]
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

    run(test, count=2, adapters=8)


def test_a_backend_that_comes_back_gets_its_share_again(run: Run) -> None:
    async def test(found: Behind) -> None:
        blends = [found.blend(a=number / 16) for number in range(1, 9)]
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

    run(test, count=2, adapters=8)


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
            assert not ours(found.fakes[0])
        finally:
            found.fakes[0].name, found.fakes[0].root = BASE, None

    run(test, count=2, adapters=8)


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


def test_a_wide_blend_is_approximated_or_refused(run: Run) -> None:
    async def approximate(found: Behind) -> None:
        async with found.residency.lease(found.blend(a=0.5, d=0.5)) as lease:
            assert (lease.method, lease.rank) == ("svd", 16)
            assert 0 < lease.relative_error < 1

    run(approximate, ranks=(1, 8, 16))

    async def refuse(found: Behind) -> None:
        with pytest.raises(BlendError, match="rank 24 and the backend takes 16"):
            await found.ask(found.blend(a=0.5, d=0.5))
        with pytest.raises(BlendError, match="expert 'wide' has rank 20"):
            found.residency.add_expert(LoraAdapter("wide", "hash", found.experts["d"].pairs))

    # The same folder: an approximation that was left there is not what may be answered now.
    run(refuse, ranks=(1, 8, 16), truncate=False)


def test_experts_come_and_go(run: Run) -> None:
    async def test(found: Behind) -> None:
        blend = found.blend(b=1.0)
        expert = found.experts["b"]
        found.residency.remove_expert("b")
        with pytest.raises(BlendError, match="'b' is not in the pool"):
            await found.ask(blend)
        with pytest.raises(BlendError, match="no expert 'b'"):
            found.residency.remove_expert("b")
        found.residency.add_expert(expert)
        with pytest.raises(BlendError, match="loaded already"):
            found.residency.add_expert(expert)
        assert len((await found.ask(blend)).tokens) == 4

    run(test)


def test_what_an_earlier_process_left_is_used(run: Run, tmp_path: Path) -> None:
    async def first(found: Behind) -> None:
        await found.ask(found.blend(a=0.5, b=0.5))
        unfinished = found.folders.root / ".writing-1"
        unfinished.mkdir()
        (found.folders.root / f"{PREFIX}{'ab' * 16}").mkdir()

    async def second(found: Behind) -> None:
        assert len(written(found)) == 1
        assert not list(found.folders.root.glob(".writing*"))
        async with found.residency.lease(found.blend(a=0.5, b=0.5)) as lease:
            assert (lease.cached, lease.rank) == (True, 10)
        assert len(ours(found.fakes[0])) == 1

    run(first)
    run(second)


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    folders = BlendFolders(tmp_path / "blends")
    with pytest.raises(StartError, match="in use by another loramux"):
        BlendFolders(tmp_path / "blends")
    folders.close()
    BlendFolders(tmp_path / "blends").close()
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match=r"backend\.folder"):
        BlendFolders(tmp_path / "file")


def test_an_aborted_sequence_leaves_nothing(run: Run) -> None:
    async def test(found: Behind) -> None:
        tasks = [asyncio.create_task(found.ask(found.blend(a=1.0), PROMPT, 200)) for _ in range(3)]
        while not found.fakes[0].bodies[1:]:
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        assert all(
            isinstance(e, asyncio.CancelledError)
            for e in await asyncio.gather(*tasks, return_exceptions=True)
        )
        assert found.engine.stats().running == found.engine.stats().waiting == 0

    run(test)


def test_foreign_handles_and_too_many_sequences_are_refused(run: Run) -> None:
    async def test(found: Behind) -> None:
        work = Work("x", PROMPT, Sampling(max_tokens=1), object())
        with pytest.raises(BlendError, match="inside the base"):
            await anext(found.engine.run(work))
        found.engine._most = 0
        with pytest.raises(EngineOverloaded):
            await anext(found.engine.run(work))

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
