"""The service under load: batches without a timer, single flight, cancellation, isolation, the cache."""

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from loramux.router.decision import RoutingOptions
from loramux.router.errors import RouterError, RoutingOptionsError
from loramux.router.router import Router
from loramux.router.service import RoutingService
from tests.unit.router.kit import HashBackend, constant_classifier, make_router


class Gate:
    """Holds the worker thread inside `embed` until opened, and says when it got there."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()

    def __call__(self, texts: Sequence[str]) -> None:
        self.entered.set()
        assert self.open.wait(20)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 20)


def parts(**options: object) -> tuple[HashBackend, Router]:
    backend = HashBackend()
    centroids = np.random.default_rng(2).normal(size=(5, 8)).astype(np.float32)
    return backend, make_router(
        backend, centroids, constant_classifier([0.4, 0.3, 0.1, 0.1, 0.1], 8), **options
    )  # type: ignore[arg-type]


def test_what_queues_while_a_batch_runs_is_the_next_batch() -> None:
    async def main() -> None:
        backend, router = parts()
        gate = Gate()
        backend.before = gate
        service = RoutingService(router)
        first = asyncio.create_task(service.decide("first"))
        await gate.reached()
        rest = [asyncio.create_task(service.decide(f"text {n}")) for n in range(30)]
        await asyncio.sleep(0)
        gate.open.set()
        decisions = await asyncio.gather(first, *rest)
        assert [len(batch) for batch in backend.batches] == [1, 30]
        backend.before = lambda texts: None
        expected = router.decide(["first", *(f"text {n}" for n in range(30))])
        assert decisions == expected
        stats = service.stats()
        assert (stats.batches, stats.texts, stats.largest_batch) == (2, 31, 30)
        assert stats.embed_seconds > 0
        await service.close()

    asyncio.run(main())


def test_a_batch_has_a_limit() -> None:
    async def main() -> None:
        backend, router = parts()
        service = RoutingService(router, max_batch=4)
        await asyncio.gather(*(service.decide(f"text {n}") for n in range(10)))
        assert sorted(map(len, backend.batches)) == [2, 4, 4]
        await service.close()

    asyncio.run(main())


def test_the_thread_that_reads_is_told_when_it_has_read() -> None:
    async def main() -> None:
        backend, router = parts()
        told: list[str] = []
        service = RoutingService(router, after_work=lambda: told.append(threading.current_thread().name))
        await service.decide("text")
        await service.embed(["another"])

        def fail(texts: Sequence[str]) -> None:
            raise RuntimeError("no")

        backend.before = fail
        with pytest.raises(RuntimeError, match="no"):
            await service.decide("a third")
        assert len(told) == len(backend.batches) == 3
        assert {name.split("_")[0] for name in told} == {"loramux-router"}
        await service.close()

    asyncio.run(main())


def test_one_text_asked_many_times_is_embedded_once() -> None:
    async def main() -> None:
        backend, router = parts()
        gate = Gate()
        backend.before = gate
        service = RoutingService(router)
        policies = [RoutingOptions(top_m=1 + n % 3) for n in range(20)]
        waiting = [asyncio.create_task(service.decide("same", options)) for options in policies]
        await gate.reached()
        gate.open.set()
        decisions = await asyncio.gather(*waiting)
        assert [len(decision.experts) for decision in decisions] == [options.top_m for options in policies]
        assert await service.decide("same") == router.choose(
            router.score(["same"], router.embed(["same"])), 0
        )
        assert backend.batches[0] == ["same"]
        stats = service.stats()
        assert (stats.texts, stats.joined, stats.cache_hits) == (1, 19, 1)
        await service.close()

    asyncio.run(main())


def test_a_cancelled_caller_harms_nobody() -> None:
    async def main() -> None:
        backend, router = parts()
        gate = Gate()
        backend.before = gate
        service = RoutingService(router)
        leaver = asyncio.create_task(service.decide("shared"))
        stayer = asyncio.create_task(service.decide("shared"))
        await gate.reached()
        queued = asyncio.create_task(service.decide("given up"))
        await asyncio.sleep(0)
        leaver.cancel()
        queued.cancel()
        gate.open.set()
        assert (await stayer).candidates
        with pytest.raises(asyncio.CancelledError):
            await leaver
        await service.close()
        assert backend.batches == [["shared"]]
        assert service.stats().skipped == 1

    asyncio.run(main())


def test_all_callers_gone_while_embedding_leaves_a_working_service() -> None:
    async def main() -> None:
        backend, router = parts()
        gate = Gate()
        backend.before = gate
        service = RoutingService(router)
        only = asyncio.create_task(service.decide("lonely"))
        await gate.reached()
        only.cancel()
        with pytest.raises(asyncio.CancelledError):
            await only
        gate.open.set()
        assert (await service.decide("next")).candidates
        assert (await service.decide("lonely")).candidates
        assert service.stats().cache_hits == 1
        await service.close()

    asyncio.run(main())


class Poison(RuntimeError):
    pass


def test_one_failing_text_does_not_harm_its_batch() -> None:
    def refuse(texts: Sequence[str]) -> None:
        if "poison" in texts:
            raise Poison("this text cannot be embedded")

    async def main() -> None:
        backend, router = parts()
        backend.before = refuse
        service = RoutingService(router)
        names = ["a", "b", "poison", "c"]
        results = await asyncio.gather(*(service.decide(name) for name in names), return_exceptions=True)
        assert isinstance(results[2], Poison)
        assert [r.candidates[0].id for r in results if not isinstance(r, BaseException)] == [
            router.decide([name])[0].candidates[0].id for name in ("a", "b", "c")
        ]
        assert service.stats().failures == 1
        backend.before = lambda texts: None
        assert (await service.decide("poison")).candidates  # a failure is not cached
        await service.close()

    asyncio.run(main())


def test_impossible_options_fail_at_once_without_embedding() -> None:
    async def main() -> None:
        backend = HashBackend()
        router = make_router(backend, np.eye(8)[:2], defaults=RoutingOptions(strategy="similarity"))
        service = RoutingService(router)
        with pytest.raises(RoutingOptionsError):
            await service.decide("x", RoutingOptions(strategy="hybrid"))
        assert backend.batches == []
        await service.close()

    asyncio.run(main())


def test_the_cache_is_bounded_by_entries_and_by_bytes() -> None:
    async def main() -> None:
        _, router = parts()
        service = RoutingService(router, cache_entries=3)
        for text in ["a", "b", "c", "a", "d"]:  # "b" is the least recently used when "d" comes
            await service.decide(text)
        assert service.stats().cache_entries == 3
        before = service.stats().texts
        await service.decide("a")
        assert service.stats().texts == before
        await service.decide("b")
        assert service.stats().texts == before + 1
        await service.close()
        small = RoutingService(router, cache_bytes=2000)
        for number in range(20):
            await small.decide(f"text {number}")
        assert 0 < small.stats().cache_bytes <= 2000
        await small.close()
        none = RoutingService(router, cache_entries=0)
        await none.decide("a")
        await none.decide("a")
        assert (none.stats().texts, none.stats().cache_entries, none.stats().cache_bytes) == (2, 0, 0)
        await none.close()

    asyncio.run(main())


def test_stages_are_observed_and_the_loop_is_not_blocked() -> None:
    async def main() -> None:
        backend, router = parts()
        gate = Gate()
        backend.before = gate
        seen: list[tuple[str, float]] = []
        service = RoutingService(router, observe=lambda stage, seconds: seen.append((stage, seconds)))
        waiting = asyncio.create_task(service.decide("x"))
        await gate.reached()
        ticks = 0
        for _ in range(50):
            await asyncio.sleep(0)
            ticks += 1
        assert ticks == 50
        assert not waiting.done()
        gate.open.set()
        await waiting
        assert [stage for stage, _ in seen] == ["embed", "search", "classify"]
        assert all(seconds >= 0 for _, seconds in seen)
        await service.close()

    asyncio.run(main())


def test_after_close_texts_are_refused_but_those_on_their_way_are_answered() -> None:
    async def main() -> None:
        backend, router = parts()
        gate = Gate()
        backend.before = gate
        service = RoutingService(router)
        waiting = asyncio.create_task(service.decide("x"))
        await gate.reached()
        closing = asyncio.create_task(service.close())
        await asyncio.sleep(0)
        with pytest.raises(RouterError, match="closed"):
            await service.decide("y")
        gate.open.set()
        assert (await waiting).candidates
        await closing

    asyncio.run(main())


def test_texts_that_utf8_cannot_hold_are_hashed_and_answered() -> None:
    async def main() -> None:
        _, router = parts()
        service = RoutingService(router)
        assert (await service.decide("lone \ud800 surrogate")).candidates
        await service.close()

    asyncio.run(main())


def test_a_text_answered_while_its_failed_batch_is_retried_can_be_asked_again() -> None:
    async def main() -> None:
        backend, router = parts()
        gate = Gate()

        def refuse(texts: Sequence[str]) -> None:
            if len(texts) > 1:
                raise Poison("not together")
            if texts == ["b"]:
                gate(texts)

        backend.before = refuse
        service = RoutingService(router, cache_entries=0)
        first, second = (asyncio.create_task(service.decide(text)) for text in ("a", "b"))
        await gate.reached()
        decision = await first
        again = asyncio.create_task(service.decide("a"))
        await asyncio.sleep(0)
        gate.open.set()
        assert await asyncio.wait_for(again, 20) == decision
        assert (await second).candidates
        await service.close()

    asyncio.run(main())
