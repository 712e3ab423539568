"""The server's engine over a random base and a pool of random experts, driven without HTTP."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import count, pairwise
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.shapes import EXPERT_SPREAD, Shape
from loramux.adapters.arena import Arena
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.blend import Blend
from loramux.adapters.layers import AdapterLayers
from loramux.adapters.residency import Handle, Residency
from loramux.kernels.packed_linear import Kinds, pack_linears, store_weights
from loramux.server.engine.local import EngineLimits, LocalEngine
from loramux.server.engine.model import load_base
from loramux.server.engine.protocol import Sampling, Token, Work
from loramux.server.engine.weights import choose_full, prepare
from tests.tiny import random_adapter

Found = TypeVar("Found")

#: With n, the places of the other two experts of a mixture; no two of 4 x 8 mixtures of 8 experts are equal.
STEPS = ((1, 3), (1, 4), (2, 5), (1, 5))
WEIGHTS = (0.6, 0.3, 0.1)
#: The server's defaults, but for a cache no larger than the scenarios need.
LIMITS = EngineLimits(kv_tokens=4096, max_batch_tokens=512)


@dataclass(frozen=True)
class Drive:
    """When the tokens of some requests, asked at once, arrived: one row of stamps a request."""

    started: float
    prompt: int
    stamps: tuple[tuple[float, ...], ...]

    @property
    def prefilled(self) -> float:
        """When the last request had its first token."""
        return max(row[0] for row in self.stamps)

    @property
    def ended(self) -> float:
        return max(row[-1] for row in self.stamps)

    @property
    def throughput(self) -> float:
        """Answer tokens a second, prompts included in the time."""
        return sum(map(len, self.stamps)) / (self.ended - self.started)

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt * len(self.stamps) / (self.prefilled - self.started)

    @property
    def decode_rate(self) -> float:
        """Answer tokens a second once every prompt is done; needs more than one token a request."""
        later = sum(stamp > self.prefilled for row in self.stamps for stamp in row)
        return later / (self.ended - self.prefilled)

    @property
    def gaps(self) -> list[float]:
        """Seconds between the tokens of each request, once every prompt is done."""
        first = self.prefilled
        return [b - a for row in self.stamps for a, b in pairwise(row) if a >= first]


class Rig:
    """A started engine and its residency."""

    def __init__(self, model: PreTrainedModel, residency: Residency, layers: AdapterLayers) -> None:
        self.model = model
        self.residency = residency
        self.layers = layers
        cuda = model.device.type == "cuda"
        limits = replace(LIMITS, graphs=True, kv_tokens=32768) if cuda else LIMITS
        self.engine = LocalEngine(model, layers, eos_ids=(), limits=limits)
        self._ids = count()

    def mixture(self, number: int) -> Blend:
        """Mixture `number`, below 32, of three experts out of the first eight."""
        step, first = divmod(number, 8)
        return self.blend([first, *((first + further) % 8 for further in STEPS[step])])

    def blend(
        self, experts: Sequence[int], weights: Sequence[float] = WEIGHTS, *, method: str = "exact"
    ) -> Blend:
        """A blend of experts by number."""
        held = self.residency.experts
        parts = [(f"e{n}", held[f"e{n}"].content_hash, w) for n, w in zip(experts, weights, strict=True)]
        return Blend.of(parts, method=method)

    def forget(self, experts: Sequence[int]) -> None:
        """Take experts off the device, and all blends that stand on them; they stay in the pool."""
        for number in experts:
            expert = self.residency.experts[f"e{number}"]
            self.residency.remove_expert(expert.id)
            self.residency.add_expert(expert)

    def prompt(self, length: int) -> tuple[int, ...]:
        """Random tokens."""
        return tuple(torch.randint(3, self.model.config.vocab_size, (length,)).tolist())

    async def tokens(
        self,
        prompt: Sequence[int],
        blend: Blend,
        tokens: int,
        sampling: Sampling | None = None,
        handle: Handle | None = None,
    ) -> AsyncIterator[Token]:
        """The tokens of one request, greedily unless `sampling` says otherwise, as they come; under `handle`,
        if given, in place of a blend's."""
        chosen = replace(sampling or Sampling(0, temperature=0), max_tokens=tokens, ignore_eos=True)
        async with self.residency.lease(blend) as lease:
            work = Work(f"w{next(self._ids)}", tuple(prompt), chosen, handle or lease.handle)
            async with aclosing(self.engine.run(work)) as events:
                async for event in events:
                    if isinstance(event, Token):
                        yield event

    async def drive(
        self,
        blends: Sequence[Blend],
        *,
        prompt: int,
        tokens: int,
        sampling: Sampling | None = None,
        handle: Handle | None = None,
    ) -> Drive:
        """One request a blend, all at once, each with a prompt of its own."""
        prompts = [self.prompt(prompt) for _ in blends]
        started = time.perf_counter()
        pairs = zip(prompts, blends, strict=True)
        runs = (self._stamps(self.tokens(ids, blend, tokens, sampling, handle)) for ids, blend in pairs)
        rows = await asyncio.gather(*runs)
        return Drive(started, prompt, tuple(rows))

    @staticmethod
    async def _stamps(tokens: AsyncIterator[Token]) -> tuple[float, ...]:
        return tuple([time.perf_counter() async for _ in tokens])


@asynccontextmanager
async def running(
    folder: Path, shape: Shape, *, dtype: str = "float32", quantization: str = "none", device: str = "cpu",
    pool: bool = True, kinds: Kinds | None = None, lean: bool = True,
) -> AsyncIterator[Rig]:  # fmt: skip
    """An engine made as the server makes its own, over the checkpoint in `folder`.

    Without a pool no layer of the base is wrapped. With `kinds` the weights are held so, without them
    as the server would choose; without `lean` in oneDNN's layout, and a step has all the calls that
    transformers makes.
    """
    if kinds is None and lean and (device, dtype, quantization) == ("cpu", "float32", "none"):
        kinds = choose_full((shape.ffn, shape.hidden)).kinds
    held = dtype if kinds is None else "stored"
    model = load_base(folder, dtype=held, quantization=quantization, device=device)
    if lean:
        prepare(model, model.device, model.dtype if kinds is None else torch.float32, kinds)
    elif kinds is None:
        pack_linears(model)
    else:
        store_weights(model, kinds)
    shapes = BaseShapes.from_model(model, shape.name)
    if pool:
        experts = {
            f"e{n}": random_adapter(shapes, shape.rank, f"e{n}", EXPERT_SPREAD) for n in range(shape.experts)
        }
        rows = (2 * shape.experts + 16) * shape.rank
        arena = Arena(shapes, rows, dtype=model.dtype, device=model.device)
        layers = AdapterLayers(model, arena)
    else:  # the engine wants layers to set its plan on: they go around a module that nobody calls
        experts = {}
        unused = nn.Sequential(nn.Linear(1, 1, dtype=model.dtype, device=model.device))
        arena = Arena(BaseShapes.from_model(unused, "unused"), 1, dtype=model.dtype, device=model.device)
        layers = AdapterLayers(unused, arena)
    rig = Rig(model, Residency(experts, arena), layers)
    await rig.engine.start()
    try:
        yield rig
    finally:
        await rig.engine.stop(5)


async def alternate(
    cases: Mapping[str, Callable[[], Awaitable[Found]]],
    repeats: int,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, list[Found]]:
    """Every case once a repeat, in turns and every other time backwards, so that drift cancels out."""
    found: dict[str, list[Found]] = {name: [] for name in cases}
    for repeat in range(repeats):
        for name in list(cases)[:: -1 if repeat % 2 else 1]:
            progress(f"{name}, {repeat + 1} of {repeats}")
            found[name].append(await cases[name]())
    return found
