"""The two passes of the operator on the device. `triton.py` says what they are given.

A program takes one tile of the slot table: a few tokens of one slot. Offsets are 64 bits wide from the first
product with a stride on. Only built-in operations are used: Triton's own library of jitted functions works in
its interpreter only if the interpreter was chosen before Triton was imported.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def shrink_kernel(
    hidden_ptr,
    x_ptr,
    a0_ptr,
    a1_ptr,
    a2_ptr,
    a3_ptr,
    order_ptr,
    tiles_ptr,
    ranks_ptr,
    rows_ptr,
    tokens,
    n_in,
    stride_x,
    stride_a,
    stride_module,
    stride_part,
    MODULES: tl.constexpr,
    STEPS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """hidden[module, part, token, r] = the part of the input axis' share in x[token] · A[rows[slot, r]]."""
    tile = tl.program_id(0)
    module = tl.program_id(1) % MODULES
    first_r = tl.program_id(1) // MODULES * BLOCK_R
    part_index = tl.program_id(2)
    slot = tl.load(tiles_ptr + 3 * tile + 2)
    if slot < 0:
        return
    rank = tl.load(ranks_ptr + slot)
    if first_r >= rank:
        return
    a_ptr = a0_ptr
    if module == 1:
        a_ptr = a1_ptr
    if module == 2:
        a_ptr = a2_ptr
    if module == 3:
        a_ptr = a3_ptr

    t = tl.arange(0, BLOCK_T)
    in_t = t < tl.load(tiles_ptr + 3 * tile + 1)
    token = tl.load(order_ptr + tl.load(tiles_ptr + 3 * tile) + t, mask=in_t, other=0)
    in_t = in_t & (token < tokens)
    r = first_r + tl.arange(0, BLOCK_R)
    in_r = r < rank
    row = tl.load(rows_ptr + slot * MAX_RANK + r, mask=in_r, other=0)

    x_rows = x_ptr + token.to(tl.int64)[:, None] * stride_x
    a_rows = a_ptr + row.to(tl.int64)[None, :] * stride_a
    acc = tl.full([BLOCK_T, BLOCK_R], 0.0, tl.float32)
    for step in range(STEPS):
        k = (part_index * STEPS + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        in_k = k < n_in
        x = tl.load(x_rows + k[None, :], mask=in_t[:, None] & in_k[None, :], other=0.0)
        a = tl.load(a_rows + k[:, None], mask=in_r[None, :] & in_k[:, None], other=0.0)
        if WIDEN:
            x, a = x.to(tl.float32), a.to(tl.float32)
        acc = tl.dot(x, a, acc, input_precision="ieee")

    hidden_ptr += module.to(tl.int64) * stride_module + part_index.to(tl.int64) * stride_part
    at = token.to(tl.int64)[:, None] * MAX_RANK + r[None, :]
    tl.store(hidden_ptr + at, acc, mask=in_t[:, None] & in_r[None, :])


@triton.jit(do_not_specialize=["tokens"])
def expand_kernel(
    y0_ptr,
    y1_ptr,
    y2_ptr,
    y3_ptr,
    hidden_ptr,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    b3_ptr,
    factors_ptr,
    blocks_ptr,
    order_ptr,
    tiles_ptr,
    ranks_ptr,
    rows_ptr,
    gates_ptr,
    tokens,
    n0,
    n1,
    n2,
    n3,
    stride_y0,
    stride_y1,
    stride_y2,
    stride_y3,
    stride_b0,
    stride_b1,
    stride_b2,
    stride_b3,
    stride_module,
    stride_part,
    stride_factors,
    MODULES: tl.constexpr,
    PARTS: tl.constexpr,
    GATE: tl.constexpr,
    MAX_RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """y[token] += Σ gate[token, r] · hidden[token, r] · B[rows[slot, r]] for one tile and BLOCK_N outputs of
    one module."""
    tile = tl.program_id(0)
    slot = tl.load(tiles_ptr + 3 * tile + 2)
    if slot < 0:
        return
    rank = tl.load(ranks_ptr + slot)
    # The outputs of the modules lie one after another along this axis of the grid.
    block = tl.program_id(1)
    module = 0
    y_ptr, b_ptr, n_out, stride_y, stride_b = y0_ptr, b0_ptr, n0, stride_y0, stride_b0
    if MODULES > 1:
        first = (n0 + BLOCK_N - 1) // BLOCK_N
        if block >= first:
            module, block = 1, block - first
            y_ptr, b_ptr, n_out, stride_y, stride_b = y1_ptr, b1_ptr, n1, stride_y1, stride_b1
    if MODULES > 2:
        second = (n1 + BLOCK_N - 1) // BLOCK_N
        if module == 1 and block >= second:
            module, block = 2, block - second
            y_ptr, b_ptr, n_out, stride_y, stride_b = y2_ptr, b2_ptr, n2, stride_y2, stride_b2
    if MODULES > 3:
        third = (n2 + BLOCK_N - 1) // BLOCK_N
        if module == 2 and block >= third:
            module, block = 3, block - third
            y_ptr, b_ptr, n_out, stride_y, stride_b = y3_ptr, b3_ptr, n3, stride_y3, stride_b3
    hidden_ptr += module * stride_module
    t = tl.arange(0, BLOCK_T)
    in_t = t < tl.load(tiles_ptr + 3 * tile + 1)
    token = tl.load(order_ptr + tl.load(tiles_ptr + 3 * tile) + t, mask=in_t, other=0)
    in_t = in_t & (token < tokens)
    token = token.to(tl.int64)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < n_out

    acc = tl.full([BLOCK_T, BLOCK_N], 0.0, tl.float32)
    for first_r in range(0, rank, BLOCK_R):
        r = first_r + tl.arange(0, BLOCK_R)
        in_r = r < rank
        row = tl.load(rows_ptr + slot * MAX_RANK + r, mask=in_r, other=0).to(tl.int64)
        # Loads may go beyond the slot's rank, up to what is aligned, but nothing from there is used.
        in_h = in_t[:, None] & (r < MAX_RANK)[None, :]
        at = token[:, None] * MAX_RANK + r[None, :]
        hidden = tl.load(hidden_ptr + at, mask=in_h, other=0.0)
        for p in tl.static_range(1, PARTS):
            hidden += tl.load(hidden_ptr + p * stride_part + at, mask=in_h, other=0.0)
        hidden *= tl.load(gates_ptr + slot * MAX_RANK + r, mask=in_r, other=0.0)[None, :]
        if GATE == 1:
            factors = factors_ptr + token[:, None] * stride_factors + r[None, :]
            hidden *= tl.load(factors, mask=in_h, other=0.0)
        if GATE == 2:
            owner = tl.load(blocks_ptr + slot * MAX_RANK + r, mask=in_r, other=-1)
            factors = factors_ptr + token[:, None] * stride_factors + owner[None, :]
            hidden *= tl.load(factors, mask=in_h & (owner >= 0)[None, :], other=1.0)
        hidden = tl.where(in_r[None, :], hidden, 0.0)
        b = tl.load(
            b_ptr + row[:, None] * stride_b + n[None, :], mask=in_r[:, None] & in_n[None, :], other=0.0
        )
        if SPLIT:
            # hidden has more digits than B's dtype. Its leading and its trailing ones are multiplied
            # apart, which keeps twice as many as rounding it would.
            leading = hidden.to(b.dtype)
            trailing = (hidden - leading.to(tl.float32)).to(b.dtype)
            if WIDEN:
                leading, trailing, b = leading.to(tl.float32), trailing.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(trailing, b, acc, input_precision="ieee")
            acc = tl.dot(leading, b, acc, input_precision="ieee")
        else:
            acc = tl.dot(hidden, b, acc, input_precision="ieee")

    y_at = y_ptr + token[:, None] * stride_y + n[None, :]
    in_y = in_t[:, None] & in_n[None, :]
    y = tl.load(y_at, mask=in_y, other=0.0)
    tl.store(y_at, (y.to(tl.float32) + acc).to(y.dtype), mask=in_y)
