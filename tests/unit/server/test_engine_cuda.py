"""Captured steps on a CUDA device against transformers' own generate, and against uncaptured ones."""

import asyncio
from typing import Any

import pytest
import torch

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.residency import Handle
from loramux.adapters.sparse.slot import place
from loramux.server.engine.protocol import Sampling, Token, Work
from tests.tiny import Rig, greedy, random_experts, random_prompt, running, tiny_llama, with_delta
from tests.unit.adapters.sparse.random_models import loracoe, loramoe, mixlora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MIXTURES: list[dict[str, float]] = [{}, {"a": 1.0}, {"b": 0.7, "c": 0.3}, {"a": 0.5, "b": 0.25, "c": 0.25}]


def test_captured_steps_say_what_generate_says() -> None:
    model = tiny_llama()
    experts = random_experts(model, (4, 8, 3))
    by_name = {expert.id: expert for expert in experts}
    jobs = [(random_prompt(3 + 11 * i), MIXTURES[i % 4]) for i in range(11)]
    expected = [
        greedy(with_delta(model, [(by_name[n], w) for n, w in mixture.items()]), prompt, 24)
        for prompt, mixture in jobs
    ]

    async def scenario(**options: Any) -> tuple[list[list[int]], list[list[int]]]:
        async with running(with_delta(model, []).cuda(), experts, **options) as rig:
            alone = [(await rig.ask(*job)).tokens for job in jobs]
            together = await asyncio.gather(*(rig.ask(*job) for job in jobs))
            return alone, [answer.tokens for answer in together]

    assert asyncio.run(scenario(graphs=True)) == (expected, expected)
    assert asyncio.run(scenario(graphs=True, max_running=3)) == (expected, expected)
    assert asyncio.run(scenario()) == (expected, expected)


def test_seeded_rows_draw_the_same_tokens_alone_and_in_a_captured_batch() -> None:
    model = tiny_llama().cuda()
    options = {"temperature": 1.2, "top_p": 0.9, "max_tokens": 40}
    prompts = [random_prompt(9 + 3 * i) for i in range(7)]

    async def scenario() -> tuple[list[list[int]], list[list[int]]]:
        async with running(model, graphs=True) as rig:
            asks = [lambda n=n: rig.ask(prompts[n], seed=n, **options) for n in range(7)]  # type: ignore[misc]
            alone = [(await ask()).tokens for ask in asks]
            return alone, [answer.tokens for answer in await asyncio.gather(*(ask() for ask in asks))]

    alone, together = asyncio.run(scenario())
    assert together == alone


@pytest.mark.parametrize("kind", ["mixlora", "loracoe", "loramoe", "mola"])
def test_sparse_models_say_the_same_captured_and_not(kind: str) -> None:
    model = tiny_llama()
    shapes = BaseShapes.from_model(model, "tiny")
    made = {
        "mixlora": lambda: mixlora(shapes),
        "loracoe": lambda: loracoe(shapes),
        "loramoe": lambda: loramoe(shapes),
        "mola": lambda: loramoe(shapes, 2),
    }[kind]()
    prompts = [random_prompt(5 + 9 * i) for i in range(5)]

    async def tokens(rig: Rig, name: str, prompt: tuple[int, ...], handle: Handle) -> list[int]:
        work = Work(name, prompt, Sampling(20, temperature=0.0), handle)
        return [event.score.id async for event in rig.engine.run(work) if isinstance(event, Token)]

    async def scenario(graphs: bool) -> tuple[list[list[int]], int]:
        async with running(with_delta(model, []).cuda(), graphs=graphs) as rig:
            slot = place(made, "cuda")
            handle = Handle(kind, slot)
            rounds = []
            for number in range(2):
                asks = (tokens(rig, f"{number}-{i}", p, handle) for i, p in enumerate(prompts))
                rounds.append(await asyncio.gather(*asks))
            assert rounds[0] == rounds[1]
            return rounds[0], sum(slot.load().tokens)

    plain, counted = asyncio.run(scenario(graphs=False))
    captured, also = asyncio.run(scenario(graphs=True))
    assert captured == plain
    assert also == counted > 0
