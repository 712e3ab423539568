"""Experts copied in before the first request: there from the start, and evicted like any other."""

import asyncio

import torch

from loramux.adapters.arena import Arena
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.blend import Blend
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.residency import Lease, Residency
from tests.tiny import random_adapter

SHAPES = BaseShapes("tiny", {"up": (24, 16), "down": (16, 24)})


def make(rows: int, names: str = "abcd", rank: int = 4) -> tuple[Residency, Arena]:
    arena = Arena(SHAPES, rows)
    return Residency({name: random_adapter(SHAPES, rank, name) for name in names}, arena), arena


def one(residency: Residency, name: str) -> Blend:
    return Blend.of([(name, residency.experts[name].content_hash, 1.0)])


def delta(arena: Arena, lease: Lease, module: str) -> torch.Tensor:
    assert lease.handle is not None
    slot = lease.handle.slot
    rows = [row for lo, hi in slot.extents for row in range(lo, hi)]
    return (arena.b[module][rows].double() * slot.gate[:, None].double()).T @ arena.a[module][rows].double()


def is_right(arena: Arena, lease: Lease, expert: LoraAdapter) -> bool:
    return all(torch.allclose(delta(arena, lease, m), expert.delta(m), atol=1e-5) for m in SHAPES.modules)


def test_what_fits_is_resident_and_nothing_is_copied_for_it_later() -> None:
    residency, arena = make(rows=20)
    assert residency.preload() == 4
    assert residency.stats().resident_experts == ("a", "b", "c", "d")
    before = {module: tensor.clone() for module, tensor in (arena.a | arena.b).items()}
    versions = [tensor._version for tensor in (*arena.a.values(), *arena.b.values())]

    async def scenario() -> None:
        for name in "abcd":
            async with residency.lease(one(residency, name)) as lease:
                assert is_right(arena, lease, residency.experts[name])

    asyncio.run(scenario())
    residency.check_integrity()
    assert [tensor._version for tensor in (*arena.a.values(), *arena.b.values())] == versions
    assert all(torch.equal(tensor, before[module]) for module, tensor in (arena.a | arena.b).items())
    assert residency.stats().evictions == 0


def test_where_not_all_fit_the_first_ones_are_there_and_the_oldest_makes_room() -> None:
    residency, arena = make(rows=10)
    assert residency.preload() == 2
    residency.check_integrity()

    async def scenario() -> None:
        async with residency.lease(one(residency, "d")) as lease:
            assert is_right(arena, lease, residency.experts["d"])
            assert residency.stats().resident_experts == ("b", "d")
        async with residency.lease(one(residency, "a")) as lease:
            assert is_right(arena, lease, residency.experts["a"])

    asyncio.run(scenario())
    residency.check_integrity()
    assert residency.stats().evictions == 2


def test_a_second_preload_changes_nothing_and_a_removed_expert_gives_its_rows_back() -> None:
    residency, arena = make(rows=20)
    residency.preload()
    assert residency.preload() == 4
    assert arena.free_rows == 4
    residency.remove_expert("b")
    assert arena.free_rows == 8
    residency.check_integrity()
