"""The operator for CUDA: one launch shrinks x for every module that reads it, one more a module gates and
expands.

Both launches take their work from a `SlotTable`, with a grid as large as its capacity whose unused programs
return at once; nothing is read back, and nothing depends on the batch but the content of the table. Both may
therefore be captured in a CUDA graph and replayed after the table was filled again. Launch each once before
capturing, so that it is compiled by then.

Importing this module needs Triton.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.runtime import JITFunction

from loramux.kernels.gated_lora.slots import LONG_TILE, SHORT_TILE, SlotTable
from loramux.kernels.gated_lora.triton_kernels import expand_kernel, shrink_kernel
from loramux.kernels.launch import Launch

#: Modules that one launch of the shrink kernel serves; more take further launches.
_MODULES = 4

#: Programs that a launch should have at least, to keep every multiprocessor of a large device busy, and the
#: least part of an input row that is worth a program of its own.
_PROGRAMS, _PART, _PARTS = 128, 256, 8

#: From this many outputs on, a program takes more than 32 of them.
_WIDE = 8192

#: The interpreter would multiply the bits of bfloat16 as integers, so there factors are widened first.
_WIDEN = not isinstance(shrink_kernel, JITFunction)

_GATE_NONE, _GATE_ROW, _GATE_BLOCK = 0, 1, 2


@dataclass(frozen=True, slots=True)
class BlockGate:
    """A factor per token and block of rows, as routers over whole experts give it.

    `values` [T, blocks] float32; `blocks` int32 [max_slots, max_rank] names the block of each row of the slot
    table, -1 for a row that has none and takes the factor 1.
    """

    values: Tensor
    blocks: Tensor


def parts_of(table: SlotTable, modules: int, n_in: int) -> int:
    """How many parts the input axis is cut into: few programs are spread over the device, many are not.

    Depends on capacities and shapes alone: a token's result is the same whatever else is in the batch.
    """
    programs = max(1, table.max_tokens // table.tile) * modules
    parts = 1
    while parts < _PARTS and parts * programs < _PROGRAMS and 2 * parts * _PART <= n_in:
        parts *= 2
    return parts


def shrink(x: Tensor, a: Sequence[Tensor], table: SlotTable) -> Tensor:
    """The ungated hidden values of every module that reads `x`, `A_rows x` in float32.

    Args:
        x: [T, in]; token t is token t of the table, T is at most its `max_tokens`.
        a: the stacked factors [R, in] of each module, with x's dtype and one row stride for all.
        table: which token uses which rows.

    Returns:
        [modules, parts, T, max_rank] float32, to be summed over `parts` (`total`; `expand_` does so itself).
        Only the entries of tokens with a slot, up to its rank, are defined.

    Raises:
        ValueError: shapes or dtypes do not fit together, or a row is not contiguous.
    """
    _check_tokens("x", x, table)
    for factor in a:
        _check_factor("A", factor, x, table)
        if factor.stride(0) != a[0].stride(0):
            raise ValueError("the A of modules that share an input must share their row stride")
    parts = parts_of(table, min(len(a), _MODULES), x.shape[1])
    hidden = torch.empty(len(a), parts, x.shape[0], table.max_rank, dtype=torch.float32, device=x.device)
    for first in range(0, len(a), _MODULES):
        shrink_launch(hidden[first : first + _MODULES], x, a[first : first + _MODULES], table).run()
    return hidden


def total(hidden: Tensor) -> Tensor:
    """The hidden values themselves, [..., T, max_rank], for a gate that is computed from them."""
    return hidden.squeeze(-3) if hidden.shape[-3] == 1 else hidden.sum(-3)


def expand_(
    y: Tensor, hidden: Tensor, b: Tensor, table: SlotTable, gate: Tensor | BlockGate | None = None
) -> None:
    """`y += (gate ⊙ hidden) B_rows` in place, accumulated in float32 and rounded once.

    Args:
        y: [T, out]; rows of tokens without a slot are neither read nor written.
        hidden: one module of what `shrink` gave, [parts, T, max_rank] float32.
        b: the module's stacked B transposed, [R, out], with y's dtype.
        table: the table that `shrink` was given, filled for the same batch.
        gate: a factor per token and rank, [T, max_rank] float32, or per token and block; it multiplies the
            factor per slot that the table holds. `None` leaves that alone.

    Raises:
        ValueError: shapes or dtypes do not fit together, or a row is not contiguous.
    """
    expand_all_([y], hidden.unsqueeze(0), [b], table, gate)


def expand_all_(
    ys: Sequence[Tensor],
    hidden: Tensor,
    bs: Sequence[Tensor],
    table: SlotTable,
    gate: Tensor | BlockGate | None = None,
) -> None:
    """`expand_` for every module that `shrink` served, [modules, parts, T, max_rank], four in a launch.

    Raises as `expand_`.
    """
    for y, b in zip(ys, bs, strict=True):
        _check_tokens("y", y, table)
        _check_factor("B", b, y, table)
    expected = (len(ys), ys[0].shape[0], table.max_rank)
    if hidden.dtype != torch.float32 or hidden.ndim != 4 or (hidden.shape[0], *hidden.shape[2:]) != expected:
        raise ValueError(
            f"hidden is {hidden.dtype} {tuple(hidden.shape[1:])}, "
            f"expected float32 [parts, {expected[1]}, {expected[2]}] for each of {len(ys)} modules"
        )
    if not hidden[0][0].is_contiguous():
        raise ValueError("a part of hidden is not contiguous")
    if gate is not None:
        _check_gate(gate, ys[0].shape[0], table)
    for at in range(0, len(ys), _MODULES):
        some = slice(at, at + _MODULES)
        expand_launch(ys[some], hidden[some], bs[some], table, gate).run()


def gated_lora_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, table: SlotTable) -> None:
    """`y += (x Aᵀ ⊙ g) B` in place, with the factors per slot of the table as `g`.

    Shapes: y [T, out], x [T, in], a [R, in], b [R, out], all of one dtype. Raises as `shrink` and `expand_`.
    """
    gated_lora_all_([y], x, [a], [b], table)


def gated_lora_all_(
    ys: Sequence[Tensor], x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], table: SlotTable
) -> None:
    """`gated_lora_` for modules that share their input, in two launches for up to four of them."""
    expand_all_(ys, shrink(x, a, table), b, table)


def shrink_launch(hidden: Tensor, x: Tensor, a: Sequence[Tensor], table: SlotTable) -> Launch:
    """What `shrink` runs for at most four modules; `hidden` [modules, parts, T, max_rank] is written to."""
    block_r = min(32, _rank_block(table)) if table.tile == SHORT_TILE else _rank_block(table)
    block_k = 32 if x.dtype == torch.float32 else 64 if table.tile == LONG_TILE else 128
    modules, parts = hidden.shape[:2]
    blocks = -(-x.shape[1] // block_k)
    given = [*a, *[a[0]] * (_MODULES - len(a))]
    return Launch(
        shrink_kernel,
        (table.max_tiles if x.shape[0] else 0, modules * -(-table.max_rank // block_r), parts),
        {
            "hidden_ptr": hidden,
            "x_ptr": x,
            **{f"a{i}_ptr": factor for i, factor in enumerate(given)},
            "order_ptr": table.order,
            "tiles_ptr": table.tiles,
            "ranks_ptr": table.ranks,
            "rows_ptr": table.rows,
            "tokens": x.shape[0],
            "n_in": x.shape[1],
            "stride_x": x.stride(0),
            "stride_a": a[0].stride(0),
            "stride_module": hidden.stride(0),
            "stride_part": hidden.stride(1),
        },
        {
            "MODULES": modules,
            "STEPS": -(-blocks // parts),
            "MAX_RANK": table.max_rank,
            "BLOCK_T": table.tile,
            "BLOCK_R": block_r,
            "BLOCK_K": block_k,
            "WIDEN": _WIDEN,
        },
        {"num_warps": _warps(table), "num_stages": 3, "enable_fp_fusion": True},
    )


def expand_launch(
    ys: Sequence[Tensor],
    hidden: Tensor,
    bs: Sequence[Tensor],
    table: SlotTable,
    gate: Tensor | BlockGate | None = None,
) -> Launch:
    """What `expand_all_` runs for at most four modules."""
    width = sum(y.shape[1] for y in ys)
    # Few tokens: as many programs as keep the device busy (docs/log.md).
    block_n = 32 if width < _WIDE else 64 if table.tile == SHORT_TILE or ys[0].dtype == torch.float32 else 128
    kind, factors, blocks = _GATE_NONE, table.gates, table.rows
    if isinstance(gate, BlockGate):
        kind, factors, blocks = _GATE_BLOCK, gate.values, gate.blocks
    elif gate is not None:
        kind, factors = _GATE_ROW, gate
    fill = _MODULES - len(ys)
    given_y, given_b = [*ys, *[ys[0]] * fill], [*bs, *[bs[0]] * fill]
    outputs = sum(-(-y.shape[1] // block_n) for y in ys)
    return Launch(
        expand_kernel,
        (table.max_tiles if ys[0].shape[0] else 0, outputs, 1),
        {
            **{f"y{i}_ptr": y for i, y in enumerate(given_y)},
            "hidden_ptr": hidden,
            **{f"b{i}_ptr": b for i, b in enumerate(given_b)},
            "factors_ptr": factors,
            "blocks_ptr": blocks,
            "order_ptr": table.order,
            "tiles_ptr": table.tiles,
            "ranks_ptr": table.ranks,
            "rows_ptr": table.rows,
            "gates_ptr": table.gates,
            "tokens": ys[0].shape[0],
            **{f"n{i}": y.shape[1] for i, y in enumerate(given_y)},
            **{f"stride_y{i}": y.stride(0) for i, y in enumerate(given_y)},
            **{f"stride_b{i}": b.stride(0) for i, b in enumerate(given_b)},
            "stride_module": hidden.stride(0),
            "stride_part": hidden.stride(1),
            "stride_factors": factors.stride(0),
        },
        {
            "MODULES": len(ys),
            "PARTS": hidden.shape[1],
            "GATE": kind,
            "MAX_RANK": table.max_rank,
            "BLOCK_T": table.tile,
            "BLOCK_R": _rank_block(table),
            "BLOCK_N": block_n,
            "SPLIT": ys[0].dtype != torch.float32,
            "WIDEN": _WIDEN,
        },
        {"num_warps": _warps(table), "num_stages": 1, "enable_fp_fusion": True},
    )


def _rank_block(table: SlotTable) -> int:
    """The least power of two that holds the rank, between the smallest tile of a product and 64."""
    return min(64, max(16, 1 << (table.max_rank - 1).bit_length()))


def _warps(table: SlotTable) -> int:
    return 8 if table.tile == LONG_TILE else 4


def _check_tokens(name: str, tensor: Tensor, table: SlotTable) -> None:
    if tensor.ndim != 2 or not table.tokens <= tensor.shape[0] <= table.max_tokens:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, the slot table holds {table.tokens} tokens "
            f"and has room for {table.max_tokens}"
        )
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name} is {tensor.dtype}; the kernels compute with float32, bfloat16 and float16")
    _check_rows(name, tensor)


def _check_factor(name: str, factor: Tensor, tokens: Tensor, table: SlotTable) -> None:
    if factor.ndim != 2 or factor.shape[1] != tokens.shape[1] or factor.shape[0] < table.max_rows:
        raise ValueError(
            f"{name} has shape {tuple(factor.shape)}, expected [at least {table.max_rows}, {tokens.shape[1]}]"
        )
    if factor.dtype != tokens.dtype:
        raise ValueError(f"{name} is {factor.dtype}, the tokens are {tokens.dtype}")
    _check_rows(name, factor)


def _check_rows(name: str, tensor: Tensor) -> None:
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"the rows of {name} are not contiguous (strides {tensor.stride()})")


def _check_gate(gate: Tensor | BlockGate, tokens: int, table: SlotTable) -> None:
    if isinstance(gate, BlockGate):
        values, width = gate.values, gate.values.shape[-1]
        shape = (table.max_slots, table.max_rank)
        if gate.blocks.dtype != torch.int32 or gate.blocks.shape != shape or not gate.blocks.is_contiguous():
            raise ValueError(
                f"the blocks of a gate must be contiguous int32 {shape}, got {gate.blocks.dtype} "
                f"{tuple(gate.blocks.shape)}"
            )
    else:
        values, width = gate, table.max_rank
    if values.dtype != torch.float32 or values.shape != (tokens, width):
        raise ValueError(
            f"the gate is {values.dtype} {tuple(values.shape)}, expected float32 [{tokens}, {width}]"
        )
    _check_rows("the gate", values)
