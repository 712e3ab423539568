"""The pass between a block's projections on the device. `triton.py` says what it is given.

Only built-in operations are used: Triton's own library of jitted functions works in its interpreter only if
the interpreter was chosen before Triton was imported.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def mix_kernel(
    hidden_ptr,
    last_ptr,
    gate_ptr,
    up_ptr,
    low_ptr,
    gate_b_ptr,
    up_b_ptr,
    last_a_ptr,
    weights_ptr,
    serves_ptr,
    tokens,
    width,
    count,
    stride_gate,
    stride_up,
    stride_low,
    stride_part,
    stride_gate_b,
    stride_up_b,
    gate_column,
    up_column,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE_RANK: tl.constexpr,
    UP_RANK: tl.constexpr,
    LAST_RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """hidden[t, n] = Σ_e w[t, e] h_e[t, n] for a tile of tokens and columns, and the tile's share in
    last[t, e, r] = w[t, e] Σ_n h_e[t, n] A2_e[r, n], with h_e = act(gate + low B1_eᵀ) (up + low B3_eᵀ)."""
    tile = tl.program_id(0)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    in_t = t < tokens
    t = t.to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < width
    inside = in_t[:, None] & in_n[None, :]
    ranks = tl.arange(0, BLOCK_R)
    gate = tl.load(gate_ptr + t[:, None] * stride_gate + n[None, :], mask=inside, other=0.0).to(tl.float32)
    up = gate
    if GATED:
        up = tl.load(up_ptr + t[:, None] * stride_up + n[None, :], mask=inside, other=0.0).to(tl.float32)

    total = tl.full([BLOCK_T, BLOCK_N], 0.0, tl.float32)
    for e in range(count):
        if tl.load(serves_ptr + tile * count + e) != 0:
            weight = tl.load(weights_ptr + t * count + e, mask=in_t, other=0.0)
            h = gate
            for first in tl.static_range(0, GATE_RANK, BLOCK_R):
                r = first + ranks
                in_r = r < GATE_RANK
                low = tl.load(
                    low_ptr + t[:, None] * stride_low + (gate_column + e * GATE_RANK + r)[None, :],
                    mask=in_t[:, None] & in_r[None, :],
                    other=0.0,
                )
                b = tl.load(
                    gate_b_ptr + (e * GATE_RANK + r).to(tl.int64)[:, None] * stride_gate_b + n[None, :],
                    mask=in_r[:, None] & in_n[None, :],
                    other=0.0,
                )
                if WIDEN:
                    low, b = low.to(tl.float32), b.to(tl.float32)
                h = tl.dot(low, b, h, input_precision="ieee")
            if ACTIVATION == 0:  # SiLU
                h = h / (1.0 + tl.exp(-h))
            if ACTIVATION == 1:  # GELU
                h = 0.5 * h * (1.0 + tl.math.erf(h * 0.7071067811865476))
            if ACTIVATION == 2:  # GELU by its tanh formula: 0.5 (1 + tanh z) = 1 / (1 + exp(-2z))
                h = h / (1.0 + tl.exp(-1.5957691216057308 * (h + 0.044715 * h * h * h)))
            if ACTIVATION == 3:  # ReLU
                h = tl.where(h > 0, h, 0.0)
            if GATED:
                factor = up
                for first in tl.static_range(0, UP_RANK, BLOCK_R):
                    r = first + ranks
                    in_r = r < UP_RANK
                    low = tl.load(
                        low_ptr + t[:, None] * stride_low + (up_column + e * UP_RANK + r)[None, :],
                        mask=in_t[:, None] & in_r[None, :],
                        other=0.0,
                    )
                    b = tl.load(
                        up_b_ptr + (e * UP_RANK + r).to(tl.int64)[:, None] * stride_up_b + n[None, :],
                        mask=in_r[:, None] & in_n[None, :],
                        other=0.0,
                    )
                    if WIDEN:
                        low, b = low.to(tl.float32), b.to(tl.float32)
                    factor = tl.dot(low, b, factor, input_precision="ieee")
                h = h * factor
            # What an expert would make of another's tokens must not get in, not even as 0 times infinity.
            h = tl.where(inside & (weight != 0.0)[:, None], h, 0.0)
            total += weight[:, None] * h
            for first in tl.static_range(0, LAST_RANK, BLOCK_R):
                r = first + ranks
                in_r = r < LAST_RANK
                a = tl.load(
                    last_a_ptr + (e * LAST_RANK + r).to(tl.int64)[None, :] * width + n[:, None],
                    mask=in_r[None, :] & in_n[:, None],
                    other=0.0,
                )
                rounded = h.to(a.dtype)
                if WIDEN:
                    rounded, a = rounded.to(tl.float32), a.to(tl.float32)
                share = tl.dot(rounded, a, input_precision="ieee") * weight[:, None]
                at = t[:, None] * (count * LAST_RANK) + (e * LAST_RANK + r)[None, :]
                part = tl.program_id(1).to(tl.int64) * stride_part
                tl.store(last_ptr + part + at, share, mask=in_t[:, None] & in_r[None, :])
    tl.store(hidden_ptr + t[:, None] * width + n[None, :], total.to(hidden_ptr.dtype.element_ty), mask=inside)
