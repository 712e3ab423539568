"""Whether an engine gives a token the same in an answer, beside other answers and in a prompt."""

import asyncio

from loramux.server.engine.protocol import Engine, EngineError, PromptScored, Sampling, Token, Work

#: Answers at once, and tokens of each.
ANSWERS, LENGTH = 3, 24


async def check_alike(engine: Engine, context: int, base: str) -> None:
    """Let a started engine answer, and score the same tokens as prompts: log-probabilities have to be equal
    to the last bit. Parts of a base of which we have no form of our own may compute tokens otherwise.

    Args:
        context: the most tokens of a sequence.
        base: what the error calls it.

    Raises:
        EngineError: they differ.
    """
    length = min(LENGTH, context - 2)
    answers = await asyncio.gather(*(_answer(engine, first, length) for first in range(ANSWERS)))
    for first, answer in enumerate(answers):
        prompt = (first, *(token.score.id for token in answer))
        work = Work(f"prompt {first}", prompt, Sampling(max_tokens=1, temperature=0.0), prompt_logprobs=0)
        [scored] = [event async for event in engine.run(work) if isinstance(event, PromptScored)]
        if [score.logprob for score in scored.scores[1:]] != [token.score.logprob for token in answer]:
            raise EngineError(
                f"engine.batch_invariant: {base} computes a token of an answer otherwise than one of a prompt"
            )


async def _answer(engine: Engine, first: int, length: int) -> list[Token]:
    sampling = Sampling(max_tokens=length, temperature=0.0, ignore_eos=True, logprobs=0)
    work = Work(f"answer {first}", (first,), sampling)
    return [event async for event in engine.run(work) if isinstance(event, Token)]
