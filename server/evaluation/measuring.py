"""Items through the serving engine: losses, greedy answers and the likelihoods of choices, many at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from loramux.adapters.blend import Blend
from loramux.adapters.sparse.token_mixtures import TokenMixture
from loramux.adapters.training.chat import EncodedRow, encode_rows
from loramux.server.engine.protocol import PromptScored, Sampling, Token, Work
from loramux.server.evaluation.items import AnswerItem, ChoiceItem, Item
from loramux.server.evaluation.ledger import Ledger
from loramux.server.evaluation.score import Score
from loramux.server.evaluation.systems import System
from loramux.server.leases import Mixture, SparseChoice
from loramux.server.parts import Parts

#: Called with how many items are done, and of how many.
Progress = Callable[[int, int], None]
Asked = TypeVar("Asked")


class Measuring:
    """Scores items under mixtures with the parts of a server whose engine runs."""

    def __init__(self, parts: Parts, tokenizer: Any, *, max_tokens: int, max_new: int) -> None:
        """`max_tokens`: longer rows lose the end of their answer. `max_new`: rows with a longer answer are
        not asked for an exact match; 0 asks none."""
        self._parts = parts
        self._tokenizer = tokenizer
        self._max_tokens = min(max_tokens, parts.engine.max_context)
        self._max_new = max_new
        self._count = 0

    async def run(
        self,
        systems: Sequence[System],
        items: Sequence[Item],
        ledger: Ledger,
        progress: Progress = lambda *_: None,
    ) -> Mapping[tuple[str, str], Score]:
        """Every system on every item: (system's name, item's id) -> score.

        What several systems answer by the same mixture is measured once.

        Raises:
            EngineError, RouterError, AdapterError: whatever serving them raises.
        """
        selector = self._parts.selector
        asked: dict[tuple[str, str], tuple[Mixture, Item]] = {}
        prompts = {item.id: self._prompt(item) for item in items}
        width = self._parts.settings.engine.max_running
        for system in systems:
            # So many at once as run in a batch, for some strategies have the base read the prompt.
            for start in range(0, len(items), width):
                some = items[start : start + width]
                asks = (system.ask(item.text, prompts[item.id]) for item in some)
                selected = await asyncio.gather(*map(selector.select, asks))
                for item, selection in zip(some, selected, strict=True):
                    asked[system.name, item.id] = (selector.mixture(selection), item)
        return await self.score(asked, ledger, progress)

    async def score(
        self,
        asked: Mapping[Asked, tuple[Mixture, Item]],
        ledger: Ledger,
        progress: Progress = lambda *_: None,
    ) -> Mapping[Asked, Score]:
        """Items under mixtures that the caller chose, each pair of the two measured once.

        Raises:
            EngineError, AdapterError: whatever serving them raises.
        """
        keys = {name: (mixture_key(mixture), item.id) for name, (mixture, item) in asked.items()}
        needed = {keys[name]: found for name, found in asked.items() if keys[name] not in ledger}
        # By mixture, so that each is resident once.
        queue = iter(sorted(needed.items(), key=lambda entry: entry[0]))
        done = 0
        progress(done, len(needed))

        async def work() -> None:
            nonlocal done
            for key, (mixture, item) in queue:
                async with self._parts.leases.lease(mixture) as lease:
                    ledger.add(key, await self._score(item, lease.handle))
                done += 1
                progress(done, len(needed))

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(self._parts.settings.engine.max_running):
                    tasks.create_task(work())
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        return {name: ledger[key] for name, key in keys.items()}

    def _prompt(self, item: Item) -> tuple[int, ...]:
        """What the base reads before an answer; of a question with choices, its text."""
        if isinstance(item, AnswerItem):
            [row] = encode_rows(self._tokenizer, [item.row], self._max_tokens)
            return row.ids[: row.answer_start]
        return tuple(self._tokenizer(item.text)["input_ids"])[-self._max_tokens :]

    async def _score(self, item: Item, adapter: object) -> Score:
        if isinstance(item, AnswerItem):
            return await self._answer(item, adapter)
        return await self._choices(item, adapter)

    async def _answer(self, item: AnswerItem, adapter: object) -> Score:
        [row] = encode_rows(self._tokenizer, [item.row], self._max_tokens)
        if row.answer_start >= len(row):
            return Score()
        nats = await self._nats(row, adapter)
        expected = len(row) - row.answer_start
        exact = None
        if expected <= self._max_new:
            answer = await self._greedy(row.ids[: row.answer_start], expected + 8, adapter)
            exact = answer.strip() == item.row.output.strip()
        return Score(nats=nats, tokens=expected, exact=exact)

    async def _choices(self, item: ChoiceItem, adapter: object) -> Score:
        costs = []
        for context, continuation in zip(item.contexts, item.continuations, strict=True):
            start = len(self._tokenizer(context)["input_ids"])
            ids = tuple(self._tokenizer(context + continuation)["input_ids"])
            # A long context loses its beginning.
            over = max(0, len(ids) - self._max_tokens)
            row = EncodedRow(ids[over:], max(1, min(start, len(ids) - 1) - over))
            costs.append(await self._nats(row, adapter))
        return Score(choices=costs)

    async def _nats(self, row: EncodedRow, adapter: object) -> float:
        """Summed negative log-likelihood of what follows `answer_start`."""
        events = self._work(row.ids, Sampling(max_tokens=0), adapter, prompt_logprobs=0)
        async with aclosing(self._parts.engine.run(events)) as found:
            async for event in found:
                if isinstance(event, PromptScored):
                    return -sum(score.logprob or 0.0 for score in event.scores[row.answer_start :])
        raise RuntimeError("the engine gave no scores of a prompt")

    async def _greedy(self, prompt: tuple[int, ...], limit: int, adapter: object) -> str:
        room = min(limit, self._parts.engine.max_context - len(prompt))
        if room < 1:
            return ""
        work = self._work(prompt, Sampling(max_tokens=room, temperature=0.0), adapter)
        async with aclosing(self._parts.engine.run(work)) as found:
            tokens = [event.score.id async for event in found if isinstance(event, Token)]
        vocabulary = self._parts.vocabulary
        return b"".join(vocabulary.text_bytes(token) for token in tokens).decode("utf-8", "replace")

    def _work(
        self, prompt: tuple[int, ...], sampling: Sampling, adapter: object, prompt_logprobs: int | None = None
    ) -> Work:
        self._count += 1
        return Work(f"evaluation-{self._count}", prompt, sampling, adapter, prompt_logprobs)


def mixture_key(mixture: Mixture) -> str:
    """Tells mixtures apart by content."""
    match mixture:
        case SparseChoice():
            return f"sparse {mixture.id}"
        case Blend() | TokenMixture():
            return mixture.key
