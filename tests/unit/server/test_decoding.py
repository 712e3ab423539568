"""Several sequences as one stream."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from loramux.server.ask import choice_seed
from loramux.server.decoding import interleave


async def counting(name: str, upto: int, closed: list[str], fail: bool = False) -> AsyncGenerator[str]:
    try:
        for number in range(upto):
            await asyncio.sleep(0)
            yield f"{name}{number}"
        if fail:
            raise ValueError(name)
        await asyncio.sleep(0)
    finally:
        await asyncio.sleep(0)
        closed.append(name)


@pytest.mark.parametrize("streams", [1, 2, 5])
def test_every_item_comes_once_and_in_its_streams_order(streams: int) -> None:
    async def scenario() -> None:
        closed: list[str] = []
        names = "abcde"[:streams]
        items = [item async for item in interleave([counting(name, 4, closed) for name in names])]
        for name in names:
            assert [item for item in items if item[0] == name] == [f"{name}{i}" for i in range(4)]
        assert sorted(closed) == list(names)

    asyncio.run(scenario())


@pytest.mark.parametrize("streams", [1, 3])
def test_closing_early_closes_every_stream_before_it_returns(streams: int) -> None:
    async def scenario() -> None:
        closed: list[str] = []
        names = "abc"[:streams]
        async with aclosing(interleave([counting(name, 100, closed) for name in names])) as items:
            async for _ in items:
                break
        assert sorted(closed) == list(names)

    asyncio.run(scenario())


def test_an_error_in_one_stream_closes_the_others_and_is_raised() -> None:
    async def scenario() -> None:
        closed: list[str] = []
        streams = [
            counting("a", 1000, closed),
            counting("b", 3, closed, fail=True),
            counting("c", 1000, closed),
        ]
        with pytest.raises(ValueError, match="b"):
            async for _ in interleave(streams):
                pass
        assert sorted(closed) == ["a", "b", "c"]

    asyncio.run(scenario())


def test_seeds_of_choices_are_fixed_and_distinct() -> None:
    seeds = [choice_seed(7, choice) for choice in range(100)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 100
    assert all(seed is not None and -(2**63) <= seed < 2**63 for seed in seeds)
    assert choice_seed(None, 3) is None
    assert choice_seed(8, 3) != choice_seed(7, 3)
