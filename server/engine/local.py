"""The engine of this process: continuous batching over one base model, every request with its own blend."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from loramux.adapters.layers import AdapterLayers
from loramux.kernels.gated_lora import BARE, Plan, Slot, plan_step
from loramux.server.engine.batching import Batching
from loramux.server.engine.hooks import Segment
from loramux.server.engine.pace import Pace
from loramux.server.engine.protocol import (
    EngineClosed,
    EngineError,
    EngineOverloaded,
    EngineStats,
    Event,
    Finished,
    Sampling,
    TokenScore,
    Work,
)
from loramux.server.engine.running import Running


@dataclass(frozen=True)
class EngineLimits:
    """How much runs at once. `kv_tokens` is shared by all running sequences; longer prompts are cut into
    chunks of at most `max_batch_tokens`."""

    max_running: int = 32
    max_waiting: int = 256
    kv_tokens: int = 32768
    page_size: int = 32
    max_batch_tokens: int = 1024
    prefix_sharing: bool = True


class LocalEngine:
    """Implements `Engine`, and `StepHooks` for its batching.

    The event loop submits and cancels, one thread steps; events cross over at the end of a step, all in
    one call.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: AdapterLayers,
        *,
        eos_ids: Sequence[int],
        limits: EngineLimits | None = None,
    ) -> None:
        self._model = model
        self._layers = layers
        self._eos_ids = frozenset(eos_ids)
        self._limits = limits = limits or EngineLimits()
        self._sequences: dict[str, Running] = {}
        self._stats = EngineStats()
        self._closed: str | None = "the engine has not been started"
        self._dead: str | None = None
        self._pace = Pace(limits.max_running)
        self._step_started = 0.0
        self._chosen: list[tuple[Running, TokenScore]] = []
        self._outbox: list[tuple[Running, Event | EngineError]] = []
        self._plan_key: tuple[tuple[int, int], ...] = ()
        self._plan_slots: list[tuple[Slot | None, int]] = []
        self._plan = BARE
        self._batching = Batching(
            model,
            self,
            page_size=limits.page_size,
            pages=-(-limits.kv_tokens // limits.page_size),
            max_batch_tokens=limits.max_batch_tokens,
            max_running=limits.max_running,
            prefix_sharing=limits.prefix_sharing,
            on_death=self._died,
        )

    # Engine: called on the event loop

    @property
    def max_context(self) -> int:
        positions = int(self._model.config.get_text_config().max_position_embeddings)
        return min(positions, self._limits.kv_tokens - self._limits.page_size)

    async def start(self) -> None:
        """Begin stepping, with one step to show that the model takes what it is given.

        Raises:
            EngineError: that step failed; nothing is running.
        """
        self._closed = None
        self._batching.start()
        probe = Work("probe", (0,), Sampling(max_tokens=1, temperature=0.0))
        try:
            async with aclosing(self.run(probe)) as events:
                async for _ in events:
                    pass
        except EngineError as error:
            await self.stop(0)
            raise type(error)(f"the engine's first step failed: {error}") from error
        self._pace = Pace(self._limits.max_running, self._stats.step_seconds / max(1, self._stats.steps))
        self._stats = EngineStats()

    async def stop(self, timeout: float) -> None:
        if self._closed is None:
            self._closed = "the server is shutting down"
        await asyncio.to_thread(self._batching.shutdown, timeout)

    async def run(self, work: Work) -> AsyncGenerator[Event, None]:
        self._admit(work)
        seq = Running(work, self._stop_ids(work), asyncio.get_running_loop())
        self._sequences[work.id] = seq
        try:
            try:
                self._batching.submit(
                    work.id, work.prompt, max_tokens=work.sampling.max_tokens, stop_ids=tuple(seq.stop_ids)
                )
            except RuntimeError as error:
                raise EngineClosed(str(error)) from error
            while True:
                event = await seq.events.get()
                if isinstance(event, EngineError):
                    raise event
                yield event
                if isinstance(event, Finished):
                    self._pace.ended(seq.generated)
                    return
        finally:
            await self._leave(seq)

    def stats(self) -> EngineStats:
        running = sum(seq.started for seq in list(self._sequences.values()))
        waiting = len(self._sequences) - running
        return replace(
            self._stats, running=running, waiting=waiting, kv_usage=self._batching.kv_usage, dead=self._dead
        )

    def _admit(self, work: Work) -> None:
        if self._closed is not None:
            raise EngineClosed(self._closed)
        if work.id in self._sequences:
            raise EngineError(f"a sequence with the id {work.id!r} is running already")
        if not work.prompt:
            raise EngineError("the prompt is empty")
        if len(work.prompt) + work.sampling.max_tokens > self.max_context:
            raise EngineError(
                f"{len(work.prompt)} prompt tokens and {work.sampling.max_tokens} answer tokens "
                f"exceed the context of {self.max_context}"
            )
        waiting = [seq.work.sampling.max_tokens for seq in self._sequences.values() if not seq.started]
        if len(waiting) >= self._limits.max_waiting:
            raise EngineOverloaded(len(waiting), self._pace.wait_seconds(waiting))

    def _stop_ids(self, work: Work) -> frozenset[int]:
        return work.sampling.stop_token_ids | (frozenset() if work.sampling.ignore_eos else self._eos_ids)

    async def _leave(self, seq: Running) -> None:
        """Take the sequence out; returns when no later step can touch its adapter."""
        if not seq.finished and self._batching.is_running():
            self._batching.cancel_request(seq.work.id)
            # A second cancellation of this task must not skip the wait: the adapter's rows are still in use.
            waiter = asyncio.ensure_future(seq.gone.wait())
            cancelled = False
            while not waiter.done():
                try:
                    await asyncio.shield(waiter)
                except asyncio.CancelledError:
                    cancelled = True
            self._sequences.pop(seq.work.id, None)
            if cancelled:
                raise asyncio.CancelledError
        self._sequences.pop(seq.work.id, None)

    # StepHooks: called on the stepping thread

    def salt(self, request_id: str) -> str | None:
        seq = self._sequences.get(request_id)
        return None if seq is None or seq.handle is None else seq.handle.key

    def may_share(self, request_id: str) -> bool:
        seq = self._sequences.get(request_id)
        return seq is not None and not seq.needs_prompt_scores

    def before_forward(self, segments: Sequence[Segment], positions: Sequence[int]) -> None:
        self._step_started = time.monotonic()
        hit = 0
        for (request_id, _), position in zip(segments, positions, strict=True):
            seq = self._sequences.get(request_id)
            if seq is not None and not seq.started:
                hit += position
                self._post(seq, seq.start(position))
        self._stats = replace(self._stats, prefix_hit_tokens=self._stats.prefix_hit_tokens + hit)
        self._flush()  # the wait in the queue ends now, not when the step does
        self._layers.plan = self._plan_for(segments)

    def after_forward(self) -> None:
        self._layers.plan = BARE

    def scored_prompt(self, request_id: str) -> tuple[tuple[int, ...], int] | None:
        seq = self._sequences.get(request_id)
        if seq is None or not seq.needs_prompt_scores:
            return None
        return seq.work.prompt, seq.work.prompt_logprobs or 0

    def add_prompt_scores(self, request_id: str, scores: list[TokenScore]) -> None:
        seq = self._sequences.get(request_id)
        if seq is not None:
            seq.prompt_scores += scores

    def sample(self, request_ids: Sequence[str], logits: Tensor) -> list[int]:
        sequences = [self._sequences.get(request_id) for request_id in request_ids]
        greedy = logits.argmax(dim=-1).tolist()
        tokens: list[int] = []
        for seq, row, best in zip(sequences, logits, greedy, strict=True):
            if seq is None:  # its client has left; the cancel is on its way
                tokens.append(best)
                continue
            score = TokenScore(best) if seq.sampler.is_plain_greedy else seq.sampler.sample(row)
            tokens.append(score.id)
            self._chosen.append((seq, score))
        return tokens

    def stepped(self, prefill_tokens: int, decode_tokens: int) -> None:
        for seq, score in self._chosen:
            self._post(seq, seq.accept(score))
        self._chosen = []
        seconds = time.monotonic() - self._step_started
        self._pace.stepped(seconds)
        s = self._stats
        self._stats = replace(
            s,
            steps=s.steps + 1,
            prefill_tokens=s.prefill_tokens + prefill_tokens,
            decode_tokens=s.decode_tokens + decode_tokens,
            step_seconds=s.step_seconds + seconds,
        )
        self._flush()

    def failed(self, request_id: str, error: str) -> None:
        self._chosen = [(seq, score) for seq, score in self._chosen if seq.work.id != request_id]
        seq = self._sequences.get(request_id)
        if seq is not None:
            seq.finished = True
            self._post(seq, [EngineError(f"the generation step failed: {error}")])
            self._flush()

    def cancelled(self, request_ids: set[str]) -> None:
        for request_id in request_ids:
            seq = self._sequences.get(request_id)
            if seq is not None:
                _call(seq.loop, seq.gone.set)

    def _plan_for(self, segments: Sequence[Segment]) -> Plan:
        """The plan of this step; a decode step over the same requests as the last one reuses its plan."""
        slots: list[tuple[Slot | None, int]] = []
        for request_id, length in segments:
            seq = self._sequences.get(request_id)
            slots.append((None if seq is None or seq.handle is None else seq.handle.slot, length))
        key = tuple((id(slot), length) for slot, length in slots)
        if key != self._plan_key:
            self._plan, self._plan_key = plan_step(slots), key
            self._plan_slots = slots  # keeps the slots alive, so that an id in the key cannot be reused
        return self._plan

    def _post(self, seq: Running, events: Sequence[Event | EngineError]) -> None:
        self._outbox += [(seq, event) for event in events]

    def _flush(self) -> None:
        """Deliver everything of this step in one call to the event loop."""
        outbox, self._outbox = self._outbox, []
        if outbox:
            _call(outbox[0][0].loop, lambda: _deliver(outbox))

    def _died(self, error: BaseException | None) -> None:
        """The stepping thread has ended: nobody may wait for it any more."""
        reason = f"the engine died: {error}" if error is not None else "the engine has stopped"
        if error is not None or self._closed is None:
            self._closed = self._dead = reason
        for seq in list(self._sequences.values()):
            if not seq.finished:
                seq.finished = True
                self._post(seq, [EngineClosed(reason)])
            _call(seq.loop, seq.gone.set)
        self._flush()


def _deliver(outbox: Sequence[tuple[Running, Event | EngineError]]) -> None:
    for seq, event in outbox:
        seq.events.put_nowait(event)


def _call(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    with suppress(RuntimeError):  # a closed loop has nobody waiting on it
        loop.call_soon_threadsafe(callback)
