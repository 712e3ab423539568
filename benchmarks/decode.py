"""Decoding with blends against decoding without, on one engine, as ratios.

    python benchmarks/decode.py [--shape tiny|0.39b] [--repeats 3] [--save benchmarks/results/decode.json]

Random weights: the work does not depend on what they say. Before timing in float32, a mixed batch is
compared with its isolated runs. The scenarios of one repeat run one after another, so that a ratio compares
neighbours in time; medians over the repeats are reported. Mixtures are of three experts out of eight.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import time
from contextlib import aclosing
from importlib.metadata import version
from itertools import count
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from loramux.adapters.arena import Arena
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.blend import Blend
from loramux.adapters.layers import AdapterLayers
from loramux.adapters.lora import LoraAdapter, LoraPair
from loramux.adapters.residency import Residency
from loramux.server.engine.local import EngineLimits, LocalEngine
from loramux.server.engine.protocol import Sampling, Token, Work

SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8},
    "0.39b": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
}
EXPERTS = 8
RANK = 16
VOCABULARY = 8192
PROMPT = 32

# name -> (concurrent requests, distinct mixtures; 0 is the bare base)
SCENARIOS = {
    "1 request, base": (1, 0),
    "1 request, 1 blend": (1, 1),
    "16 requests, base": (16, 0),
    "16 requests, 1 blend": (16, 1),
    "16 requests, 8 blends": (16, 8),
}
AGAINST = {name: f"{name.split(',')[0]}, base" for name in SCENARIOS if "blend" in name}


class Rig:
    """An engine with a pool of random experts."""

    def __init__(self, shape: str, dtype: torch.dtype, with_pool: bool = True) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=2048, num_key_value_heads=None,
                             tie_word_embeddings=True, **SHAPES[shape])  # fmt: skip
        self.model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
        shapes = BaseShapes.from_model(self.model, shape)
        arena = Arena(shapes, EXPERTS * RANK, dtype=dtype)
        experts = {f"e{i}": _expert(shapes, f"e{i}", dtype) for i in range(EXPERTS if with_pool else 0)}
        self.residency = Residency(experts, arena)
        layers = AdapterLayers(self.model, arena)
        self.engine = LocalEngine(self.model, layers, eos_ids=[], limits=EngineLimits(kv_tokens=16384))
        self._ids = count()

    def mixture(self, number: int) -> Blend:
        """Mixture `number` of three experts."""
        experts = self.residency.experts
        names = [f"e{(number + step) % EXPERTS}" for step in (0, 1, 3)]
        weights = (0.6, 0.3, 0.1)
        return Blend.of([(n, experts[n].content_hash, w) for n, w in zip(names, weights, strict=True)])

    async def generate(self, prompt: tuple[int, ...], blend: Blend, tokens: int) -> list[int]:
        """Greedy tokens of one request."""
        async with self.residency.lease(blend) as lease:
            sampling = Sampling(max_tokens=tokens, temperature=0)
            work = Work(f"w{next(self._ids)}", prompt, sampling, lease.handle)
            async with aclosing(self.engine.run(work)) as events:
                return [event.score.id async for event in events if isinstance(event, Token)]

    async def throughput(self, requests: int, mixtures: int, tokens: int) -> float:
        """Answer tokens a second."""
        blends = [self.mixture(i % mixtures) if mixtures else Blend.bare() for i in range(requests)]
        started = time.perf_counter()
        await asyncio.gather(*(self.generate(_prompt(), blend, tokens) for blend in blends))
        return requests * tokens / (time.perf_counter() - started)


def _expert(shapes: BaseShapes, name: str, dtype: torch.dtype) -> LoraAdapter:
    pairs = {
        module: LoraPair(
            (torch.randn(RANK, n_in) * 0.02).to(dtype), (torch.randn(n_out, RANK) * 0.02).to(dtype), 1.0
        )
        for module, (n_out, n_in) in shapes.modules.items()
    }
    return LoraAdapter(name, f"hash of {name}", pairs)


def _prompt() -> tuple[int, ...]:
    return tuple(torch.randint(3, VOCABULARY, (PROMPT,)).tolist())


async def check(rig: Rig) -> None:
    """A mixed batch must say what its requests say alone."""
    jobs = [(_prompt(), rig.mixture(i) if i % 3 else Blend.bare()) for i in range(6)]
    alone = [await rig.generate(*job, 12) for job in jobs]
    together = await asyncio.gather(*(rig.generate(*job, 12) for job in jobs))
    if list(together) != alone:
        raise SystemExit("a mixed batch differs from its isolated runs; nothing was timed")


async def measure(shape: str, dtype: torch.dtype, repeats: int, tokens: int) -> dict[str, list[float]]:
    """Tokens a second of every scenario and repeat."""
    rig = Rig(shape, dtype)
    await rig.engine.start()
    try:
        if dtype == torch.float32:
            await check(rig)
        results: dict[str, list[float]] = {name: [] for name in SCENARIOS}
        for requests, mixtures in SCENARIOS.values():  # warm, and every expert resident
            await rig.throughput(requests, mixtures, 4)
        for _ in range(repeats):
            for name, (requests, mixtures) in SCENARIOS.items():
                results[name].append(await rig.throughput(requests, mixtures, tokens))
        return results
    finally:
        await rig.engine.stop(5)


def report(results: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Print the table; medians, and ratios against the bare base taken within each repeat."""
    table = Table(title="Decoding")
    for heading in ("scenario", "tokens/s", "of the base"):
        table.add_column(heading, justify="left" if heading == "scenario" else "right")
    rows: dict[str, dict[str, float]] = {}
    for name, values in results.items():
        row = {"tokens_per_second": statistics.median(values)}
        if name in AGAINST:
            ratios = [value / base for value, base in zip(values, results[AGAINST[name]], strict=True)]
            row["of_base"] = statistics.median(ratios)
        rows[name] = row
        ratio = f"{row['of_base']:.2f}" if "of_base" in row else ""
        table.add_row(name, f"{row['tokens_per_second']:.1f}", ratio)
    Console().print(table)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    rows = report(asyncio.run(measure(arguments.shape, dtype, arguments.repeats, arguments.tokens)))
    result = {
        "benchmark": "decode",
        "shape": arguments.shape,
        "dtype": arguments.dtype,
        "repeats": arguments.repeats,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "scenarios": rows,
    }
    if arguments.save:
        arguments.save.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
