"""Answers from behind vLLM, by value against PEFT."""

import asyncio

import pytest
import torch

from loramux.adapters.errors import BlendError
from loramux.server.engine.protocol import (
    EngineOverloaded,
    Finished,
    PromptScored,
    Sampling,
    Started,
    Token,
    Work,
)
from tests.backend_kit import (
    PROMPT,
    Behind,
    Oracle,
    Run,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


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
        one = await found.ask(found.blend(a=1.0), PROMPT, 8, ignore_eos=False, **options)
        two = await found.ask(found.blend(a=1.0), PROMPT, 8, ignore_eos=False, **options)
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


def test_cached_tokens_are_passed_on(run: Run) -> None:
    async def test(found: Behind) -> None:
        prompt = tuple(range(20, 31))
        blend, other = found.blend(a=1.0), found.blend(b=1.0)
        assert (await found.ask(blend, prompt)).finished.cached_tokens == 0
        assert (await found.ask(blend, prompt)).finished.cached_tokens == 8
        assert (await found.ask(blend, [*prompt[:6], 99])).finished.cached_tokens == 4
        assert (await found.ask(other, prompt)).finished.cached_tokens == 0
        # What a request of our own has computed for the scores is no gain.
        assert (await found.ask(blend, prompt, prompt_logprobs=0)).finished.cached_tokens == 0
        assert found.engine.stats().prefix_hit_tokens == 12
        found.fakes[0].prompt_tokens_details = False
        assert (await found.ask(blend, prompt)).finished.cached_tokens == 0

    run(test)


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
