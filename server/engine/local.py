"""The engine of this process: continuous batching over one base model, every sequence with its own blend."""

import asyncio
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as Items
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

import torch
from transformers import PreTrainedModel

from loramux.adapters.layers import AdapterLayers
from loramux.kernels.team import release_team
from loramux.server.engine.alike import check_alike
from loramux.server.engine.grammars import Grammars, matcher_of
from loramux.server.engine.masks import Masks
from loramux.server.engine.model import context_of, unsupported
from loramux.server.engine.pace import Pace
from loramux.server.engine.pages import Pages
from loramux.server.engine.protocol import (
    EngineClosed,
    EngineError,
    EngineExhausted,
    EngineOverloaded,
    EngineStats,
    Event,
    Finished,
    GrammarError,
    Sampling,
    TokenScore,
    Work,
)
from loramux.server.engine.runner import Runner
from loramux.server.engine.sampler import Sampler, prompt_scores
from loramux.server.engine.scheduler import LEAST_CHUNK, LEAST_CHUNK_ON_DEVICE, Chunk, Scheduler
from loramux.server.engine.sequence import Sequence

log = logging.getLogger("loramux")


@dataclass(frozen=True)
class EngineLimits:
    """How much runs at once. `kv_tokens` is shared by all running sequences; longer prompts are cut into
    pieces of at most `max_batch_tokens`. `graphs`: decode steps are captured; `invariant`: as `Runner`."""

    max_running: int = 32
    max_waiting: int = 256
    kv_tokens: int = 32768
    page_size: int = 32
    max_batch_tokens: int = 1024
    prefix_sharing: bool = True
    graphs: bool = False
    invariant: bool = False


#: How long a thread may run on while another one waits for the interpreter.
SWITCH_SECONDS = 0.0005
#: Told to the stepping thread.
_Command = tuple[Literal["add", "cancel"], Sequence]


class LocalEngine:
    """Implements `Engine`. The event loop adds and cancels sequences, one thread steps; events cross over at
    the end of a step, all in one call."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: AdapterLayers,
        *,
        eos_ids: Items[int],
        limits: EngineLimits | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self._model = model
        self._eos_ids = frozenset(eos_ids)
        self._limits = limits = limits or EngineLimits()
        pages = Pages(
            -(-limits.kv_tokens // limits.page_size), limits.page_size, sharing=limits.prefix_sharing
        )
        max_tokens = max(limits.max_batch_tokens, limits.max_running)
        self._scheduler = Scheduler(
            pages,
            max_running=limits.max_running,
            max_tokens=max_tokens,
            least_chunk=LEAST_CHUNK if model.device.type == "cpu" else LEAST_CHUNK_ON_DEVICE,
        )
        self._runner = Runner(
            model,
            layers,
            pages=pages.count,
            page_size=limits.page_size,
            max_tokens=max_tokens,
            max_running=limits.max_running,
            max_context=self.max_context,
            graphs=limits.graphs,
            invariant=limits.invariant,
        )
        self._sampler = Sampler()
        self._grammars = grammars
        self._masks = Masks(grammars, limits.max_running, model.device)
        self._sequences: dict[str, Sequence] = {}
        self._stats = EngineStats()
        self._closed: str | None = "the engine has not been started"
        self._dead: str | None = None
        self._pace = Pace(limits.max_running)
        self._commands: deque[_Command] = deque()
        self._wake = threading.Event()
        self._stopping: Literal["no", "finish", "now"] = "no"
        self._outbox: list[tuple[Sequence, Event | EngineError]] = []
        self._thread: threading.Thread | None = None

    # Called on the event loop

    @property
    def max_context(self) -> int:
        return min(context_of(self._model.config), self._limits.kv_tokens - self._limits.page_size)

    async def start(self) -> None:
        """Begin stepping, with one step to show that the model takes what it is given.

        Raises:
            EngineError: the model has a feature that is not supported, or that step failed; nothing is
            running.
        """
        if feature := unsupported(self._model):
            raise EngineError(f"{type(self._model).__name__} has {feature}")
        self._closed = None
        # A daemon: a process that ends without a proper stop must not hang on this thread.
        self._thread = threading.Thread(target=self._run, name="loramux-engine", daemon=True)
        self._thread.start()
        probe = Work("probe", (0,), Sampling(max_tokens=1, temperature=0.0))
        try:
            async for _ in self.run(probe):
                pass
            self._check_layers()
            if self._limits.invariant:
                await check_alike(self, self.max_context, type(self._model).__name__)
        except EngineError as error:
            await self.stop(0)
            raise type(error)(f"the engine's first step failed: {error}") from error
        self._pace = Pace(self._limits.max_running, self._stats.step_seconds / max(1, self._stats.steps))
        self._stats = EngineStats()

    async def stop(self, timeout: float) -> None:
        if self._closed is None:
            self._closed = "the server is shutting down"
        await asyncio.to_thread(self._shut_down, timeout)

    async def run(self, work: Work) -> AsyncGenerator[Event, None]:
        matcher = await matcher_of(self._grammars, work.grammar)
        self._admit(work)
        release_team()  # of the caller's thread, which has loaded a model or an adapter
        sequence = Sequence(work, self._stop_ids(work), asyncio.get_running_loop(), matcher)
        if (ended := sequence.resume()) is not None:  # its last token came, and the end of it did not
            yield ended
            return
        self._sequences[work.id] = sequence
        try:
            self._tell("add", sequence)
            while True:
                event = await sequence.events.get()
                if isinstance(event, EngineError):
                    if isinstance(event, GrammarError) and self._grammars is not None:
                        self._grammars.forget(work.grammar)
                    raise event
                yield event
                if isinstance(event, Finished):
                    self._pace.ended(sequence.generated)
                    return
        finally:
            await self._leave(sequence)

    def stats(self) -> EngineStats:
        running = sum(sequence.started for sequence in list(self._sequences.values()))
        waiting = len(self._sequences) - running
        pages = self._scheduler.pages
        return replace(
            self._stats,
            running=running,
            waiting=waiting,
            kv_usage=1 - pages.free / pages.count,
            preemptions=self._scheduler.preemptions,
            kv_pages=pages.count,
            kv_page_tokens=pages.size,
            dead=self._dead,
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
        waiting = [one.work.sampling.max_tokens for one in self._sequences.values() if not one.started]
        if len(waiting) >= self._limits.max_waiting and work.answered is None:
            raise EngineOverloaded(len(waiting), self._pace.wait_seconds(waiting))

    def _stop_ids(self, work: Work) -> frozenset[int]:
        own = frozenset[int]() if work.sampling.ignore_eos else self._eos_ids
        if work.grammar is not None and self._grammars is not None:
            own = self._grammars.eos_ids  # nothing can follow the end of a grammar
        return work.sampling.stop_token_ids | own

    async def _leave(self, sequence: Sequence) -> None:
        """Take the sequence out; returns when no later step can touch its adapter."""
        if not sequence.finished:
            self._tell("cancel", sequence)
            # A second cancellation of this task must not skip the wait: the adapter's rows are still in use.
            waiter = asyncio.ensure_future(sequence.gone.wait())
            cancelled = False
            while not waiter.done():
                try:
                    await asyncio.shield(waiter)
                except asyncio.CancelledError:
                    cancelled = True
            self._sequences.pop(sequence.work.id, None)
            if cancelled:
                raise asyncio.CancelledError
        self._sequences.pop(sequence.work.id, None)

    def _tell(self, what: Literal["add", "cancel"], sequence: Sequence) -> None:
        self._commands.append((what, sequence))
        self._wake.set()
        if self._thread is None or not self._thread.is_alive():  # nobody will read it
            self._end(EngineClosed(self._dead or "the engine has stopped"))

    def _shut_down(self, timeout: float) -> None:
        """Let what runs finish for `timeout` seconds, then fail the rest. Blocks until the thread has
        ended."""
        if self._thread is None:
            return
        for wish, patience in (("finish", timeout), ("now", None)):
            self._stopping = wish  # type: ignore[assignment]
            self._wake.set()
            self._thread.join(patience)
            if not self._thread.is_alive():
                return

    def _check_layers(self) -> None:
        """Every layer has to keep its past in the paged cache: one that keeps none would answer nonsense."""
        config = self._model.config.get_text_config()
        if self._runner.layers_seen != config.num_hidden_layers:
            raise EngineError(
                f"{type(self._model).__name__} has {config.num_hidden_layers} layers, of which "
                f"{self._runner.layers_seen} attend through transformers' AttentionInterface; "
                "other layers are not supported"
            )

    # Called on the stepping thread

    def _run(self) -> None:
        error: BaseException | None = None
        # Otherwise this thread, back from the device, waits up to 5 ms for the event loop to give way.
        sys.setswitchinterval(SWITCH_SECONDS)
        try:
            self._runner.start()
            while self._stopping != "now":
                self._listen()
                if not self._scheduler.is_idle:
                    self._step()
                elif self._stopping != "no":
                    break
                else:
                    self._flush()
                    release_team()  # another engine of this process may step
                    self._wake.wait()
        except BaseException as fault:
            log.exception("the engine died")
            error = fault
        self._runner.stop()
        self._masks.close()
        reason = "the engine has stopped" if error is None else f"the engine died: {error}"
        if error is not None or self._closed is None:
            self._closed = self._dead = reason
        self._end(EngineClosed(reason))

    def _listen(self) -> None:
        """Take what the event loop has asked for since the last step."""
        self._wake.clear()
        while self._commands:
            what, sequence = self._commands.popleft()
            if what == "add":
                self._scheduler.add(sequence)
            else:
                self._scheduler.remove(sequence)
                _call(sequence.loop, sequence.gone.set)

    def _step(self) -> None:
        chunks = self._scheduler.next()
        started = time.monotonic()
        hits = 0
        for chunk in chunks:
            if not chunk.sequence.started:
                hits += chunk.start
                self._post(chunk.sequence, chunk.sequence.start(chunk.start))
        try:
            chosen = self._compute(chunks)
        except Exception as error:
            # Whatever it was (out of memory, a shape a custom layer did not expect), it concerns this batch.
            self._fail(chunks, error)
            return
        self._scheduler.done(chunks)
        for sequence, score in chosen:
            if score is None:
                self._drop(sequence, "the distribution of the next token is not finite")
                continue
            if problem := sequence.follow(score.id):
                self._drop(sequence, problem, GrammarError)
                continue
            self._post(sequence, sequence.accept(score))
            if sequence.finished:
                self._scheduler.remove(sequence)
        self._count(chunks, time.monotonic() - started, hits)

    def _compute(self, chunks: Items[Chunk]) -> list[tuple[Sequence, TokenScore | None]]:
        """The next token of every sequence whose known tokens are all computed after this step."""
        self._masks.begin(chunks)
        logits = self._runner.run(chunks, self._flush)
        for chunk, rows in zip(chunks, logits.rows, strict=True):
            if chunk.sequence.needs_prompt_scores:
                chunk.sequence.prompt_scores += prompt_scores(logits.values[rows], chunk)
        if not (sequences := [chunk.sequence for chunk in chunks if chunk.samples]):
            return []
        last = [rows.stop - 1 for chunk, rows in zip(chunks, logits.rows, strict=True) if chunk.samples]
        values, best, captured = logits.values, logits.best, logits.captured
        if last != list(range(len(values))):
            at = torch.tensor(last, device=values.device)
            values, best, captured = values[at], None if best is None else best[at], None
        chosen = self._sampler.choose(values, sequences, best, captured, self._masks)
        return list(zip(sequences, chosen, strict=True))

    def _fail(self, chunks: Items[Chunk], error: Exception) -> None:
        log.warning("a step failed: %s", error, exc_info=log.isEnabledFor(logging.DEBUG))
        kind = EngineExhausted if isinstance(error, torch.OutOfMemoryError | MemoryError) else EngineError
        self._masks.wait()
        for chunk in chunks:
            self._drop(chunk.sequence, str(error) or type(error).__name__, kind)
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()

    def _drop(self, sequence: Sequence, error: str, kind: type[EngineError] = EngineError) -> None:
        self._scheduler.remove(sequence)
        sequence.finished = True
        self._post(sequence, [kind(f"the generation step failed: {error}")])

    def _count(self, chunks: Items[Chunk], seconds: float, hits: int) -> None:
        decodes = sum(chunk.length == 1 for chunk in chunks)
        prompts = sum(chunk.length for chunk in chunks) - decodes
        self._pace.stepped(seconds)
        self._scheduler.tempo.stepped(seconds, prompts, decodes)
        s = self._stats
        self._stats = replace(
            s,
            steps=s.steps + 1,
            prefill_tokens=s.prefill_tokens + prompts,
            decode_tokens=s.decode_tokens + decodes,
            prefix_hit_tokens=s.prefix_hit_tokens + hits,
            step_seconds=s.step_seconds + seconds,
        )

    def _post(self, sequence: Sequence, events: Items[Event | EngineError]) -> None:
        self._outbox += [(sequence, event) for event in events]

    def _flush(self) -> None:
        """Deliver everything of this step in one call to the event loop."""
        outbox, self._outbox = self._outbox, []
        if outbox:
            _call(outbox[0][0].loop, lambda: _deliver(outbox))

    def _end(self, error: EngineClosed) -> None:
        """No further step will be made: nobody may wait for one any more."""
        for sequence in list(self._sequences.values()):
            if not sequence.finished:
                sequence.finished = True
                self._post(sequence, [error])
            _call(sequence.loop, sequence.gone.set)
        self._flush()


def _deliver(outbox: Items[tuple[Sequence, Event | EngineError]]) -> None:
    for sequence, event in outbox:
        sequence.events.put_nowait(event)


def _call(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    with suppress(RuntimeError):  # a closed loop has nobody waiting on it
        loop.call_soon_threadsafe(callback)
