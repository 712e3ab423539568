"""Sparse models come and go; a running lease keeps its model, and the last one frees it."""

import asyncio
import gc
import weakref
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import wraps
from typing import Any

import pytest
import torch

from loramux.adapters.errors import AdapterFormatError, BlendError
from loramux.adapters.lora import LoraPair
from loramux.adapters.sparse.allowance import Allowance
from loramux.adapters.sparse.model import (
    ExpertFactors,
    ExpertMixture,
    FfnRouting,
    FfnStrategy,
    Kind,
    MixtureFfn,
    RankMixture,
    SparseModel,
)
from loramux.adapters.sparse.shelf import Shelf, largest_rank
from loramux.adapters.sparse.tally import ExpertLoad


def on_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test on an event loop of its own."""

    @wraps(test)
    def run() -> None:
        asyncio.run(test())

    return run


def model(name: str, content: str = "", kind: Kind = Kind.LORACOE) -> SparseModel:
    mixture = RankMixture(torch.randn(3, 8), torch.randn(8, 3), 1.0, torch.randn(6, 8), experts=2)
    return SparseModel(name, kind, f"sha256:{content or name}", linear={"q": mixture})


@dataclass(eq=False)
class Placed:
    model: SparseModel
    released: bool = False
    nbytes: int = 100

    def load(self) -> ExpertLoad:
        return ExpertLoad((1, 2), 0.5)

    def release(self) -> None:
        self.released = True


@on_a_loop
async def test_a_lease_says_what_it_is() -> None:
    shelf = Shelf(Placed, [model("a")])
    async with shelf.lease("a") as lease:
        assert (lease.method, lease.rank, lease.cached, lease.relative_error) == ("loracoe", 3, True, 0.0)
        assert lease.handle is not None
        assert lease.handle.key == lease.key
    shelf.check_integrity()


@on_a_loop
async def test_keys_follow_content_and_not_names() -> None:
    shelf = Shelf(Placed, [model("a", "same"), model("b", "same"), model("c", "other")])
    keys = []
    for name in "abc":
        async with shelf.lease(name) as lease:
            keys.append(lease.key)
    assert keys[0] == keys[1] != keys[2]


@on_a_loop
async def test_running_leases_keep_an_unloaded_model_and_the_last_one_frees_it() -> None:
    shelf = Shelf(Placed, [model("a")])
    async with AsyncExitStack() as later:
        async with shelf.lease("a") as lease:
            await later.enter_async_context(shelf.lease("a"))
            assert lease.handle is not None
            slot = lease.handle.slot
            shelf.remove("a")
            assert "a" not in shelf.cards
            assert shelf.stats().nbytes == 100
            assert not shelf.stats().loads
        assert not slot.released
        with pytest.raises(BlendError, match="no sparse model 'a'"):
            async with shelf.lease("a"):
                pass
        await shelf.add(model("a", "new"))
        assert shelf.stats().nbytes == 200
    assert slot.released
    assert shelf.stats().nbytes == 100
    shelf.check_integrity()


@on_a_loop
async def test_the_shelf_keeps_no_second_copy_of_the_tensors() -> None:
    tensor = torch.randn(6, 8)
    watched = weakref.ref(tensor)
    given = SparseModel(
        "a",
        Kind.LORACOE,
        "sha256:a",
        linear={"q": RankMixture(torch.randn(3, 8), torch.randn(8, 3), 1.0, tensor, experts=2)},
    )
    shelf = Shelf(Placed)
    await shelf.add(given)
    shelf.remove("a")
    del tensor, given
    for _ in range(100):  # the placing thread lets go in its own time
        gc.collect()
        if watched() is None:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the tensors of an unloaded model are still there")


@on_a_loop
async def test_a_model_that_cannot_be_placed_leaves_nothing() -> None:
    def refuse(_: SparseModel) -> Placed:
        raise AdapterFormatError("model.layers.0.mlp: no room")

    allowance = Allowance(10**6)
    shelf = Shelf(refuse, (), allowance)
    with pytest.raises(AdapterFormatError, match=r"layers\.0\.mlp"):
        await shelf.add(model("a"))
    assert not shelf.cards
    assert shelf.stats().nbytes == 0
    assert allowance.taken == 0


@on_a_loop
async def test_what_does_not_fit_is_refused_and_what_goes_makes_room() -> None:
    one = model("a")
    allowance = Allowance(2 * one.nbytes)
    shelf = Shelf(Placed, [one], allowance)
    await shelf.add(model("b"))
    with pytest.raises(BlendError, match=rf"'c' takes {one.nbytes} bytes on the device and 0 of .* are left"):
        await shelf.add(model("c"))
    assert set(shelf.cards) == {"a", "b"}
    async with shelf.lease("a"):
        shelf.remove("a")
        with pytest.raises(BlendError, match=r"residency\.sparse_bytes"):
            await shelf.add(model("c"))
    await shelf.add(model("c"))
    assert allowance.taken == 2 * one.nbytes


@on_a_loop
async def test_two_loads_of_one_name_at_once_leave_one() -> None:
    shelf = Shelf(Placed)
    results = await asyncio.gather(
        shelf.add(model("a")), shelf.add(model("a", "other")), return_exceptions=True
    )
    assert sum(isinstance(result, BlendError) for result in results) == 1
    assert list(shelf.cards) == ["a"]
    assert shelf.stats().nbytes == 100


def test_the_rank_is_the_largest_of_any_factors() -> None:
    def factors(rank: int) -> ExpertFactors:
        return ExpertFactors(torch.zeros(2, rank, 8), torch.zeros(2, 8, rank), 1.0)

    routing = FfnRouting(FfnStrategy.TOP_K)
    found = SparseModel(
        "a",
        Kind.MIXLORA,
        "sha256:a",
        plain={"q": LoraPair(torch.zeros(5, 8), torch.zeros(8, 5), 1.0)},
        linear={"v": ExpertMixture(factors(6), torch.zeros(2, 8))},
        ffn={"mlp": MixtureFfn(torch.zeros(2, 8), {"fc1": factors(7), "fc2": factors(2)}, routing)},
    )
    assert largest_rank(found) == 7
    assert largest_rank(SparseModel("a", Kind.MOLA, "sha256:a")) == 0


@on_a_loop
async def test_a_model_that_waits_is_read_and_placed_once_by_its_first_requests() -> None:
    first, read = model("a"), list[str]()

    def again(id: str) -> SparseModel:
        read.append(id)
        return first

    allowance = Allowance(first.nbytes)
    shelf = Shelf(Placed, [first], allowance, again)
    assert shelf.cards["a"].content_hash == "sha256:a"
    assert (read, shelf.stats().nbytes, dict(shelf.stats().loads)) == ([], 0, {})
    assert not allowance.has(1)  # its room is set apart

    async def ask() -> object:
        async with shelf.lease("a") as lease:
            return lease.handle.slot

    slots = await asyncio.gather(*(ask() for _ in range(5)))
    assert read == ["a"]
    assert all(slot is slots[0] for slot in slots)
    assert shelf.stats().loads == {"a": ExpertLoad((1, 2), 0.5)}
    shelf.remove("a")
    assert slots[0].released
    assert allowance.has(first.nbytes)
    shelf.check_integrity()


@on_a_loop
async def test_a_model_that_waited_and_changed_meanwhile_is_refused() -> None:
    shelf = Shelf(Placed, [model("a")], None, lambda id: model(id, "other"))
    for _ in range(2):
        with pytest.raises(BlendError, match="files of sparse model 'a' have changed"):
            async with shelf.lease("a"):
                raise AssertionError("never held")
    shelf.remove("a")
    shelf.check_integrity()


@on_a_loop
async def test_a_model_that_never_came_can_go() -> None:
    allowance = Allowance()
    shelf = Shelf(Placed, [model("a")], allowance, model)
    shelf.remove("a")
    assert allowance.taken == 0
    assert not shelf.cards
