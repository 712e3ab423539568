"""Step 5 of a request: its sequences through the engine, as text."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from loramux.server.ask import Ask
from loramux.server.ask import Sequence as AskSequence
from loramux.server.engine.protocol import Engine, Finished, PromptScored, Started, Token, TokenScore, Work
from loramux.server.events import Delta, ScoredToken
from loramux.server.text.detokenizer import Detokenizer
from loramux.server.text.stops import StopScanner
from loramux.server.text.tool_calls import TextReader
from loramux.server.text.vocabulary import Vocabulary

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Begun:
    """The engine began a sequence."""

    index: int


@dataclass(frozen=True, slots=True)
class Cached:
    """So many tokens of a sequence's prompt needed no prefill."""

    index: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Scored:
    """The prompt of a sequence under what serves it, for the explanation that was asked for."""

    scores: tuple[TokenScore, ...]


async def decode(
    engine: Engine, vocabulary: Vocabulary, ask: Ask, job_id: str, adapter: object
) -> AsyncGenerator[Begun | Cached | Scored | Delta]:
    """All sequences of `ask` at once, their events as they come.

    Closing it aborts every sequence and returns when the engine has let go of all of them.
    """
    streams = [
        _sequence(engine, vocabulary, ask, sequence, f"{job_id}-{sequence.index}", adapter)
        for sequence in ask.sequences()
    ]
    async with aclosing(interleave(streams)) as items:
        async for item in items:
            yield item


async def _sequence(
    engine: Engine, vocabulary: Vocabulary, ask: Ask, sequence: AskSequence, work_id: str, adapter: object
) -> AsyncGenerator[Begun | Cached | Scored | Delta]:
    index, prompt = sequence.index, sequence.prompt
    detokenizer = Detokenizer(vocabulary, frozenset() if ask.tools is None else ask.tools.visible)
    stops = StopScanner(ask.stop)
    reader = TextReader() if ask.tools is None else ask.tools.reader(vocabulary, prompt.tokens)
    work = Work(work_id, prompt.tokens, sequence.sampling, adapter, sequence.prompt_logprobs, ask.grammar)
    async with aclosing(engine.run(work)) as events:
        async for event in events:
            match event:
                case Started():
                    yield Begun(index)
                    yield Cached(index, event.cached_tokens)
                    if ask.echo and ask.prompt_logprobs is None:
                        yield Delta(index, prompt.text, echo=True)
                case PromptScored():
                    if sequence.explains:
                        yield Scored(event.scores)
                    if ask.prompt_logprobs is not None:
                        yield Delta(index, prompt.text, _echoed(vocabulary, event.scores), echo=True)
                case Token():
                    text = detokenizer.feed(event.score.id)
                    said = reader.feed(stops.feed(text))
                    # Leaving the loop closes the run: what ends the sequence here ends it in the engine.
                    ended = reader.ended or stops.matched is not None
                    said = said + reader.finish() if ended else said
                    finish = reader.ending("stop") if ended else None
                    yield Delta(index, said.text, (ScoredToken(event.score, text),), finish, calls=said.calls)
                    if ended:
                        return
                case Finished():
                    yield Cached(index, event.cached_tokens)
                    # An end token has no text, but whoever sums up log-probabilities needs its entry.
                    last = () if event.score is None or not ask.score_end else (ScoredToken(event.score, ""),)
                    said = reader.feed(stops.feed(detokenizer.finish()) + stops.finish()) + reader.finish()
                    finish = reader.ending(event.reason)
                    yield Delta(index, said.text, last, finish, calls=said.calls)


def _echoed(vocabulary: Vocabulary, scores: Sequence[TokenScore]) -> tuple[ScoredToken, ...]:
    detokenizer = Detokenizer(vocabulary)
    return tuple(ScoredToken(score, detokenizer.feed(score.id)) for score in scores)


@dataclass(frozen=True, slots=True)
class _Ended:
    error: Exception | None = None


async def interleave(streams: Sequence[AsyncGenerator[Item]]) -> AsyncGenerator[Item]:
    """Items of all streams as they come; an error in one closes the others and is raised."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield item
        return
    queue: asyncio.Queue[Item | _Ended] = asyncio.Queue()

    async def drain(stream: AsyncGenerator[Item]) -> None:
        try:
            async with aclosing(stream) as items:
                async for item in items:
                    queue.put_nowait(item)
        except Exception as error:
            queue.put_nowait(_Ended(error))
        else:
            queue.put_nowait(_Ended())

    tasks = [asyncio.create_task(drain(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            found = await queue.get()
            if not isinstance(found, _Ended):
                yield found
            elif found.error is not None:
                raise found.error
            else:
                running -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
