"""Doubles of vLLM's server, and experts for their base."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from loramux.adapters.lora import LoraAdapter
from tests.backend_kit import (
    Behind,
    Oracle,
    Run,
    behind,
    fakes_of,
    save_base,
    save_experts,
)
from tests.fake_vllm import FakeVllm


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("backend")
    save_base(root / "base")
    return root


@pytest.fixture(scope="module")
def experts(place: Path) -> dict[str, LoraAdapter]:
    return save_experts(place / "experts", place / "base", {"a": 4, "b": 6, "c": 3, "d": 20})


@pytest.fixture(scope="module")
def oracle(place: Path, experts: dict[str, LoraAdapter]) -> Oracle:
    return Oracle(place / "base", {name: place / "experts" / name for name in experts})


@pytest.fixture(scope="module")
def running(place: Path) -> Iterator[tuple[list[FakeVllm], list[str]]]:
    with fakes_of(place / "base", 2) as found:
        yield found


@pytest.fixture
def servers(running: tuple[list[FakeVllm], list[str]]) -> tuple[list[FakeVllm], list[str]]:
    for fake in running[0]:
        fake.restart()
        fake.calls.clear()
        fake.bodies.clear()
        fake.refuse = fake.break_after = None
        fake.prompt_tokens_details = True
    return running


@pytest.fixture
def run(tmp_path: Path, servers: tuple[list[FakeVllm], list[str]], experts: dict[str, LoraAdapter]) -> Run:
    """Run a test on the first `count` servers."""

    def go(test: Callable[[Behind], Coroutine[Any, Any, None]], count: int = 1, **room: Any) -> None:
        async def main() -> None:
            fakes, urls = servers
            async with behind(
                tmp_path / "blends", fakes[:count], urls[:count], dict(experts), **room
            ) as found:
                await test(found)

        asyncio.run(main())

    return go
