"""Leases: merged once, pinned while used, evicted by age, never half made."""

import asyncio
from typing import Any

import pytest
import torch

from loramux.adapters.arena import Arena, row_bytes
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.blend import Blend
from loramux.adapters.errors import BlendError
from loramux.adapters.lora import LoraAdapter, LoraPair
from loramux.adapters.residency import BlendTooLarge, Residency
from loramux.kernels.gated_lora import dense_gate, plan_step

SHAPES = BaseShapes("tiny", {"up": (24, 16), "down": (16, 24), "q": (16, 16)})


def expert(name: str, rank: int = 4, modules: tuple[str, ...] = ("up", "down", "q")) -> LoraAdapter:
    pairs = {}
    for module in modules:
        n_out, n_in = SHAPES.modules[module]
        pairs[module] = LoraPair(
            torch.randn(rank, n_in), torch.randn(n_out, rank), 0.25 + torch.rand(()).item()
        )
    return LoraAdapter(name, f"hash of {name} {torch.randint(2**31, ()).item()}", pairs)


def blend(residency: Residency, method: str = "exact", **weights: float) -> Blend:
    hashes = {name: residency.experts[name].content_hash for name in weights}
    return Blend.of([(name, hashes[name], weight) for name, weight in weights.items()], method=method)


def make(names: str = "abcdef", rows: int = 64, **options: Any) -> Residency:
    return Residency({name: expert(name) for name in names}, Arena(SHAPES, rows), **options)


def served_delta(residency: Residency, handle: Any, module: str) -> torch.Tensor:
    """What the arena and the gate amount to, as a dense float64 matrix."""
    arena = residency._arena
    gate = dense_gate(plan_step([(handle.slot, 1)]), 1, arena.rows)[0].double()
    return (arena.b[module].double() * gate[:, None]).T @ arena.a[module].double()


def test_a_resident_blend_is_the_weighted_sum_of_its_experts() -> None:
    experts = {
        "a": expert("a", 3),
        "b": expert("b", 7, ("up",)),
        "c": expert("c", 5, ("down", "q")),
    }

    async def scenario() -> None:
        residency = Residency(experts, Arena(SHAPES, 15))
        async with residency.lease(blend(residency, a=0.5, b=-1.25, c=2.0)) as lease:
            assert lease.rank == 15
            assert not lease.cached
            for module, (n_out, n_in) in SHAPES.modules.items():
                expected = torch.zeros(n_out, n_in, dtype=torch.float64)
                for name, weight in {"a": 0.5, "b": -1.25, "c": 2.0}.items():
                    if module in experts[name].pairs:
                        expected += weight * experts[name].delta(module)
                actual = served_delta(residency, lease.handle, module)
                assert torch.allclose(actual, expected, atol=1e-5)
        residency.check_integrity()

    asyncio.run(scenario())


@pytest.mark.parametrize("method", ["exact", "svd", "linear", "ties", "dare_ties"])
def test_experts_that_wait_in_16_bits_blend_as_in_the_type_of_the_rows(method: str) -> None:
    narrow = {name: expert(name).to(torch.bfloat16) for name in "ab"}
    wide = {name: one.to(torch.float32) for name, one in narrow.items()}

    async def served(experts: dict[str, LoraAdapter]) -> list[torch.Tensor]:
        residency = Residency(experts, Arena(SHAPES, 16))
        async with residency.lease(blend(residency, method, a=0.3, b=0.7)) as lease:
            return [served_delta(residency, lease.handle, module) for module in SHAPES.modules]

    for found, expected in zip(asyncio.run(served(narrow)), asyncio.run(served(wide)), strict=True):
        assert torch.equal(found, expected)
    assert sum(one.nbytes for one in narrow.values()) * 2 == sum(one.nbytes for one in wide.values())


@pytest.mark.parametrize("method", ["svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_inexact_blends_are_merged_and_say_how_far_off_they_are(method: str) -> None:
    async def scenario() -> None:
        residency = make()
        async with residency.lease(blend(residency, method, a=0.5, b=0.5)) as lease:
            expected = 0.5 * residency.experts["a"].delta("up") + 0.5 * residency.experts["b"].delta("up")
            assert lease.relative_error > 0
            assert not torch.allclose(served_delta(residency, lease.handle, "up"), expected, atol=1e-3)
        residency.check_integrity()

    asyncio.run(scenario())


def test_concurrent_leases_of_one_blend_make_it_once() -> None:
    async def scenario() -> None:
        residency = make()
        wanted = blend(residency, "svd", a=0.5, b=0.5)
        both = asyncio.Barrier(5)

        async def use() -> Any:
            async with residency.lease(wanted) as lease:
                await both.wait()
                return lease.handle

        handles = await asyncio.gather(*(use() for _ in range(5)))
        assert len({id(handle) for handle in handles}) == 1
        assert residency.stats().used_bytes == 4 * row_bytes(SHAPES, torch.float32)
        async with residency.lease(wanted) as lease:
            assert lease.cached
        assert (residency.stats().hits, residency.stats().misses) == (1, 5)
        residency.check_integrity()

    asyncio.run(scenario())


def test_blends_share_the_rows_of_the_experts_they_have_in_common() -> None:
    async def scenario() -> None:
        residency = make()
        async with (
            residency.lease(blend(residency, a=0.5, b=0.5)) as one,
            residency.lease(blend(residency, a=0.9, b=0.1, c=0.2)) as two,
        ):
            assert residency.stats().used_bytes == 12 * row_bytes(SHAPES, torch.float32)
            assert one.key != two.key
            for module in SHAPES.modules:
                experts = residency.experts
                expected = 0.5 * experts["a"].delta(module) + 0.5 * experts["b"].delta(module)
                assert torch.allclose(served_delta(residency, one.handle, module), expected, atol=1e-5)

    asyncio.run(scenario())


def test_the_least_recently_used_expert_makes_room_and_a_pinned_one_never_does() -> None:
    async def scenario() -> None:
        residency = make(rows=12)  # three experts of rank 4
        for name in "abc":
            async with residency.lease(blend(residency, **{name: 1.0})):
                pass
        async with residency.lease(blend(residency, a=1.0)) as lease:
            assert lease.cached
            async with residency.lease(blend(residency, d=1.0)):
                assert set(residency.stats().resident_experts) == {"a", "c", "d"}
                async with residency.lease(blend(residency, e=1.0)):
                    assert set(residency.stats().resident_experts) == {"a", "d", "e"}
        assert residency.stats().evictions == 2
        async with residency.lease(blend(residency, b=1.0)) as lease:
            assert not lease.cached
        residency.check_integrity()

    asyncio.run(scenario())


def test_a_lease_waits_for_room_and_gets_it() -> None:
    async def scenario() -> None:
        residency = make(rows=8)
        got: list[str] = []

        async def use(name: str) -> None:
            async with residency.lease(blend(residency, **{name: 1.0})):
                got.append(name)

        async with residency.lease(blend(residency, a=0.5, b=0.5)):
            waiting = asyncio.create_task(use("c"))
            for _ in range(20):
                await asyncio.sleep(0)
            assert not got
        await waiting
        assert got == ["c"]
        residency.check_integrity()

    asyncio.run(scenario())


def test_a_blend_that_can_never_fit_is_refused_with_the_numbers() -> None:
    async def scenario() -> None:
        residency = make(rows=7)
        with pytest.raises(BlendTooLarge, match=r"8 rows .* there are 7"):
            async with residency.lease(blend(residency, a=0.5, b=0.5)):
                pass
        assert residency.stats().used_bytes == 0
        assert residency.stats().blends == 0
        residency.check_integrity()

    asyncio.run(scenario())


def test_a_client_that_leaves_while_merging_harms_no_other() -> None:
    async def scenario() -> None:
        residency = make()
        wanted = blend(residency, "svd", a=0.4, b=0.6)

        async def use() -> str:
            async with residency.lease(wanted) as lease:
                return lease.key

        leaver, stayer = asyncio.create_task(use()), asyncio.create_task(use())
        await asyncio.sleep(0)
        leaver.cancel()
        assert await stayer == wanted.key
        with pytest.raises(asyncio.CancelledError):
            await leaver
        assert residency.stats().pinned_bytes == 0
        residency.check_integrity()

    asyncio.run(scenario())


def test_a_merge_that_is_refused_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        residency = Residency({"a": expert("a", 4), "b": expert("b", 5)}, Arena(SHAPES, 32))
        wanted = blend(residency, "linear", a=0.5, b=0.5)
        for _ in range(2):
            with pytest.raises(BlendError):
                async with residency.lease(wanted):
                    pass
        assert residency.stats().blends == 0
        assert residency.stats().used_bytes == 0
        residency.check_integrity()

    asyncio.run(scenario())


def test_removing_an_expert_frees_it_once_its_last_lease_ends() -> None:
    async def scenario() -> None:
        residency = make()
        wanted = blend(residency, a=1.0)
        async with residency.lease(wanted) as lease:
            before = served_delta(residency, lease.handle, "up")
            residency.remove_expert("a")
            assert torch.equal(served_delta(residency, lease.handle, "up"), before)
            assert residency.stats().used_bytes > 0
        assert residency.stats().used_bytes == 0
        with pytest.raises(BlendError, match="'a'"):
            async with residency.lease(wanted):
                pass
        residency.check_integrity()

    asyncio.run(scenario())


def test_the_same_name_with_new_content_is_a_new_expert() -> None:
    async def scenario() -> None:
        residency = make()
        async with residency.lease(blend(residency, a=1.0)) as lease:
            old = served_delta(residency, lease.handle, "up")
        residency.remove_expert("a")
        residency.add_expert(expert("a"))
        async with residency.lease(blend(residency, a=1.0)) as lease:
            assert not lease.cached
            assert not torch.allclose(served_delta(residency, lease.handle, "up"), old)
        with pytest.raises(BlendError, match="unload"):
            residency.add_expert(expert("a"))

    asyncio.run(scenario())


def test_the_bare_blend_takes_nothing() -> None:
    async def scenario() -> None:
        residency = make()
        async with residency.lease(Blend.bare()) as lease:
            assert lease.handle is None
            assert lease.cached
        assert residency.stats().used_bytes == 0

    asyncio.run(scenario())


def test_cached_blends_are_bounded() -> None:
    async def scenario() -> None:
        residency = make(max_blends=3)
        for step in range(1, 10):
            async with residency.lease(blend(residency, a=step / 10)):
                pass
        assert residency.stats().blends == 3
        residency.check_integrity()

    asyncio.run(scenario())


def test_random_traffic_never_loses_a_row() -> None:
    async def scenario() -> None:
        residency = make("abcdefgh", rows=22, max_blends=8)

        async def client(number: int) -> None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())) + number)
            for _ in range(15):
                names = {
                    "abcdefgh"[int(torch.randint(8, (1,), generator=generator))]
                    for _ in range(int(torch.randint(1, 4, (1,), generator=generator)))
                }
                weights = {
                    name: float(torch.randint(1, 100, (1,), generator=generator)) / 100 for name in names
                }
                method = "svd" if torch.rand((), generator=generator) < 0.3 else "exact"
                async with residency.lease(blend(residency, method, **weights)) as lease:
                    assert lease.handle is not None
                    await asyncio.sleep(0)
                    residency.check_integrity()

        await asyncio.gather(*(client(number) for number in range(6)))
        residency.check_integrity()
        assert residency.stats().pinned_bytes == 0

    asyncio.run(scenario())


def test_rows_are_given_lowest_first_and_never_twice() -> None:
    arena = Arena(SHAPES, 10)
    first, second = arena.allocate(4), arena.allocate(3)
    assert (first, second) == (((0, 4),), ((4, 7),))
    arena.free(first)
    assert arena.allocate(5) == ((0, 4), (7, 8))
    assert arena.free_rows == 2
    with pytest.raises(MemoryError, match="2 free rows, 3"):
        arena.allocate(3)
    with pytest.raises(ValueError, match="free already"):
        arena.free([(8, 9)])


def test_a_new_occupant_finds_no_trace_of_the_old_one() -> None:
    arena = Arena(SHAPES, 8)
    rows = arena.allocate(6)
    arena.write(expert("big", 6), rows)
    arena.free(rows)
    rows = arena.allocate(6)
    small = expert("small", 2, ("up",))
    arena.write(small, rows)
    assert not arena.a["down"].any()
    assert not arena.b["up"][2:].any()
    pair = small.pairs["up"]
    assert torch.allclose(arena.b["up"][:2], pair.b.T * pair.scale)
