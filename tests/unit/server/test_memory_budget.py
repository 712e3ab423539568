"""One budget: it fits or it is refused, and the way out that a refusal names does lead out."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from loramux.adapters.arena import Arena
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.peft_format import measure_lora, read_lora, write_lora
from loramux.adapters.sparse.model import Kind
from loramux.adapters.sparse.read import SparseSize
from loramux.server.engine.weights import QUANTIZED
from loramux.server.errors import StartError
from loramux.server.memory.blueprint import Blueprint, Target
from loramux.server.memory.budget import OVERHEAD, SHARE, Budget, Sizes, plan_budget, size_text
from loramux.server.memory.room import Room
from loramux.server.settings import Settings, load_settings
from tests.tiny import random_adapter, tiny_llama

MIB = 2**20
CPU = Target(torch.device("cpu"), torch.float32, "none")
CUDA = Target(torch.device("cuda"), torch.bfloat16, "none")


@dataclass(frozen=True)
class Bench:
    folder: Path
    sizes: Sizes

    def plan(self, free: int, target: Target = CPU, *, host: int | None = None, **flags: Any) -> Budget:
        """A budget of `free` bytes; on CUDA `host` is what the machine has."""
        on_cpu = target.device.type == "cpu"
        machine = Room("this machine", free if on_cpu or host is None else host)
        device = machine if on_cpu else Room("cuda:0", free)
        return plan_budget(load_settings(flags=flags), target, self.sizes, device, machine)

    def least(self, target: Target = CPU, **flags: Any) -> int:
        """The smallest memory that is enough, to a quarter of a MiB."""
        low, high = 0, 4096 * MIB
        while high - low > MIB // 4:
            middle = (low + high) // 2
            try:
                self.plan(middle, target, host=2**40, **flags)
                high = middle
            except StartError:
                low = middle
        return high


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A base of a few MiB whose nf4, bfloat16 and float32 forms differ clearly, and three experts."""
    folder = tmp_path_factory.mktemp("budget")
    model = tiny_llama(hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8)
    model.save_pretrained(folder)
    shapes = BaseShapes.from_model(model, "tiny")
    for name, rank in {"a": 4, "b": 16, "c": 9}.items():
        write_lora(random_adapter(shapes, rank, name), folder / name, "tiny")
    blueprint = Blueprint.read(str(folder))
    experts = {name: measure_lora(folder / name, base=shapes) for name in "abc"}
    return Bench(folder, Sizes(blueprint, blueprint.shapes("tiny"), experts, router_bytes=3 * MIB))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_and_slots_weigh_what_they_will(bench: Bench, dtype: torch.dtype) -> None:
    experts = {
        name: read_lora(bench.folder / name, id=name, base=bench.sizes.shapes, dtype=dtype) for name in "abc"
    }
    held = sum(expert.nbytes for expert in experts.values())
    assert bench.sizes.pool_bytes(dtype, pinned=False) == held
    assert {name: bench.sizes.rank(name) for name in "abc"} == {"a": 4, "b": 16, "c": 9}
    budget = bench.plan(8192 * MIB, Target(torch.device("cpu"), dtype, "none"))
    arena = Arena(bench.sizes.shapes, budget.rows, dtype=dtype)
    assert sum(t.nbytes for t in (*arena.a.values(), *arena.b.values())) == budget.slots


def test_on_a_cpu_in_float32_experts_wait_in_the_type_of_their_files(bench: Bench, tmp_path: Path) -> None:
    shapes = bench.sizes.shapes
    write_lora(random_adapter(shapes, 4, "narrow").to(torch.bfloat16), tmp_path / "narrow", "tiny")
    measured = measure_lora(tmp_path / "narrow", base=shapes)
    sizes = replace(bench.sizes, experts={**bench.sizes.experts, "narrow": measured})
    targets = [CPU, replace(CPU, dtype=torch.bfloat16), replace(CPU, device=torch.device("cuda"))]
    assert [one.host_dtype for one in targets] == [None, torch.bfloat16, torch.float32]
    for target in targets[:2]:
        held = [
            read_lora(folder / name, id=name, base=shapes, dtype=target.host_dtype).nbytes
            for folder, names in ((bench.folder, "abc"), (tmp_path, ["narrow"]))
            for name in names
        ]
        assert replace(bench, sizes=sizes).plan(8192 * MIB, target).pool == sum(held)


def test_pinned_memory_is_counted_in_powers_of_two(bench: Bench) -> None:
    pinned = bench.sizes.pool_bytes(torch.float32, pinned=True)
    exact = bench.sizes.pool_bytes(torch.float32, pinned=False)
    assert exact < pinned < 2 * exact  # rank 9 is no power of two


def test_a_roomy_machine_holds_every_running_context(bench: Bench) -> None:
    budget = bench.plan(64 * 1024 * MIB)
    assert budget.kv_tokens == 32 * 512
    assert budget.kv == budget.kv_tokens * bench.sizes.blueprint.kv_token_bytes(torch.float32)


@pytest.mark.parametrize("target", [CPU, CUDA])
def test_sparse_models_are_counted_where_the_base_is(bench: Bench, target: Target) -> None:
    size = SparseSize(Kind.MIXLORA, parameters=4 * MIB, router_parameters=MIB)
    fuller = Bench(bench.folder, replace(bench.sizes, sparse={"mix": size}))
    weight = size.nbytes(target.dtype)
    assert weight == (16 if target is CPU else 10) * MIB
    later = Settings().residency.sparse_bytes
    assert fuller.plan(2**34, target, host=2**34).sparse == weight + later
    assert abs(fuller.least(target) - bench.least(target) - weight) <= MIB
    assert "1 sparse models, 256.0 MiB for more" in fuller.plan(2**34, target, host=2**34).table()
    nothing = {"sparse_bytes": 0}
    assert "sparse" not in bench.plan(2**34, target, host=2**34, residency=nothing).table()


@pytest.mark.parametrize("target", [CPU, CUDA])
def test_the_cache_takes_what_is_left_and_no_more(bench: Bench, target: Target) -> None:
    free = bench.least(target) + 24 * MIB
    budget = bench.plan(free, target, host=free)
    assert 1024 <= budget.kv_tokens < 32 * 512
    kind = target.device.type
    taken = budget.base + budget.sparse + budget.slots + OVERHEAD[kind]
    if kind == "cpu":
        taken += budget.pool + budget.router
    usable = (free - taken) * SHARE[kind]
    assert 0.9 * usable - MIB < budget.kv + budget.step <= usable


def test_more_memory_never_means_less_cache(bench: Bench) -> None:
    least = bench.least()
    found = [bench.plan(least + extra * MIB).kv_tokens for extra in range(0, 200, 20)]
    assert found == sorted(found)


def test_a_chosen_cache_is_taken_as_it_is(bench: Bench) -> None:
    assert bench.plan(8192 * MIB, engine={"kv_tokens": 3333}).kv_tokens == 3333


@pytest.mark.parametrize("target", [CPU, CUDA])
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"engine": {"kv_tokens": 60000}},
        {"engine": {"kv_tokens": 4096, "max_batch_tokens": 4096}},
        {"engine": {"max_running": 4096}},
        {"residency": {"bytes": 200 * MIB}},
    ],
    ids=str,
)
@pytest.mark.parametrize("missing", [1, 12])
def test_each_way_out_of_a_refusal_leads_out(
    bench: Bench, target: Target, flags: dict[str, Any], missing: int
) -> None:
    free = bench.least(target, **flags) - missing * MIB
    with pytest.raises(StartError, match="memory are needed") as caught:
        bench.plan(free, target, host=2**40, **flags)
    message = str(caught.value)
    assert "\n" not in message
    assert size_text(free) in message
    named = re.search(r"any one of these makes it fit: (.*)", message)
    assert named is not None
    for way in named[1].split(", "):
        key, value = re.fullmatch(r"([a-z0-9_.]+)(?:: | at most )(\w+)", way).groups()  # type: ignore[union-attr]
        changed = {name: dict(part) for name, part in flags.items()}
        chosen = target
        if key == "dtype":
            chosen = Target(target.device, getattr(torch, value), target.quantization)
        elif key == "quantization":
            chosen = Target(target.device, target.dtype, value, QUANTIZED.get(value))
        else:
            section, name = key.split(".")
            changed.setdefault(section, {})[name] = yaml.safe_load(value)
        bench.plan(free, chosen, host=2**40, **changed)


def test_the_parts_of_a_refusal_add_up(bench: Bench) -> None:
    with pytest.raises(StartError) as caught:
        bench.plan(bench.least() // 2)
    needed, listed = re.match(r"(\S+) MiB of memory are needed.*?\((.*?)\)", str(caught.value)).groups()  # type: ignore[union-attr]
    parts = [float(number) for number in re.findall(r"([\d.]+) MiB", listed)]
    assert sum(parts) == pytest.approx(float(needed), abs=1)


def test_where_nothing_helps_alone_the_refusal_says_so(bench: Bench) -> None:
    with pytest.raises(StartError, match=r"no one setting makes it fit: lower residency\.bytes"):
        bench.plan(MIB)


def test_slots_too_small_for_the_largest_expert_are_refused_with_both_numbers(bench: Bench) -> None:
    unit = Arena(bench.sizes.shapes, 1).bytes_per_row
    bench.plan(8192 * MIB, residency={"bytes": 16 * unit})
    with pytest.raises(
        StartError, match=rf"residency\.bytes is {16 * unit - 1}; .* {16 * unit},.* {29 * unit}$"
    ):
        bench.plan(8192 * MIB, residency={"bytes": 16 * unit - 1})


def test_beside_a_gpu_the_pool_must_fit_into_the_machine(bench: Bench) -> None:
    with pytest.raises(StartError, match=r"3 experts .*this machine, 16\.0 MiB are free"):
        bench.plan(8192 * MIB, CUDA, host=16 * MIB)


def test_the_table_has_every_part_and_what_is_left(bench: Bench) -> None:
    one = bench.plan(8192 * MIB).table().splitlines()
    assert one[0] == "this machine: 8.0 GiB available"
    names = ["base", "pool", "sparse", "slots", "kv", "step", "router", "left"]
    assert [line.split()[0] for line in one[1:]] == names
    two = bench.plan(8192 * MIB, CUDA, host=4096 * MIB).table().splitlines()
    assert [line.split()[0] for line in two] == [
        *("cuda:0:", "base", "sparse", "slots", "kv", "step", "graphs", "left"),
        *("this", "pool", "router", "left"),
    ]  # fmt: skip
    plain = bench.plan(8192 * MIB, CUDA, host=4096 * MIB, engine={"cuda_graphs": "off"}).table()
    assert "graphs" not in plain
