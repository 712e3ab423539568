"""A sequence that goes on after tokens which another engine chose says what it would have said there."""

import asyncio
from typing import Any

import pytest

from loramux.server.engine.grammars import Grammars
from loramux.server.engine.protocol import (
    EngineOverloaded,
    Finished,
    GrammarError,
    PromptScored,
    Sampling,
    Work,
)
from loramux.server.text.grammar import choice_grammar, regex_grammar
from tests.kit import byte_tokenizer
from tests.tiny import Answer, Rig, random_experts, random_prompt, running, tiny_llama

TOKENIZER = byte_tokenizer()
SIZE = len(TOKENIZER)
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 7},
    "seeded top-p and top-k": {"temperature": 0.9, "seed": 8, "top_p": 0.8, "top_k": 40},
    "penalties": {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    "bias": {"logit_bias": {5: 3.0}, "temperature": 1.0, "seed": 9},
    "grammar": {"grammar": regex_grammar("[a-m ]{40,60}"), "temperature": 1.0, "seed": 10},
    "log-probabilities": {"logprobs": 3},
}


async def resumed(rig: Rig, prompt: tuple[int, ...], before: list[int], **options: Any) -> Answer:
    grammar = options.pop("grammar", None)
    sampling = Sampling(**{"max_tokens": 24, "temperature": 0.0, **options})
    async with rig.residency.lease(rig.blend({"a": 0.7, "b": 0.3})) as lease:
        work = Work("again", prompt, sampling, lease.handle, grammar=grammar, answered=tuple(before))
        return Answer([event async for event in rig.engine.run(work)])


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_at_any_token_as_if_nothing_had_been(kind: str) -> None:
    model = tiny_llama(vocab_size=SIZE)
    prompt = tuple(token % SIZE for token in random_prompt(21))
    options = KINDS[kind]

    async def run() -> None:
        grammars = Grammars(TOKENIZER, (), SIZE)
        async with running(model, random_experts(model, (4, 4)), grammars=grammars) as rig:
            whole = await rig.ask(prompt, {"a": 0.7, "b": 0.3}, **options)
            count = len(whole.tokens)
            assert count == 24
            for cut in (0, 1, 7, 23):
                rest = await resumed(rig, prompt, whole.tokens[:cut], **options)
                assert rest.tokens == whole.tokens[cut:]
                assert rest.finished == whole.finished
                for one, other in zip(rest.scores, whole.scores[cut:], strict=True):
                    if other.logprob is not None:
                        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
                        assert [token for token, _ in one.top] == [token for token, _ in other.top]

    asyncio.run(run())


def test_one_whose_last_token_had_come_only_ends() -> None:
    model = tiny_llama(vocab_size=SIZE)

    async def run() -> None:
        grammars = Grammars(TOKENIZER, (), SIZE)
        async with running(model, random_experts(model, (4, 4)), grammars=grammars) as rig:
            full = await resumed(rig, (5, 6), [1] * 24)
            assert full.events == [Finished("length")]
            word = TOKENIZER("the", add_special_tokens=False)["input_ids"]
            steps = rig.engine.stats().steps
            said = await resumed(rig, (5, 6), word, grammar=choice_grammar(["the"]))
            assert said.events == [Finished("stop")]
            assert rig.engine.stats().steps == steps
            with pytest.raises(GrammarError, match="follows the grammar"):
                await resumed(rig, (5, 6), word, grammar=choice_grammar(["a"]))

    asyncio.run(run())


def test_it_has_its_place_however_full_the_queue_is_and_scores_its_prompt_once_more() -> None:
    model = tiny_llama()

    async def run() -> None:
        async with running(model, max_running=1, max_waiting=1) as rig:
            tasks = []
            for count in (1, 2):
                tasks.append(asyncio.create_task(rig.ask(random_prompt(9), max_tokens=400)))
                async with asyncio.timeout(60):
                    while len(rig.engine._sequences) < count or not rig.engine.stats().running:
                        await asyncio.sleep(0)
            with pytest.raises(EngineOverloaded):
                await rig.ask(random_prompt(9))
            work = Work("again", (4, 5, 6), Sampling(max_tokens=2), prompt_logprobs=0, answered=())
            events = [event async for event in rig.engine.run(work)]
            assert sum(isinstance(event, PromptScored) for event in events) == 1
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())
