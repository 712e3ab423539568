"""The life of a request, steps 2 to 6; step 1, parsing, was the route's."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager

from loramux.adapters.residency import Lease
from loramux.server.ask import Ask
from loramux.server.audit import Audits
from loramux.server.counterfactuals import Counterfactuals
from loramux.server.decoding import Begun, Cached, Scored, decode
from loramux.server.engine.protocol import Engine
from loramux.server.events import BlendReport, Closed, Delta, Event, Opened
from loramux.server.job import Job, State
from loramux.server.leases import Leases
from loramux.server.lifecycle import Lifecycle
from loramux.server.metrics import Metrics
from loramux.server.selection import Selection, Selector
from loramux.server.text.vocabulary import Vocabulary
from loramux.server.traces import NO_TRACES, Traces


class Pipeline:
    """Runs requests. Streaming is the primitive; a whole answer is a fold over it."""

    def __init__(
        self,
        *,
        selector: Selector,
        leases: Leases,
        engine: Engine,
        vocabulary: Vocabulary,
        metrics: Metrics,
        lifecycle: Lifecycle,
        counterfactuals: Counterfactuals,
        audits: Audits,
        traces: Traces = NO_TRACES,
    ) -> None:
        self._selector = selector
        self._leases = leases
        self._engine = engine
        self._vocabulary = vocabulary
        self._metrics = metrics
        self._lifecycle = lifecycle
        self._counterfactuals = counterfactuals
        self._audits = audits
        self._traces = traces

    async def run(self, ask: Ask) -> AsyncGenerator[Event]:
        """The events of one request.

        Closing it, or cancelling its consumer, aborts the sequences in the engine first and frees the lease
        after that.

        Raises:
            NotReady: loading or draining.
            EngineError, AdapterError, RouterError: as they come, also after the first event.
        """
        with self._lifecycle.working(), self._job(ask) as job:
            selection = await self._selector.select(ask)
            job.to(State.ROUTED)
            job.experts = selection.ids
            mixture = self._selector.mixture(selection)
            job.to(State.MERGING)
            async with self._leases.lease(mixture) as lease:
                job.to(State.WAITING)
                async with aclosing(self._generate(ask, job, selection, lease)) as events:
                    async for event in events:
                        yield event
            self._audits.offer(ask, selection, job.id)

    async def _generate(
        self, ask: Ask, job: Job, selection: Selection, lease: Lease
    ) -> AsyncGenerator[Event]:
        """Steps 5 and 6 under the lease, with the job's stamps."""
        opened = Opened(
            selection,
            BlendReport(lease.key, lease.method, lease.rank, lease.relative_error, lease.cached),
            ask.prompt_tokens,
        )
        if not lease.cached:
            self._metrics.merged(lease.method, lease.seconds, lease.relative_error, lease.rank)
        cached_tokens = 0
        announced = False
        async with (
            self._counterfactuals.beside(ask, selection, lease, job.id) as explaining,
            aclosing(decode(self._engine, self._vocabulary, ask, job.id, lease.handle)) as items,
        ):
            async for item in items:
                if not announced:
                    announced = True
                    if explaining is not None:
                        explaining.check()
                    yield opened
                match item:
                    case Begun():
                        job.started()
                    case Cached():
                        # A prompt counts once in `usage`, and so do its cached tokens: with the first choice.
                        cached_tokens += item.tokens if item.index % ask.n == 0 else 0
                    case Scored():
                        assert explaining is not None
                        explaining.served(item.scores)
                    case Delta():
                        self._stamp(job, item)
                        yield item
            explained = None if explaining is None else (await explaining.result()).body()
        yield Closed(ask.prompt_tokens, job.completion_tokens, cached_tokens, explained)

    def _stamp(self, job: Job, delta: Delta) -> None:
        if delta.tokens and not delta.echo:
            gap = job.token(delta.index)
            if gap is not None:
                self._metrics.token_gap(gap)
        if delta.finish is not None:
            job.finish_reasons.append(delta.finish)

    @contextmanager
    def _job(self, ask: Ask) -> Iterator[Job]:
        """A job that ends in one of its three ends, whatever happens."""
        job = Job(uuid.uuid4().hex, ask.model)
        job.prompt_tokens = ask.prompt_tokens
        self._metrics.received(job)
        with self._traces.request(job):
            try:
                yield job
                job.to(State.FINISHED)
            except (asyncio.CancelledError, GeneratorExit):
                job.to(State.ABORTED)
                raise
            except Exception:
                job.to(State.FAILED)
                raise
            finally:
                self._metrics.closed(job)
