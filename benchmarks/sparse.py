"""Sparse models: MixLoRA against the authors' package and against whole experts, LoRACoE against plain LoRA.

A few layers of the shape stand for all of them, without embedding and output head.
"""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM

from benchmarks.bench import Bench
from benchmarks.oracle import Wrong
from benchmarks.report import Result, at_least, at_most, ratios
from benchmarks.rig import alternate
from benchmarks.shapes import SPREAD
from loramux.adapters.arena import Arena
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.layers import AdapterLayers
from loramux.adapters.sparse.feed_forward import take_apart
from loramux.adapters.sparse.model import MixtureFfn, RankMixture, SparseModel
from loramux.adapters.sparse.slot import place
from loramux.kernels.gated_lora import Adding, GateSlot, Plan, Slot, plan_step
from loramux.kernels.mixlora_ffn import mixlora_ffn_reference, probabilities, top_k
from loramux.kernels.packed_linear import pack_linears
from tests.tiny import random_adapter
from tests.unit.adapters.sparse.authors import theirs
from tests.unit.adapters.sparse.random_models import TOP_K, loracoe, mixlora

LAYERS = 4
RANK = 16
#: (name, sequences, tokens of each)
BATCHES = (
    ("prefill, 1,024 tokens", 1, 1024),
    ("prefill, 128 tokens", 1, 128),
    ("decode, 1 request", 1, 1),
    ("decode, 16 requests", 16, 1),
)
SECONDS = 0.3  # of calls that make one value
TOLERANCE = 1e-4

Case = Callable[[], object]
Way = Callable[[Tensor], Tensor]


class Layers:
    """A base with adapter layers around it, which changes it."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model
        shapes = BaseShapes.from_model(model, "benchmark")
        self.layers = AdapterLayers(model, Arena(shapes, RANK))

    def using(self, slot: Slot | None) -> Way:
        """All tokens use `slot`. Batches of one shape share a plan, as the steps of a decoding engine do."""
        plans: dict[torch.Size, Plan] = {}

        def run(ids: Tensor) -> Tensor:
            if ids.shape not in plans:
                plans[ids.shape] = plan_step([(slot, ids.shape[1])] * len(ids))
            with self.layers.running(plans[ids.shape]):
                return hidden(self.model, ids)

        return run


class Vanilla(nn.Module):
    """A feed-forward block whose experts are whole ones, each run on its own tokens."""

    def __init__(self, block: nn.Module, mixture: MixtureFfn) -> None:
        super().__init__()
        self.ffn = take_apart(block, "block", bare=True)
        self.mixture = mixture

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        routes = top_k(
            probabilities(nn.functional.linear(rows, self.mixture.router)), self.mixture.routing.top_k
        )
        return mixlora_ffn_reference(rows, self.ffn, self.mixture.projections, routes).view(x.shape)


class Unfused:
    """LoRACoE with a product for every expert's router and one for its outputs."""

    def __init__(self, model: SparseModel) -> None:
        self._model = model
        self.modules = model.linear.keys()

    def bind(self, module: str) -> Adding:
        mixture = self._model.linear[module]
        assert isinstance(mixture, RankMixture)
        return partial(self._add, mixture)

    @staticmethod
    def _add(mixture: RankMixture, y: Tensor, x: Tensor) -> None:
        assert mixture.router is not None
        low = x @ mixture.a.T
        for router in mixture.router.chunk(mixture.experts):
            gate = (x @ router.T).softmax(-1)
            y += (mixture.scale * mixture.gain / mixture.experts) * ((gate * low) @ mixture.b.T)


async def mixlora_ffn(bench: Bench) -> Result:
    """MixLoRA, 8 experts of rank 16 of which 2 serve a token, attention LoRA, against two other ways."""
    result = Result(facts={"layers": LAYERS, "pip mixlora": "0.2.3" if find_spec("mixlora") else "missing"})
    base, shapes = random_base(bench)
    model = tamed(mixlora(shapes, experts=8, rank=RANK, scale=2.0))
    slot = place(model)
    served, whole = Layers(packed(base)), whole_experts(packed(base), model)
    ways: dict[str, Way] = {
        "ours": served.using(slot),
        "ours, base not packed": Layers(twin(base)).using(slot),
        "whole experts": whole.using(place(replace(model, ffn={}))),
    }
    if find_spec("mixlora"):
        ways["pip mixlora"] = partial(hidden, theirs(base, model, RANK, 2 * RANK))
        result.add("base's products of pip mixlora / of ours, a token", products(bench), "×")
    with torch.inference_mode():
        for name, rows, length in BATCHES:
            ids = torch.randint(3, base.config.vocab_size, (rows, length))
            check(name, {way: run(ids) for way, run in ways.items()})
            found = await timed(bench, name, {way: partial(run, ids) for way, run in ways.items()})
            add_milliseconds(result, name, found)
            if "pip mixlora" in found:
                for ours in ("ours", "ours, base not packed"):
                    goal = bench.goal(at_least(1.5)) if ours == "ours" else None
                    times = ratios(found["pip mixlora"], found[ours])
                    result.add(f"{name}: pip mixlora / {ours}", times, "×", goal)
            of_whole = ratios(found["ours"], found["whole experts"])
            result.add(f"{name}: ours, of whole experts", of_whole, "ratio", bench.goal(at_most(0.7)))
        memory(bench, result, partial(block, served, slot), partial(block, whole, None))
    return result


def products(bench: Bench) -> float:
    """What the ratio of the two would be if nothing but the base's products took time: the package runs the
    last projection of a block for each of a token's experts, `mixlora_ffn` once."""
    attention, projection = 4 * bench.shape.hidden**2, bench.shape.hidden * bench.shape.ffn
    return (attention + (2 + TOP_K.top_k) * projection) / (attention + 3 * projection)


def whole_experts(base: LlamaForCausalLM, model: SparseModel) -> Layers:
    """The layers around a base with vanilla feed-forward blocks."""
    made = Layers(base)
    for path, mixture in model.ffn.items():
        parent, _, name = path.rpartition(".")
        inner = base.get_submodule(path)
        setattr(base.get_submodule(parent), name, Vanilla(inner, mixture))
    return made


def block(layers: Layers, slot: Slot | None, x: Tensor) -> Tensor:
    """The first feed-forward block with all tokens of x using `slot`."""
    with layers.layers.running(plan_step([(slot, x.shape[1])])):
        found: Tensor = layers.model.model.layers[0].mlp(x)
    return found


def memory(bench: Bench, result: Result, ours: Way, whole: Way) -> None:
    """The most that a feed-forward block holds at one time, its input left out, its output included."""
    x = torch.randn(1, 1024, bench.shape.hidden)
    bytes_ours, bytes_whole = peak_bytes(partial(ours, x)), peak_bytes(partial(whole, x))
    result.add("block, 1,024 tokens: activations, ours", bytes_ours / 2**20, "MiB")
    result.add("block, 1,024 tokens: activations, whole experts", bytes_whole / 2**20, "MiB")
    goal = bench.goal(at_most(0.6))
    result.add("block, 1,024 tokens: activations, of whole experts", bytes_ours / bytes_whole, "ratio", goal)


async def loracoe_gate(bench: Bench) -> Result:
    """LoRACoE, two routers, rank 16 on all seven projections, against a plain LoRA of that rank."""
    result = Result(facts={"layers": LAYERS})
    base, shapes = random_base(bench)
    model = tamed(loracoe(shapes, experts=2, rank=RANK))
    served = Layers(packed(base))
    adapter = random_adapter(shapes, RANK, "plain", SPREAD)
    arena = served.layers.arena
    extents = arena.allocate(RANK)
    arena.write(adapter, extents)
    ways = {
        "base": served.using(None),
        "plain LoRA": served.using(GateSlot(extents, torch.ones(RANK), frozenset(adapter.pairs))),
        "LoRACoE": served.using(place(model)),
        "unfused": served.using(Unfused(model)),
    }
    with torch.inference_mode():
        for name, rows, length in BATCHES:
            ids = torch.randint(3, base.config.vocab_size, (rows, length))
            check(name, {way: ways[way](ids) for way in ("LoRACoE", "unfused")})
            found = await timed(bench, name, {way: partial(run, ids) for way, run in ways.items()})
            add_milliseconds(result, name, found)
            for other, goal in (("plain LoRA", bench.goal(at_most(1.15))), ("unfused", None)):
                result.add(
                    f"{name}: LoRACoE, of {other}", ratios(found["LoRACoE"], found[other]), "ratio", goal
                )
            await added(bench, result, name, model, rows * length)
    return result


async def added(bench: Bench, result: Result, name: str, model: SparseModel, tokens: int) -> None:
    """What the mixture itself takes, without the base's products: one layer's modules."""
    slots = {"LoRACoE": place(model), "unfused": Unfused(model)}
    work: dict[str, list[Case]] = {way: [] for way in slots}
    for path, mixture in model.linear.items():
        if isinstance(mixture, RankMixture) and ".layers.0." in path:
            x, y = torch.randn(tokens, mixture.a.shape[1]), torch.zeros(tokens, mixture.b.shape[0])
            for way, slot in slots.items():
                adding = slot.bind(path)
                assert adding is not None
                work[way].append(partial(adding, y, x))
    found = await timed(bench, f"{name}, alone", {way: partial(each, calls) for way, calls in work.items()})
    of_unfused, goal = ratios(found["LoRACoE"], found["unfused"]), bench.goal(at_most(0.76))
    result.add(f"{name}: the mixture alone, of unfused", of_unfused, "ratio", goal)


def random_base(bench: Bench) -> tuple[LlamaForCausalLM, BaseShapes]:
    """A few layers of the shape."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(bench.shape.config(min(LAYERS, bench.shape.layers))).eval().requires_grad_(False)
    return base, BaseShapes.from_model(base, "benchmark")


def twin(base: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same parameters in modules of its own."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def packed(base: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy as the server has it."""
    made = twin(base)
    pack_linears(made)
    return made


def tamed(model: SparseModel) -> SparseModel:
    """The random factors and routers of a tiny model, made for a wide one: deltas about as large as the
    base's weights, routers neither flat nor decided."""
    tensors = [tensor for pair in model.plain.values() for tensor in (pair.a, pair.b)]
    routers = []
    for mixture in model.linear.values():
        factors = mixture if isinstance(mixture, RankMixture) else mixture.factors
        tensors += [factors.a, factors.b]
        routers += [] if mixture.router is None else [mixture.router]
    for block in model.ffn.values():
        routers.append(block.router)
        tensors += [tensor for one in block.projections.values() for tensor in (one.a, one.b)]
    for tensor in tensors:
        tensor.mul_(0.25)
    for router in routers:
        router.div_(8)
    return model


def hidden(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """What the last layer gives to the output head."""
    found: Tensor = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return found


def each(calls: list[Case]) -> None:
    for call in calls:
        call()


def check(name: str, answers: Mapping[str, Tensor]) -> None:
    """All ways say the same, for all but one token in a hundred.

    Raises:
        Wrong: one is off.
    """
    (first, wanted), *others = answers.items()
    for way, found in others:
        errors = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        # Two experts can be so near each other that the last bit decides which one serves a token.
        error = float(errors.flatten().quantile(0.99))
        if not error <= TOLERANCE:
            raise Wrong(f"{name}: {way} and {first} differ by {error:.1e}; nothing was timed")


async def timed(bench: Bench, name: str, cases: Mapping[str, Case]) -> dict[str, list[float]]:
    """Seconds of a call: each value the mean of as many as fit into a third of a second."""

    async def seconds(case: Case) -> float:
        case()
        calls, started = 0, time.perf_counter()
        while True:
            case()
            calls += 1
            taken = time.perf_counter() - started
            if taken >= SECONDS:
                return taken / calls

    runs = {way: partial(seconds, case) for way, case in cases.items()}
    return await alternate(runs, bench.repeats, bench.telling(name))


def add_milliseconds(result: Result, name: str, found: Mapping[str, list[float]]) -> None:
    for way, values in found.items():
        result.add(f"{name}: {way}", [1e3 * value for value in values], "ms")


def peak_bytes(call: Case) -> int:
    """The most memory that tensors made by a call hold at one time, by the allocator's own events."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    held = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
