"""How the base's weights are held on a CPU: as asked for, else as a short measurement recommends."""

from collections import Counter
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from loramux.kernels import gated_lora, mixlora_ffn, packed_linear, paged_attention, pointwise
from loramux.kernels.packed_linear import (
    BLOCK,
    Kind,
    Kinds,
    Packed,
    library,
    pack_linears,
    storable,
    store_weights,
    time_product,
)
from loramux.server.engine.gguf.weights import GgufWeights
from loramux.server.engine.lean import make_lean

#: Quantizations that are made when a base is loaded. The head and the embeddings, which are the same matrix
#: in many models, decide about every token and have 8 bits at least.
QUANTIZED = {
    "int8": Kinds(Kind.INT8, Kind.INT8),
    "int4": Kinds(Kind.Q4_1, Kind.Q8_0),
}
#: Types of checkpoints that are kept while activations are float32, which changes no answer.
HALVES = {
    torch.bfloat16: Kinds(Kind.BF16, Kind.BF16),
    torch.float16: Kinds(Kind.F16, Kind.F16),
}
#: Weights in float32 that a kernel of ours reads as they lie, which computes every row alike and, of few
#: tokens, is faster than oneDNN's layout.
FULL = Kinds(Kind.F32, Kind.F32)
#: Requests at once whose step has to gain from that, beside the step of one; and the product of both gains
#: from which on it is taken. Less than 1, since a step is one call then, which gains a fifth (docs/log.md).
_MANY, _GAIN = 16, 0.7
#: Types of GGUF that a kernel reads as they lie in the file.
_READ = frozenset({Kind.BF16, Kind.F16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1})


class Choice(NamedTuple):
    """Of how weights are held; `kinds` is None where layers stay what transformers made of them."""

    kinds: Kinds | None
    why: str


def choose_weights(stored: torch.dtype | None, shape: tuple[int, int], *, large: bool = False) -> Choice:
    """For a base that computes in float32 and nothing more was asked for.

    Weights of 16 bits are widened in registers, which is exact, where that is faster than reading float32:
    this is measured with one token at a matrix of `shape` (rows, columns). A `large` base stays as it is
    stored unless it is much slower for it: float32 would take twice the memory.
    """
    kinds = HALVES.get(stored) if stored is not None else None
    if kinds is None:
        return choose_full(shape, "weights in float32, as the checkpoint has them")
    if library() is None:
        return Choice(None, "weights in float32: there are no compiled kernels for others")
    timing = time_product(*shape, kinds.linear)
    name = str(stored).removeprefix("torch.")
    keep = timing.stored < timing.plain * (2 if large else 1)
    what = f"weights stay {name}, widened in registers" if keep else "weights are widened to float32 once"
    why = (
        f"{what}: one token times a matrix of {timing.rows} x {timing.columns} takes "
        f"{1e6 * timing.stored:.0f} µs as stored, {1e6 * timing.plain:.0f} in float32"
    )
    return Choice(kinds, why) if keep else choose_full(shape, why)


def choose_full(shape: tuple[int, int], why: str = "weights in float32, as asked for") -> Choice:
    """For weights in float32 that nothing smaller is to replace: as they lie, where the steps of one request
    and of sixteen gain from that together, else in oneDNN's layout. Measured at a matrix of `shape`."""
    if library() is None:
        return Choice(None, f"{why}; there are no compiled kernels")
    one, many = (time_product(*shape, FULL.linear, tokens) for tokens in (1, _MANY))
    gains = [timing.plain / timing.stored for timing in (one, many)]
    keep = gains[0] * gains[1] > _GAIN
    found = f"{gains[0]:.2f} times as fast for one token as oneDNN's layout, {gains[1]:.2f} for {_MANY}"
    return Choice(FULL if keep else None, f"{why}; read {'as they lie' if keep else 'in a layout'}: {found}")


def choose_alike(stored: torch.dtype | None) -> Choice:
    """For a base whose tokens have to be computed alike everywhere: not by a measurement, which may fall out
    otherwise in another process."""
    kinds = HALVES.get(stored) if stored is not None else None
    if kinds is None:
        return Choice(FULL, "weights in float32, every token computed alike")
    return Choice(kinds, f"weights stay {str(stored).removeprefix('torch.')}, every token computed alike")


def is_compiled() -> bool:
    """Whether all that a token meets in a step is there compiled."""
    kernels = (packed_linear, paged_attention, gated_lora, mixlora_ffn.native, pointwise)
    return all(one.library() is not None for one in kernels)


def choose_blocks(weights: GgufWeights) -> Choice:
    """For a base that computes in float32 and lies in a GGUF file: blocks that a kernel reads stay as they
    are, with the answers of the decoded weights; others are held in 16 bits, as the model folder has them."""
    if library() is None:
        return Choice(None, "weights are decoded to float32: there are no compiled kernels for blocks")
    types, given = weights.types(), dict[str, Kind | None]()
    for module, name in types.items():
        if name.lower() in _READ and weights.columns(module) % BLOCK == 0:
            given[module] = Kind(name.lower())
        elif name in ("F32", "BF16"):  # float16 does not hold them
            given[module] = None
    counted = ", ".join(f"{count} in {name}" for name, count in Counter(types.values()).most_common())
    decoded = len(types) - len(given)
    note = f", {decoded} of them decoded to 16 bits, for which there is no kernel" if decoded else ""
    return Choice(
        Kinds(Kind.F16, Kind.F16, given), f"weights stay as they lie in the file: matrices {counted}{note}"
    )


def prepare(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    kinds: Kinds | None,
    weights: GgufWeights | None = None,
    *,
    invariant: bool = False,
) -> None:
    """Give a loaded, frozen base its weights as chosen, and on a CPU the fewest calls a step.

    Args:
        model: loaded; with `weights`, empty will do.
        device: where it is.
        dtype: what it computes in.
        kinds: how matrices are held, where that is not `dtype`.
        weights: the file that `kinds.given` is about.
        invariant: what a token gets must not depend on the others of a step; in float32 on a CPU.
    """
    if kinds is not None and weights is not None:
        _restore(model, kinds, weights)
        store_weights(model, kinds, partial(_packed, weights), invariant=invariant)
    elif kinds is not None:
        store_weights(model, kinds, invariant=invariant)
    if invariant:
        store_weights(model, FULL, invariant=True)
    elif kinds is None:
        pack_linears(model)
    if device.type == "cpu" and dtype == torch.float32:
        make_lean(model)


def _packed(weights: GgufWeights, path: str) -> Packed:
    """A matrix as it lies in the file, in memory of its own: the file may go while it is served."""
    blocks = weights.blocks(path)
    return Packed.from_blocks(blocks.data.clone(), blocks.type)


def _restore(model: nn.Module, kinds: Kinds, weights: GgufWeights) -> None:
    """Give an empty model what does not stay in blocks: norms, biases and matrices in float32 as such, which
    16 bits do not hold, and matrices that are decoded in 16 bits."""
    stored = {f"{place.path}.weight": place.path in kinds.given for place in storable(model, kinds)}
    made: dict[int, nn.Parameter] = {}  # a tied weight is made once
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if stored.get(name, False):
            continue
        if id(parameter) not in made:
            value = weights.value(name, torch.float16 if name in stored else torch.float32)
            made[id(parameter)] = nn.Parameter(value, requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, made[id(parameter)])
