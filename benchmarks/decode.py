"""Tokens a second: with blends against the bare base, and the bare base against an engine without a pool."""

import random
from collections.abc import Awaitable, Callable, Sequence

from benchmarks.bench import Bench
from benchmarks.report import Result, at_least, ratios
from benchmarks.rig import Drive, Rig, alternate, running
from loramux.adapters.blend import Blend

MIXTURES = 32
ZIPF = 1.5

Case = Callable[[], Awaitable[Drive]]


def bare(requests: int) -> list[Blend]:
    """Requests without experts."""
    return [Blend.bare()] * requests


def distinct(rig: Rig, requests: int, mixtures: int) -> list[Blend]:
    """`mixtures` blends, in turns."""
    return [rig.mixture(number % mixtures) for number in range(requests)]


def zipf(rig: Rig, requests: int) -> list[Blend]:
    """Mixture k of 32 with a chance proportional to k to the power of -1.5; the same draw in every run."""
    chances = [(place + 1) ** -ZIPF for place in range(MIXTURES)]
    return [rig.mixture(n) for n in random.Random(0).choices(range(MIXTURES), chances, k=requests)]


def case(rig: Rig, blends: Sequence[Blend], *, prompt: int, tokens: int) -> Case:
    """A run, to be called as often as it is measured."""
    return lambda: rig.drive(blends, prompt=prompt, tokens=tokens)


async def decode(bench: Bench) -> Result:
    """The two ratios that matter most: twice as many pairs as the other scenarios have repeats."""
    rig = await bench.rig()
    result = Result()
    groups: tuple[tuple[str, str, list[Blend], int, float], ...] = (
        ("1 request", "1 blend", distinct(rig, 1, 1), 48, 0.92),
        ("16 requests", "8 blends", distinct(rig, 16, 8), 32, 0.90),
    )
    for name, mixed, blends, tokens, limit in groups:
        found = await alternate(
            {
                "base": case(rig, bare(len(blends)), prompt=16, tokens=tokens),
                mixed: case(rig, blends, prompt=16, tokens=tokens),
            },
            max(1, 2 * bench.repeats - 1),
            bench.telling(name),
        )
        _throughput(result, bench, name, found, {mixed: limit})
        of_base = ratios([d.decode_rate for d in found[mixed]], [d.decode_rate for d in found["base"]])
        result.add(f"{name}, {mixed}: decoding alone, of base", of_base, "ratio")
    return result


async def traffic(bench: Bench) -> Result:
    """16 and 32 requests: one blend for all, 8, one each, and a few that most ask for."""
    rig = await bench.rig()
    result = Result()
    for requests, tokens in ((16, 12), (32, 8)):
        kinds = {
            "base": bare(requests),
            "identical": distinct(rig, requests, 1),
            "8 blends": distinct(rig, requests, 8),
            "distinct": distinct(rig, requests, requests),
            "zipf": zipf(rig, requests),
        }
        if requests == 16:
            del kinds["8 blends"]  # the scenario `decode` has it
        name = f"{requests} requests"
        found = await alternate(
            {kind: case(rig, blends, prompt=8, tokens=tokens) for kind, blends in kinds.items()},
            bench.repeats,
            bench.telling(name),
        )
        _throughput(result, bench, name, found, {})
        result.facts[f"{name}, zipf"] = {"distinct blends": len({blend.key for blend in kinds["zipf"]})}
    return result


async def prefill(bench: Bench) -> Result:
    """Prompt tokens a second, for one long prompt and for sixteen short ones."""
    rig = await bench.rig()
    result = Result()
    for requests, prompt, mixed in ((1, 256, (1,)), (16, 32, (1, 8))):
        name = f"{requests} x {prompt} tokens"
        kinds = {"base": bare(requests)} | {
            "1 blend" if n == 1 else f"{n} blends": distinct(rig, requests, n) for n in mixed
        }
        found = await alternate(
            {kind: case(rig, blends, prompt=prompt, tokens=1) for kind, blends in kinds.items()},
            bench.repeats,
            bench.telling(name),
        )
        rates = {kind: [drive.prefill_rate for drive in drives] for kind, drives in found.items()}
        for kind, values in rates.items():
            result.add(f"{name}, {kind}", values, "tokens/s")
            if kind != "base":
                result.add(f"{name}, {kind}: of base", ratios(values, rates["base"]), "ratio")
    return result


async def base_only(bench: Bench) -> Result:
    """Requests without experts: every layer wrapped and every expert resident, against an unwrapped base."""
    rig = await bench.rig()
    result = Result()
    async with running(bench.folder, bench.shape, pool=False) as plain:
        for requests, tokens in ((1, 32), (16, 12)):
            name = f"{requests} request{'s' if requests > 1 else ''}"
            found = await alternate(
                {
                    "without a pool": case(plain, bare(requests), prompt=8, tokens=tokens),
                    "with a pool": case(rig, bare(requests), prompt=8, tokens=tokens),
                },
                max(1, 2 * bench.repeats - 1),
                bench.telling(name),
            )
            rates = {kind: [drive.throughput for drive in drives] for kind, drives in found.items()}
            for kind, values in rates.items():
                result.add(f"{name}, {kind}", values, "tokens/s")
            of_plain = ratios(rates["with a pool"], rates["without a pool"])
            result.add(f"{name}: with, of without a pool", of_plain, "ratio", bench.goal(at_least(0.99)))
    return result


def _throughput(
    result: Result, bench: Bench, name: str, found: dict[str, list[Drive]], limits: dict[str, float]
) -> None:
    """Answer tokens a second of every kind, and each one's share of the base's in the same repeat."""
    rates = {kind: [drive.throughput for drive in drives] for kind, drives in found.items()}
    for kind, values in rates.items():
        result.add(f"{name}, {kind}", values, "tokens/s")
        if kind != "base":
            goal = bench.goal(at_least(limits[kind])) if kind in limits else None
            result.add(f"{name}, {kind}: of base", ratios(values, rates["base"]), "ratio", goal)
