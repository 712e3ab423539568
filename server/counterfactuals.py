"""What routing did to a request: the loss of its own prompt under the base, the best expert and the blend.

The loss is the mean negative log-likelihood, in nats, of every prompt token but the first given those before
it, as the model reads them: the chat template, the system prompt and earlier turns are part of the prompt.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from loramux.adapters.blend import Blend
from loramux.adapters.errors import BlendError
from loramux.adapters.residency import Lease
from loramux.server.ask import Ask, Prompt
from loramux.server.engine.protocol import Engine, PromptScored, Sampling, TokenScore, Work
from loramux.server.leases import Leases
from loramux.server.selection import Selection, Selector

#: How long the best expert alone may wait for room beside the blend that is held meanwhile.
LEASE_SECONDS = 5.0
_BASE, _TOP1, _BLEND = "base", "top1", "blend"
#: Sums the loss of some prompts under one mixture.
_Losing = Callable[[], Coroutine[Any, Any, float]]
_SCORE = Sampling(max_tokens=0, temperature=0.0)


@dataclass(frozen=True, slots=True)
class Explanation:
    """Losses of the same tokens: sums over them, in nats.

    `top1` and `expert` are `None` where no expert stands first: nothing is weighted (a sparse model, a
    strategy that chooses token by token), or the base answers alone.
    """

    tokens: int
    base: float
    blend: float
    top1: float | None = None
    expert: str | None = None

    def body(self) -> dict[str, Any]:
        """The `explain` object of an answer; means, and null where the prompt is a single token."""
        top1 = None if self.top1 is None else {"expert": self.expert, **self._about(self.top1)}
        return {
            "tokens": self.tokens,
            _BASE: {"loss": self._mean(self.base)},
            _TOP1: top1,
            _BLEND: self._about(self.blend),
        }

    def _about(self, loss: float) -> dict[str, float | None]:
        return {"loss": self._mean(loss), "gain": self._mean(self.base - loss)}

    def _mean(self, total: float) -> float | None:
        return total / self.tokens if self.tokens else None


class Explaining:
    """An explanation that is being made beside an answer."""

    def __init__(self, others: asyncio.Task[Mapping[str, float]], expert: str | None) -> None:
        self._others = others
        self._expert = expert
        self._tokens = 0
        self._blend = 0.0

    def served(self, scores: Sequence[TokenScore]) -> None:
        """The served mixture's scores of one prompt, which its own sequence brings."""
        self._tokens += len(scores) - 1
        self._blend += nats(scores)

    def check(self) -> None:
        """Raises what has gone wrong so far, so that a client hears of it before an answer has begun."""
        if self._others.done():
            self._others.result()

    async def result(self) -> Explanation:
        """The whole, once all is scored.

        Raises:
            EngineError, BlendError: it could not be.
        """
        return _explanation(self._tokens, {**await self._others, _BLEND: self._blend}, self._expert)


class Counterfactuals:
    """Scores prompts under the mixtures that might have served them, all in the engine's batch."""

    def __init__(self, engine: Engine, leases: Leases, selector: Selector) -> None:
        self._engine = engine
        self._leases = leases
        self._selector = selector

    @asynccontextmanager
    async def beside(
        self, ask: Ask, selection: Selection, lease: Lease, job_id: str
    ) -> AsyncIterator[Explaining | None]:
        """Score base and best expert while the answer runs, where the request asks for it; each at most
        once, and neither where it is what serves. Leaving the context ends what is not done."""
        if not ask.explains:
            yield None
            return
        top1 = self._selector.top1(selection)
        scoring = asyncio.create_task(_together(self._alternatives(job_id, ask.prompts, top1, lease)))
        # Whoever leaves before the result has an error of its own to tell.
        scoring.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            yield Explaining(scoring, _expert(top1))
        finally:
            scoring.cancel()
            await asyncio.wait([scoring])

    async def measure(self, ask: Ask, selection: Selection, job_id: str) -> Explanation:
        """The same about a request that has been answered.

        Raises:
            EngineError, BlendError: it could not be scored (any more).
        """
        top1 = self._selector.top1(selection)
        async with self._leases.lease(self._selector.mixture(selection)) as lease:
            blend = partial(self._score, f"{job_id}-{_BLEND}", ask.prompts, lease.handle)
            scored: dict[str, _Losing] = {
                _BLEND: blend,
                **self._alternatives(job_id, ask.prompts, top1, lease),
            }
            losses = await _together(scored)
        tokens = sum(len(prompt.tokens) - 1 for prompt in ask.prompts)
        return _explanation(tokens, losses, _expert(top1))

    def _alternatives(
        self, job_id: str, prompts: Sequence[Prompt], top1: Blend | None, served: Lease
    ) -> dict[str, _Losing]:
        """What sums the losses under base and best expert, without what is served anyway."""
        found: dict[str, _Losing] = {}
        if served.handle is not None:
            found[_BASE] = partial(self._score, f"{job_id}-{_BASE}", prompts, None)
        if top1 is not None and top1.key != served.key:
            found[_TOP1] = partial(self._alone, f"{job_id}-{_TOP1}", prompts, top1)
        return found

    async def _alone(self, id: str, prompts: Sequence[Prompt], expert: Blend) -> float:
        leasing = self._leases.lease(expert)
        try:
            async with asyncio.timeout(LEASE_SECONDS):
                lease = await leasing.__aenter__()
        except TimeoutError:
            raise BlendError(
                "routing.explain: adapter memory has no room for the best expert beside the blend; "
                "try again, or raise residency.bytes"
            ) from None
        try:
            return await self._score(id, prompts, lease.handle)
        finally:
            await leasing.__aexit__(None, None, None)

    async def _score(self, id: str, prompts: Sequence[Prompt], handle: object) -> float:
        works = [
            Work(f"{id}-{number}", prompt.tokens, _SCORE, handle, prompt_logprobs=0)
            for number, prompt in enumerate(prompts)
        ]
        return sum((await _together({work.id: partial(self._run, work) for work in works})).values())

    async def _run(self, work: Work) -> float:
        total = 0.0
        async with aclosing(self._engine.run(work)) as events:
            async for event in events:
                if isinstance(event, PromptScored):
                    total = nats(event.scores)
        return total


async def _together(works: Mapping[str, _Losing]) -> dict[str, float]:
    """All of them at once; the first error ends the others and is raised as it is, in no group."""
    tasks = {name: asyncio.create_task(work()) for name, work in works.items()}
    try:
        await asyncio.gather(*tasks.values())
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
    return {name: task.result() for name, task in tasks.items()}


def nats(scores: Iterable[TokenScore]) -> float:
    """The summed loss of tokens; one without a score, the first of a prompt, does not count."""
    return -sum(score.logprob for score in scores if score.logprob is not None)


def _expert(top1: Blend | None) -> str | None:
    return None if top1 is None else top1.parts[0].expert_id


def _explanation(tokens: int, losses: Mapping[str, float], expert: str | None) -> Explanation:
    """What was not scored apart is what was served."""
    blend = losses[_BLEND]
    top1 = None if expert is None else losses.get(_TOP1, blend)
    return Explanation(tokens, losses.get(_BASE, blend), blend, top1, expert)
