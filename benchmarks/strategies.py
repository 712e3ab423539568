"""What it costs to ask the experts: arrow and spectr at every token, logo once a prompt."""

import time
from collections.abc import Awaitable, Callable

from benchmarks.bench import Bench
from benchmarks.decode import bare, distinct
from benchmarks.oracle import Wrong
from benchmarks.report import Result, ratios
from benchmarks.rig import Drive, Rig, alternate
from loramux.adapters.residency import Handle
from loramux.adapters.responses import Listener, Responders, common_module
from loramux.adapters.sparse.token_methods import token_experts
from loramux.adapters.sparse.token_mixtures import TokenMethod
from loramux.server.logo import LocalHearing, Logo

TOP_K = 3
#: (requests, tokens of a prompt, tokens of an answer)
DECODING = ((1, 16, 32), (16, 16, 12))
PROMPTS = (16, 256)


async def strategies(bench: Bench) -> Result:
    """Every expert of the pool takes part; a token takes three. The blend beside them is of three too."""
    rig = await bench.rig()
    result = Result(facts={"experts": len(rig.residency.experts), "top_m": TOP_K})
    handles = prepared(rig, result)
    for requests, prompt, tokens in DECODING:
        name = f"{requests} request{'s' if requests > 1 else ''}"
        found = await alternate(
            cases(rig, handles, requests, prompt, tokens), bench.repeats, bench.telling(name)
        )
        compare(result, name, {kind: [drive.decode_rate for drive in found[kind]] for kind in found})
    name = "1 x 256 tokens"
    found = await alternate(cases(rig, handles, 1, 256, 1), bench.repeats, bench.telling(name))
    compare(result, name, {kind: [drive.prefill_rate for drive in found[kind]] for kind in found})
    for prompt in PROMPTS:
        await probe(bench, rig, prompt, result)
    return result


def prepared(rig: Rig, result: Result) -> dict[str, Handle]:
    """A slot of each method over the whole pool, and what making it ready takes."""
    handles = {}
    for method in TokenMethod:
        started = time.perf_counter()
        experts = token_experts(
            method,
            list(rig.residency.experts.values()),
            device=rig.model.device,
            dtype=rig.layers.arena.dtype,
        )
        result.add(f"{method}: made ready", time.perf_counter() - started, "s")
        result.add(f"{method}: on the device", experts.nbytes / 2**20, "MiB")
        handles[str(method)] = Handle(f"benchmark {method}", experts.slot(TOP_K))
    return handles


def cases(
    rig: Rig, handles: dict[str, Handle], requests: int, prompt: int, tokens: int
) -> dict[str, Callable[[], Awaitable[Drive]]]:
    """The bare base, blends, and each method, for the same requests."""
    found = {
        "base": lambda: rig.drive(bare(requests), prompt=prompt, tokens=tokens),
        "blends": lambda: rig.drive(distinct(rig, requests, 8), prompt=prompt, tokens=tokens),
    }
    for kind, handle in handles.items():
        found[kind] = lambda handle=handle: rig.drive(  # type: ignore[misc]
            bare(requests), prompt=prompt, tokens=tokens, handle=handle
        )
    return found


def compare(result: Result, name: str, rates: dict[str, list[float]]) -> None:
    """Tokens a second, and each kind's of the base's in the same repeat."""
    for kind, values in rates.items():
        result.add(f"{name}, {kind}", values, "tokens/s")
        if kind != "base":
            result.add(f"{name}, {kind}: of base", ratios(values, rates["base"]), "ratio")


async def probe(bench: Bench, rig: Rig, length: int, result: Result) -> None:
    """Seconds until logo's weights are known, against those until a request's first token."""
    hearing = LocalHearing(rig.engine)
    logo = Logo(hearing, lambda _: None)
    experts = dict(rig.residency.experts)
    await check(rig, hearing)

    async def asking() -> float:
        ids = rig.prompt(length)
        started = time.perf_counter()
        await logo.signals(ids, experts, "norm")
        return time.perf_counter() - started

    async def answering() -> float:
        drive = await rig.drive(bare(1), prompt=length, tokens=1)
        return drive.prefilled - drive.started

    name = f"{length} tokens"
    found = await alternate({"logo": asking, "first token": answering}, bench.repeats, bench.telling(name))
    for kind, seconds in found.items():
        result.add(f"{name}: {kind}", [1e3 * value for value in seconds], "ms")
    result.add(f"{name}: logo, of the first token", ratios(found["logo"], found["first token"]), "ratio")


async def check(rig: Rig, hearing: LocalHearing) -> None:
    """The signals are the norms of the dense updates' outputs.

    Raises:
        Wrong: they are not.
    """
    experts = dict(rig.residency.experts)
    module = common_module(experts)
    ids = rig.prompt(24)
    found = dict(zip(experts, await hearing.signals(ids, experts, "norm"), strict=True))
    listener: Listener = await hearing.listen(ids, module)
    x = listener.heard()
    if x is None:
        raise Wrong("logo heard nothing")
    plain = Responders(list(experts.values()), module).outputs(x)
    for output, (id, expert) in zip(plain, experts.items(), strict=True):
        dense = expert.delta(module) @ x.double()
        if abs(float(dense.norm()) - found[id]) > 1e-2 * float(dense.norm()) or not output.isfinite().all():
            raise Wrong(f"logo gives {id} {found[id]}, its update has {float(dense.norm())}")
