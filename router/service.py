"""Routing for many requests at once, off the event loop.

One worker thread embeds. Texts that arrive while it works wait in a queue, and all of them go into its next
batch: no timer, so an idle service answers at once and a busy one batches by itself. Scores of repeated texts
come from a bounded LRU cache; the same text asked twice at the same time is embedded once.

The router can be exchanged while it serves. A text is scored and decided by the router that it came to, so no
decision mixes two.
"""

import asyncio
import hashlib
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from .decision import Decision, RoutingOptions
from .encoder import Encoder, EncoderSpec
from .errors import RouterError
from .joining import Joined, joined, left
from .projection import Projection
from .router import Router, ScoreRow, blank_rows

# Texts that are embedded before a waiting decision has its turn.
_TURN = 16
Observe = Callable[[str, float], None]
Result = TypeVar("Result")


@dataclass(slots=True)
class ServiceStats:
    """Counters since the start; seconds are the worker's, per stage.

    texts: embedded. cache_hits: answered from the cache. joined: waited for the same text already on its way.
    failures: texts that could not be scored. skipped: given up by every caller before their batch began.
    """

    batches: int = 0
    texts: int = 0
    largest_batch: int = 0
    cache_hits: int = 0
    joined: int = 0
    failures: int = 0
    skipped: int = 0
    cache_entries: int = 0
    cache_bytes: int = 0
    embed_seconds: float = 0.0
    search_seconds: float = 0.0
    classify_seconds: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Embedded:
    """Unit vectors [n, d] of texts; of each its tokens, and whether it was cut or could not be read."""

    vectors: npt.NDArray[np.float32]
    tokens: list[int]
    truncated: list[bool]
    blank: list[bool]


class Key(NamedTuple):
    """What scores depend on: the router, the text (a digest), and whether the classifier runs."""

    router: Router
    text: bytes
    classify: bool


@dataclass(slots=True, eq=False)
class _Wait:
    """One text on its way. Every caller has a future of its own, so a cancelled one harms no other."""

    key: Key
    text: str
    callers: list[asyncio.Future[ScoreRow]] = field(default_factory=list)

    @property
    def wanted(self) -> bool:
        return not all(caller.done() for caller in self.callers)

    def answer(self, row: ScoreRow) -> None:
        for caller in self.callers:
            if not caller.done():
                caller.set_result(row)

    def fail(self, error: Exception) -> None:
        for caller in self.callers:
            if not caller.done():
                caller.set_exception(error)
                caller.exception()  # marks it as seen: a caller cancelled right now will not look at it


class RoutingService:
    """`await decide(text, options)` for any number of concurrent callers of one event loop."""

    def __init__(
        self,
        router: Router,
        *,
        cache_entries: int = 4096,
        cache_bytes: int = 32 << 20,
        max_batch: int = 64,
        observe: Observe | None = None,
        after_work: Callable[[], None] | None = None,
    ) -> None:
        """`observe(stage, seconds)` is called on the event loop, per batch: "embed", "search", "classify";
        `after_work` on the thread that reads, whenever it has read."""
        self.router = router
        self._stats = ServiceStats()
        self._cache = _ScoreCache(cache_entries, cache_bytes)
        self._max_batch = max_batch
        self._observe = observe
        self._after_work = after_work
        self._waiting: deque[_Wait] = deque()
        self._on_the_way: dict[Key, _Wait] = {}
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loramux-router")
        self._runner: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def experts(self) -> tuple[str, ...]:
        return self.router.experts

    @property
    def projection(self) -> Projection:
        return self.router.projection

    def stats(self) -> ServiceStats:
        """A copy of the counters."""
        return replace(self._stats, cache_entries=len(self._cache), cache_bytes=self._cache.bytes)

    async def decide(self, text: str, options: RoutingOptions | None = None) -> Decision:
        """The decision for one text.

        Cancelling one caller never harms another that waits for the same text. Raises RoutingOptionsError at
        once for impossible options, and whatever the encoder or classifier raised for this text.
        """
        router = self.router
        plan = router.resolve(options)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        key = Key(router, digest, router.needs_classifier(plan))
        row = self._cache.get(key)
        if row is None:
            row = await self._scored(key, text)
        else:
            self._stats.cache_hits += 1
        return router.choose_row(row, plan)

    @property
    def encoder(self) -> EncoderSpec:
        """What embeds."""
        return self.router.encoder.spec

    async def embed(self, texts: Sequence[str]) -> Embedded:
        """The vectors of some texts; decisions that wait have their turn after every few."""
        parts = [
            await self._on_worker(partial(_embedded, self.router.encoder, texts[start : start + _TURN]))
            for start in range(0, len(texts), _TURN)
        ]
        return Embedded(
            np.concatenate([part.vectors for part in parts]),
            [number for part in parts for number in part.tokens],
            [flag for part in parts for flag in part.truncated],
            [flag for part in parts for flag in part.blank],
        )

    async def joined(self, expert: str, texts: Sequence[str]) -> Joined:
        """The router with an expert more, from example texts; it serves once it is given to `use`.

        Raises RoutingExamplesError when a text cannot be read or the router cannot be added to.
        """
        return await self._on_worker(partial(joined, self.router, expert, texts))

    async def left(self, expert: str) -> Router:
        """The router without an expert; it serves once it is given to `use`."""
        return await self._on_worker(partial(left, self.router, expert))

    def use(self, router: Router) -> None:
        """Let `router` decide about the texts that come from now on.

        Whoever makes it out of the present one sees to it that nobody else does so meanwhile.
        """
        self.router = router
        self._cache.clear()

    async def close(self) -> None:
        """Refuse new texts, finish those on their way, end the worker thread."""
        self._closed = True
        if self._runner is not None:
            await asyncio.wait([self._runner])
        self._worker.shutdown(wait=True)

    async def _on_worker(self, work: Callable[[], Result]) -> Result:
        """Where the encoder may be used."""
        if self._closed:
            raise RouterError("the router is closed")
        return await self._worked(work)

    async def _worked(self, work: Callable[[], Result]) -> Result:
        def call() -> Result:
            try:
                return work()
            finally:
                if self._after_work is not None:
                    self._after_work()

        return await asyncio.get_running_loop().run_in_executor(self._worker, call)

    async def _scored(self, key: Key, text: str) -> ScoreRow:
        if self._closed:
            raise RouterError("the router is closed")
        wait = self._on_the_way.get(key)
        if wait is None:
            wait = _Wait(key, text)
            self._on_the_way[key] = wait
            self._waiting.append(wait)
            if self._runner is None or self._runner.done():
                self._runner = asyncio.create_task(self._run(), name="loramux-router")
        else:
            self._stats.joined += 1
        caller: asyncio.Future[ScoreRow] = asyncio.get_running_loop().create_future()
        wait.callers.append(caller)
        return await caller

    async def _run(self) -> None:
        """Score batches until nothing waits. Every wait taken is answered, whatever happens."""
        while batch := self._next_batch():
            try:
                await self._score_batch(batch)
            finally:
                for wait in batch:
                    if self._leave(wait):
                        wait.fail(RouterError("the router stopped before this text was scored"))

    def _next_batch(self) -> list[_Wait]:
        """The oldest that wait, all for the same router."""
        batch: list[_Wait] = []
        while self._waiting and len(batch) < self._max_batch:
            if batch and self._waiting[0].key.router is not batch[0].key.router:
                break
            wait = self._waiting.popleft()
            if wait.wanted:
                batch.append(wait)
            else:
                self._leave(wait)
                self._stats.skipped += 1
        return batch

    async def _score_batch(self, batch: Sequence[_Wait]) -> None:
        try:
            scored = await self._worked(partial(_score, batch))
        except Exception as error:  # whatever a text makes the encoder raise belongs to that text alone
            if len(batch) == 1:
                self._stats.failures += 1
                self._leave(batch[0])
                batch[0].fail(error)
                return
            for wait in batch:
                await self._score_batch([wait])
            return
        self._count(len(batch), scored.seconds)
        for wait, row in zip(batch, scored.rows, strict=True):
            if wait.key.router is self.router:
                self._cache.put(wait.key, row)
            self._leave(wait)
            wait.answer(row)

    def _leave(self, wait: _Wait) -> bool:
        """Let no caller join any more, because the answer comes now, and once. Whether one still could."""
        found = self._on_the_way.get(wait.key) is wait
        if found:
            del self._on_the_way[wait.key]
        return found

    def _count(self, texts: int, seconds: dict[str, float]) -> None:
        stats = self._stats
        stats.batches += 1
        stats.texts += texts
        stats.largest_batch = max(stats.largest_batch, texts)
        stats.embed_seconds += seconds["embed"]
        stats.search_seconds += seconds["search"]
        stats.classify_seconds += seconds["classify"]
        if self._observe is not None:
            for stage, value in seconds.items():
                self._observe(stage, value)


def _embedded(encoder: Encoder, texts: Sequence[str]) -> Embedded:
    found = encoder.encode(texts)
    blank = blank_rows(found.vectors)
    return Embedded(found.vectors, encoder.count(texts), found.truncated.tolist(), list(map(bool, blank)))


@dataclass(frozen=True, slots=True, eq=False)
class _Scored:
    rows: list[ScoreRow]
    seconds: dict[str, float]


def _score(batch: Sequence[_Wait]) -> _Scored:
    """On the worker thread: embed and search all, classify those that need it."""
    router = batch[0].key.router
    texts = [wait.text for wait in batch]
    start = perf_counter()
    encoded = router.embed(texts)
    embedded = perf_counter()
    raw, ranked = router.similarities(encoded.vectors)
    searched = perf_counter()
    wanted = [row for row, wait in enumerate(batch) if wait.key.classify]
    found = router.probabilities([texts[row] for row in wanted], encoded.vectors[wanted]) if wanted else None
    classified = perf_counter()
    probability = {} if found is None else dict(zip(wanted, found, strict=True))
    blank = blank_rows(encoded.vectors)
    rows = [
        ScoreRow.of(raw[n], ranked[n], probability.get(n), encoded.truncated[n], blank[n])
        for n in range(len(batch))
    ]
    seconds = {"embed": embedded - start, "search": searched - embedded, "classify": classified - searched}
    return _Scored(rows, seconds)


class _ScoreCache:
    """LRU of score rows, bounded by entries and by bytes."""

    _OVERHEAD = 600  # measured size of the objects around the numbers of one entry

    def __init__(self, entries: int, limit: int) -> None:
        self._entries = entries
        self._limit = limit
        self._rows: OrderedDict[Key, ScoreRow] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: Key) -> ScoreRow | None:
        row = self._rows.get(key)
        if row is not None:
            self._rows.move_to_end(key)
        return row

    def clear(self) -> None:
        self._rows.clear()
        self.bytes = 0

    def put(self, key: Key, row: ScoreRow) -> None:
        old = self._rows.pop(key, None)
        if old is not None:
            self.bytes -= self._size(old)
        self._rows[key] = row
        self.bytes += self._size(row)
        while self._rows and (len(self._rows) > self._entries or self.bytes > self._limit):
            _, oldest = self._rows.popitem(last=False)
            self.bytes -= self._size(oldest)

    def _size(self, row: ScoreRow) -> int:
        return self._OVERHEAD + row.nbytes
