"""What lies between a block's projections, for CUDA: all experts of all tokens in one launch.

A program makes one tile of tokens and columns and goes through the experts that serve any of its tokens, so
that no token is sorted, nothing is read back by the host, and every sum has one order: the launch depends on
shapes alone and may be captured in a CUDA graph. A tile may compute an expert for tokens that it does not
serve; next to the base's projections that is little, as a rank is next to the width of the block.

Importing this module needs Triton.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, pad
from triton.runtime import JITFunction

from loramux.kernels.launch import Launch
from loramux.kernels.mixlora_ffn.activations import activation_code
from loramux.kernels.mixlora_ffn.ffn import Experts, Ffn, Gated, Halves, Spread
from loramux.kernels.mixlora_ffn.mixed import Mixed
from loramux.kernels.mixlora_ffn.routing import Routes
from loramux.kernels.mixlora_ffn.triton_kernels import mix_kernel

#: Tokens of a tile: as few as a product may have, and more for more tokens, so that factors are read less
#: often.
_SHORT, _LONG = 16, 64
#: From this many tokens on tiles are long.
_MANY = 256

#: The interpreter would multiply the bits of bfloat16 as integers, so there factors are widened first.
_WIDEN = not isinstance(mix_kernel, JITFunction)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes(ffn: Ffn, x: Tensor) -> bool:
    """Whether the kernel knows the block's activation and computes in the type of x."""
    return activation_code(ffn.activate.activation) is not None and x.dtype in _DTYPES


def mix(x: Tensor, first: dict[str, Tensor], ffn: Ffn, experts: Experts, routes: Routes) -> Mixed:
    """As `fused.mix`, for a block that `takes` says yes to.

    Sums over experts and over the columns of the block are float32; an expert's hidden state is rounded to
    the type of x only for the product with its last factor.
    """
    count, tokens = experts.count, x.shape[0]
    low = x.new_empty(tokens, 0) if experts.shrink is None else linear(x, experts.shrink)
    width = next(iter(first.values())).shape[1] // (2 if isinstance(ffn.activate, Halves) else 1)
    hidden = x.new_empty(tokens, width)
    launch = mix_launch(hidden, low, first, ffn, experts, routes)
    last = launch.arguments["last_ptr"]
    launch.run()
    if experts.last_a is None:
        return Mixed(hidden, None)
    return Mixed(hidden, last.sum(0).view(tokens, count * experts.last_a.shape[1]))


def mix_launch(
    hidden: Tensor, low: Tensor, first: dict[str, Tensor], ffn: Ffn, experts: Experts, routes: Routes
) -> Launch:
    """What `mix` runs; `hidden` [T, width] and the parts of the experts' last product are written to."""
    tokens, width = hidden.shape
    count = experts.count
    block_t = _LONG if tokens >= _MANY else _SHORT
    block_n = 64 if block_t == _LONG or hidden.dtype == torch.float32 else 128
    tiles, columns = -(-tokens // block_t), -(-width // block_n)
    names = list(first)
    spread = [experts.first.get(name) for name in names]
    gate, gate_spread = first[names[0]], spread[0]
    up, up_spread = first[names[-1]], spread[-1]
    gated = isinstance(ffn.activate, Gated | Halves)
    gate_b = None if gate_spread is None else gate_spread.bt
    up_b = None if up_spread is None else up_spread.bt
    if isinstance(ffn.activate, Halves):  # one projection whose second half is the factor
        up = gate[:, width:]
        up_b = None if up_b is None else up_b[..., width:]
    last_a = experts.last_a
    last_rank = 0 if last_a is None else last_a.shape[1]
    weights = routes.weights.float().contiguous()
    serves = pad(weights != 0, (0, 0, 0, tiles * block_t - tokens)).view(tiles, block_t, count).any(1)
    ranks = [_rank(gate_spread), _rank(up_spread) if gated else 0, last_rank]
    return Launch(
        mix_kernel,
        (tiles, columns, 1),
        {
            "hidden_ptr": hidden,
            "last_ptr": torch.zeros(columns, tokens, count * last_rank, device=hidden.device),
            "gate_ptr": gate,
            "up_ptr": up,
            "low_ptr": low,
            "gate_b_ptr": gate if gate_b is None else gate_b,
            "up_b_ptr": gate if up_b is None else up_b,
            "last_a_ptr": gate if last_a is None else last_a,
            "weights_ptr": weights,
            "serves_ptr": serves.to(torch.int32),
            "tokens": tokens,
            "width": width,
            "count": count,
            "stride_gate": gate.stride(0),
            "stride_up": up.stride(0),
            "stride_low": low.stride(0),
            "stride_part": tokens * count * last_rank,
            "stride_gate_b": _row_stride(gate_b),
            "stride_up_b": _row_stride(up_b),
            "gate_column": 0 if gate_spread is None else gate_spread.columns.start,
            "up_column": 0 if up_spread is None else up_spread.columns.start,
        },
        {
            "GATED": gated,
            "ACTIVATION": activation_code(ffn.activate.activation),
            "GATE_RANK": ranks[0],
            "UP_RANK": ranks[1],
            "LAST_RANK": ranks[2],
            "BLOCK_T": block_t,
            "BLOCK_N": block_n,
            "BLOCK_R": min(64, max(16, 1 << (max(*ranks, 1) - 1).bit_length())),
            "WIDEN": _WIDEN,
        },
        {"num_warps": 8 if block_t == _LONG else 4, "num_stages": 1, "enable_fp_fusion": True},
    )


def _rank(spread: Spread | None) -> int:
    return 0 if spread is None else spread.bt.shape[1]


def _row_stride(bt: Tensor | None) -> int:
    """From one row of [E, r, out] to the next; the stride of a dimension of size 1 says nothing."""
    return 0 if bt is None else bt.stride(0) // bt.shape[1]
