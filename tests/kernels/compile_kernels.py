"""Compile the Triton kernels for CUDA devices that this machine need not have, down to machine code.

Prints the most shared memory that any of them takes, in bytes.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loramux.kernels.gated_lora.slots import SlotTable
from loramux.kernels.gated_lora.triton import BlockGate, expand_launch, parts_of, shrink_launch
from loramux.kernels.launch import Launch
from loramux.kernels.mixlora_ffn import Experts, probabilities, top_k
from loramux.kernels.mixlora_ffn.triton import mix_launch
from loramux.kernels.paged_attention import Rows, Scores
from loramux.kernels.paged_attention.triton import launches
from tests.kernels.ffn_blocks import random_block

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
#: (arch, dtype, tokens, rank, in and out, gate)
GATED_LORA: list[tuple[int, torch.dtype, int, int, int, str]] = [
    (80, torch.bfloat16, 32, 16, 4096, "none"),
    (80, torch.bfloat16, 2048, 64, 4096, "none"),
    (80, torch.float16, 32, 200, 1, "block"),
    (80, torch.float32, 2048, 64, 129, "row"),
    (90, torch.bfloat16, 32, 64, 4096, "row"),
    (90, torch.bfloat16, 2048, 64, 4096, "block"),
]
#: (arch, dtype, rows, heads, kv heads, dim of a head, how scores are made)
PAGED_ATTENTION: list[tuple[int, torch.dtype, int, int, int, int, Scores]] = [
    (80, torch.bfloat16, 1, 32, 8, 128, Scores(0.1)),
    (80, torch.float32, 64, 4, 4, 40, Scores(0.1, window=33, softcap=20.0, sinks=torch.empty(4))),
    (90, torch.bfloat16, 32, 32, 8, 64, Scores(0.1)),
    (90, torch.float16, 3, 9, 3, 64, Scores(0.1, sinks=torch.empty(9, dtype=torch.float16))),
]
#: (arch, dtype, tokens, rank, kind of block)
MIXLORA_FFN: list[tuple[int, torch.dtype, int, int, str]] = [
    (80, torch.bfloat16, 1, 16, "gated"),
    (80, torch.float16, 512, 64, "halves"),
    (80, torch.float32, 512, 200, "plain"),
    (90, torch.bfloat16, 512, 16, "gated"),
]


def compile_for(arch: int, launch: Launch) -> Any:
    """As a launch would, with the same facts about arguments: aligned, a multiple of 16, equal to 1."""
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    facts = {}
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        if isinstance(value, torch.Tensor):
            signature[name], number = TYPES[value.dtype], value.data_ptr()
        else:
            signature[name], number = ("fp32" if isinstance(value, float) else "i32"), value
            if name == "tokens":
                continue
            if number == 1 and isinstance(value, int):
                signature[name], constants[name] = "constexpr", 1
                continue
        if number % 16 == 0:
            facts[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, facts)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def gated_lora() -> Iterator[tuple[int, Launch]]:
    for (arch, dtype, tokens, rank, size, kind), modules in zip(
        GATED_LORA, itertools.cycle([1, 3]), strict=False
    ):
        table = SlotTable(tokens, 16, rank, 64)
        x = torch.empty(tokens, size, dtype=dtype)
        factor = torch.empty(64, size, dtype=dtype)
        hidden = torch.empty(modules, parts_of(table, modules, size), tokens, rank)
        gates = {
            "none": None,
            "row": torch.empty(tokens, rank),
            "block": BlockGate(torch.empty(tokens, 5), torch.empty(16, rank, dtype=torch.int32)),
        }
        yield arch, shrink_launch(hidden, x, [factor] * modules, table)
        yield arch, expand_launch([x] * modules, hidden, [factor] * modules, table, gates[kind])


def paged_attention() -> Iterator[tuple[int, Launch]]:
    for arch, dtype, rows, heads, kv_heads, dim, scores in PAGED_ATTENTION:
        cache = torch.empty(9, 32, kv_heads, dim, dtype=dtype)
        query, key = torch.empty(rows, heads, dim, dtype=dtype), torch.empty(rows, kv_heads, dim, dtype=dtype)
        tables, lengths = torch.empty(rows, 8, dtype=torch.int32), torch.empty(rows, dtype=torch.int32)
        where = Rows(tables, lengths, torch.empty(rows, dtype=torch.int64))
        for launch in launches(query, key, key, cache, cache, where, scores)[0]:
            yield arch, launch


def mixlora_ffn() -> Iterator[tuple[int, Launch]]:
    for arch, dtype, tokens, rank, kind in MIXLORA_FFN:
        block = random_block(kind, 64, 256, 8, dtype=dtype, ranks=[rank] * 3)
        experts = Experts.prepare(8, block.stacks, block.ffn.last[0], dtype=dtype)
        assert experts.shrink is not None
        routes = top_k(probabilities(torch.randn(tokens, 8)), 2)
        first = {
            name: torch.empty(tokens, block.linears[name].out_features, dtype=dtype)
            for name in block.ffn.first
        }
        hidden, low = (torch.empty(tokens, width, dtype=dtype) for width in (256, experts.shrink.shape[0]))
        yield arch, mix_launch(hidden, low, first, block.ffn, experts, routes)


def main() -> None:
    shared = []
    for arch, launch in itertools.chain(gated_lora(), paged_attention(), mixlora_ffn()):
        compiled = compile_for(arch, launch)
        assert compiled.asm["cubin"]
        shared.append(compiled.metadata.shared)
    print(max(shared))


if __name__ == "__main__":
    main()
