"""A pool of a thousand experts: it loads, it routes, and what a request does hardly grows with it.

Times are of this thread's processor, with several times what a quiet machine takes as the bound.
"""

import asyncio
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from loramux.adapters.arena import Arena
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.blend import Blend
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.residency import Residency
from loramux.router.ranked import Ranked
from loramux.router.router import Router
from loramux.server.catalog import Catalog
from loramux.server.pool.experts import measure_experts, read_experts
from loramux.server.pool.manifest import Pool, read_pool
from loramux.server.pool.routing import load_pool_router
from loramux.server.settings import Settings
from tests.big_pool import BigPool, write_big_pool
from tests.kit import DEMO_POOL

EXPERTS = 1000
#: Processor seconds: of reading one expert of fourteen modules, and of a decision.
READ, DECIDE = 0.010, 0.020


def seconds(work: Callable[[], object], tries: int = 3) -> float:
    """The least of a few."""
    taken = []
    for _ in range(tries):
        started = time.thread_time()
        work()
        taken.append(time.thread_time() - started)
    return min(taken)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> BigPool:
    return write_big_pool(tmp_path_factory.mktemp("big") / "pool", EXPERTS, rank=1, layers=2)


@pytest.fixture(scope="module")
def pool(big: BigPool) -> Pool:
    return read_pool(big.root)


@pytest.fixture(scope="module")
def router(big: BigPool, pool: Pool) -> Router:
    return load_pool_router(Settings(pool=big.root), pool)


@pytest.fixture(scope="module")
def experts(pool: Pool) -> dict[str, LoraAdapter]:
    shapes = BaseShapes.from_config_dir(DEMO_POOL / "base", pool.manifest.base.id)
    started = time.thread_time()
    found = read_experts(pool, shapes, torch.float32)
    assert time.thread_time() - started < READ * EXPERTS
    return found


def test_the_manifest_of_a_thousand_experts_is_not_compared_name_by_name(big: BigPool) -> None:
    assert seconds(lambda: read_pool(big.root), 1) < 0.002 * EXPERTS


def test_experts_are_measured_from_their_headers(pool: Pool) -> None:
    shapes = BaseShapes.from_config_dir(DEMO_POOL / "base", pool.manifest.base.id)
    assert {stack.rank for stacks in measure_experts(pool, shapes).values() for stack in stacks} == {1}


def test_every_expert_has_numbers_of_its_own(experts: dict[str, LoraAdapter]) -> None:
    assert len({expert.content_hash for expert in experts.values()}) == EXPERTS
    module = next(iter(next(iter(experts.values())).pairs))
    assert len({float(expert.pairs[module].a[0, 0]) for expert in experts.values()}) > EXPERTS / 2


def test_a_text_finds_its_expert_among_a_thousand(big: BigPool, router: Router) -> None:
    generator = np.random.default_rng()
    own = generator.integers(EXPERTS, size=64)
    texts = [big.text(int(expert), generator) for expert in own]
    decisions = router.decide(texts)
    right = [d.candidates[0].id == big.names[n] for d, n in zip(decisions, own, strict=True)]
    assert np.mean(right) > 0.9
    plan = router.resolve()
    encoded = router.embed(texts[:1])

    def decide() -> None:
        router.choose_row(router.score(texts[:1], encoded).row(0), plan)

    assert seconds(decide, 7) < DECIDE


def test_a_decision_looks_at_the_first_candidates_only(
    big: BigPool, router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    whole = Ranked._candidate
    monkeypatch.setattr(
        Ranked, "_candidate", lambda self, rank, place: made.append(rank) or whole(self, rank, place)
    )  # type: ignore[func-returns-value]
    [decision] = router.decide([" ".join(big.words[7])])
    assert decision.candidates[0].id == big.names[7]
    assert len(made) <= 8
    assert len(list(decision.candidates)) == EXPERTS


def test_the_catalog_of_a_request_is_looked_up_once_per_change(
    router: Router, experts: dict[str, LoraAdapter]
) -> None:
    served = dict(experts)
    catalog = Catalog("base", served, 512, router)
    assert catalog.routable() is catalog.routable()
    [decision] = router.decide(["anything"])
    assert catalog.among(decision) is decision
    gone = served.pop(decision.candidates[0].id)
    assert gone.id not in catalog.routable()
    assert catalog.among(decision).candidates[0].id == decision.candidates[1].id
    served[gone.id] = gone
    assert catalog.among(decision) is decision


def test_ten_times_the_experts_do_not_make_a_lease_slower(experts: dict[str, LoraAdapter]) -> None:
    """Once every request counted all experts when it let go."""
    shapes = BaseShapes.from_config_dir(DEMO_POOL / "base", "base")
    chosen = list(experts.values())

    def made(count: int) -> float:
        held = {expert.id: expert for expert in chosen[:count]}
        residency = Residency(held, Arena(shapes, 16))
        blend = Blend.of([(expert.id, expert.content_hash, 0.5) for expert in chosen[:3]])

        async def leases() -> None:
            for _ in range(300):
                async with residency.lease(blend):
                    pass

        return seconds(lambda: asyncio.run(leases()))

    assert made(EXPERTS) < 3 * made(EXPERTS // 10) + 0.01


def test_random_traffic_over_many_experts_stays_within_its_rows(experts: dict[str, LoraAdapter]) -> None:
    shapes = BaseShapes.from_config_dir(DEMO_POOL / "base", "base")
    residency = Residency(experts, Arena(shapes, 24), max_blends=50)
    generator = np.random.default_rng()
    names = list(experts)

    async def ask() -> None:
        for _ in range(8):
            parts = [names[n] for n in generator.integers(EXPERTS, size=3)]
            blend = Blend.of([(name, experts[name].content_hash, 0.5) for name in parts])
            async with residency.lease(blend) as lease:
                assert lease.handle is not None
                stats = residency.stats()
                assert stats.pinned_bytes <= stats.used_bytes <= stats.capacity_bytes
                assert stats.blends <= 50 + 6  # those that are in use stay known
                residency.check_integrity()

    async def all_of_them() -> None:
        await asyncio.gather(*(ask() for _ in range(6)))

    asyncio.run(all_of_them())
    residency.check_integrity()
    assert residency.stats().evictions > 60
