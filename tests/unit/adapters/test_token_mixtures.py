"""Experts are made ready for what tokens choose by once, whoever asks and whoever leaves."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import pytest
import torch

from loramux.adapters.errors import AdapterFormatError, BlendError
from loramux.adapters.lora import LoraAdapter, LoraPair
from loramux.adapters.sparse.allowance import Allowance
from loramux.adapters.sparse.token_mixtures import TokenMethod, TokenMixture, TokenMixtures, prepared_bytes


def on_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test on an event loop of its own."""

    @wraps(test)
    def run() -> None:
        asyncio.run(test())

    return run


def expert(name: str, content: str = "") -> LoraAdapter:
    pairs = {"q": LoraPair(torch.randn(2, 8), torch.randn(8, 2), 1.0)}
    return LoraAdapter(name, content or f"hash of {name}", pairs)


class Quiver:
    def __init__(self, experts: Sequence[LoraAdapter]) -> None:
        self.experts = experts
        self.nbytes = 10 * len(experts)

    def slot(self, top_k: int, temperature: float) -> object:
        return (self, top_k, temperature)


@dataclass
class Counting:
    gate: threading.Event | None = None
    calls: int = 0

    def __call__(self, _: TokenMethod, experts: Sequence[LoraAdapter]) -> Quiver:
        self.calls += 1
        if self.gate is not None:
            assert self.gate.wait(10)
        return Quiver(experts)


A, B, C = expert("a"), expert("b"), expert("c")


ARROW, SPECTR = TokenMethod.ARROW, TokenMethod.SPECTR


def mixture(
    *experts: LoraAdapter, top_k: int = 1, temperature: float = 1.0, method: TokenMethod = ARROW
) -> TokenMixture:
    return TokenMixture.of(method, experts, top_k=top_k, temperature=temperature)


def test_mixtures_are_canonical() -> None:
    assert mixture(A, B).key == mixture(B, A).key
    assert mixture(A, B, top_k=9).top_k == 2
    assert mixture(A, expert("again", A.content_hash)).key == mixture(A).key
    others = [mixture(A), mixture(A, C), mixture(A, B, top_k=2), mixture(A, B, temperature=0.5)]
    others.append(mixture(A, B, method=SPECTR))
    assert len({m.key for m in [mixture(A, B), *others]}) == 6


@pytest.mark.parametrize(("top_k", "temperature"), [(0, 1.0), (1, 0.0), (1, float("nan"))])
def test_what_cannot_be_is_refused(top_k: int, temperature: float) -> None:
    with pytest.raises(BlendError, match="positive"):
        mixture(A, top_k=top_k, temperature=temperature)
    with pytest.raises(BlendError, match="at least one"):
        mixture()


@on_a_loop
async def test_a_set_of_experts_is_made_ready_once() -> None:
    prepare = Counting()
    mixtures = TokenMixtures(prepare)

    async def ask(top_k: int) -> tuple[object, bool]:
        async with mixtures.lease(mixture(A, B, top_k=top_k)) as lease:
            assert lease.handle is not None
            return lease.handle.slot, lease.cached

    (one, cold), (two, _), (other, _) = await asyncio.gather(ask(1), ask(1), ask(2))
    again, cached = await ask(1)
    assert one is two is again
    assert other is not one
    assert (cold, cached) == (False, True)
    assert prepare.calls == 1
    assert mixtures.nbytes == {"arrow": 20, "spectr": 0}


@on_a_loop
async def test_an_older_set_goes_after_its_last_lease() -> None:
    mixtures = TokenMixtures(Counting())
    async with mixtures.lease(mixture(A)):
        async with mixtures.lease(mixture(A, B, C)):
            assert mixtures.nbytes["arrow"] == 40
        assert mixtures.nbytes["arrow"] == 40
    assert mixtures.nbytes["arrow"] == 30


@on_a_loop
async def test_each_method_keeps_its_last_set_while_there_is_room() -> None:
    arrow, spectr = prepared_bytes(ARROW, [A, B]), prepared_bytes(SPECTR, [A, B])
    assert spectr == A.nbytes + B.nbytes
    prepare = Counting()
    allowance = Allowance(arrow + spectr)
    mixtures = TokenMixtures(prepare, allowance)
    for _ in range(2):
        for method in (ARROW, SPECTR):
            async with mixtures.lease(mixture(A, B, method=method)) as lease:
                assert lease.method == method
    assert prepare.calls == 2
    assert allowance.taken == arrow + spectr
    wide = prepared_bytes(SPECTR, [A, B, C])
    assert wide > spectr
    async with mixtures.lease(mixture(A, B, C, method=SPECTR)):
        assert mixtures.nbytes == {"arrow": 0, "spectr": 30}
        assert allowance.taken == wide


@on_a_loop
async def test_a_set_that_does_not_fit_is_refused_and_an_unused_one_makes_room() -> None:
    size = prepared_bytes(ARROW, [A])
    assert size == A.nbytes + 4 * 8
    allowance = Allowance(2 * size)
    mixtures = TokenMixtures(Counting(), allowance)
    async with mixtures.lease(mixture(A)):
        with pytest.raises(
            BlendError, match=rf"arrow over 2 experts takes .* and {size} of {2 * size} are left"
        ):
            async with mixtures.lease(mixture(B, C)):
                pass
        assert allowance.taken == size
    async with mixtures.lease(mixture(B, C)):
        assert allowance.taken == 2 * size


@on_a_loop
async def test_a_client_that_leaves_undoes_nothing() -> None:
    prepare = Counting(threading.Event())
    mixtures = TokenMixtures(prepare)

    async def ask() -> bool:
        async with mixtures.lease(mixture(A)) as lease:
            return lease.handle is not None

    first, second = asyncio.create_task(ask()), asyncio.create_task(ask())
    await asyncio.sleep(0.01)
    first.cancel()
    assert prepare.gate is not None
    prepare.gate.set()
    assert await second
    assert prepare.calls == 1


@on_a_loop
async def test_a_set_that_is_refused_can_be_asked_for_again() -> None:
    def refuse(_: TokenMethod, experts: Sequence[LoraAdapter]) -> Quiver:
        raise AdapterFormatError(f"{experts[0].id}: no")

    allowance = Allowance(10**6)
    mixtures = TokenMixtures(refuse, allowance)
    for _ in range(2):
        with pytest.raises(AdapterFormatError, match="a: no"):
            async with mixtures.lease(mixture(A)):
                pass
    assert mixtures.nbytes["arrow"] == 0
    assert allowance.taken == 0
