"""The passes of the operator on the device. `triton.py` says what they are given.

Only built-in operations are used: Triton's own library of jitted functions works in its interpreter only if
the interpreter was chosen before Triton was imported.
"""

import triton
import triton.language as tl


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _sum(a, b):
    return a + b


@triton.jit
def store_kernel(
    keys_ptr, values_ptr, key_ptr, value_ptr, slots_ptr, stride_key, stride_value,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """keys[slot[row]] = key[row], and the values likewise."""
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(key_ptr + row.to(tl.int64) * stride_key + at, mask=at < KEY_WIDTH)
    tl.store(keys_ptr + slot * KEY_WIDTH + at, key, mask=at < KEY_WIDTH)
    value = tl.load(value_ptr + row.to(tl.int64) * stride_value + at, mask=at < VALUE_WIDTH)
    tl.store(values_ptr + slot * VALUE_WIDTH + at, value, mask=at < VALUE_WIDTH)


@triton.jit
def attend_kernel(
    out_ptr, lse_ptr, query_ptr, keys_ptr, values_ptr, tables_ptr, lengths_ptr, sinks_ptr,
    stride_query, stride_table, scale, softcap,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    SPLITS: tl.constexpr, LEAST: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """One row, one head of keys with the heads of queries that share it, and one part of the row's tokens.

    With SPLITS 1, out [R, heads, value dim] is the result; else out [SPLITS, R, heads, value dim] float32 are
    the parts' results and lse [SPLITS, R, heads] the logarithms of their sums, for `combine_kernel`.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths_ptr + row)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    # Parts are as long as the row's tokens ask for, whatever else is in the batch.
    part = tl.maximum((length - first + SPLITS - 1) // SPLITS, LEAST)
    part = (part + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    begin = first + split * part
    end = tl.minimum(begin + part, length)

    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    v = tl.arange(0, BLOCK_V)
    n = tl.arange(0, BLOCK_N)
    heads = head * GROUP + g
    in_g = g < GROUP
    queries = query_ptr + row.to(tl.int64) * stride_query + heads[:, None] * DIM + d[None, :]
    q = tl.load(queries, mask=in_g[:, None] & (d < DIM)[None, :], other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    table = tables_ptr + row.to(tl.int64) * stride_table
    largest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.full([BLOCK_G], 0.0, tl.float32)
    acc = tl.full([BLOCK_G, BLOCK_V], 0.0, tl.float32)
    for at in range(begin, end, BLOCK_N):
        position = at + n
        in_n = position < end
        page = tl.load(table + position // PAGE, mask=in_n, other=0).to(tl.int64)
        token = (page * PAGE + position % PAGE) * KV_HEADS + head
        key = tl.load(
            keys_ptr + token[None, :] * DIM + d[:, None], mask=in_n[None, :] & (d < DIM)[:, None], other=0.0
        )
        if WIDEN:
            key = key.to(tl.float32)
        s = tl.dot(q, key, input_precision="ieee") * scale
        if SOFTCAP:
            # tanh z = 1 - 2 / (e^2z + 1)
            s = softcap * (1.0 - 2.0 / (tl.exp(2.0 * s / softcap) + 1.0))
        s = tl.where(in_n[None, :], s, float("-inf"))
        most = tl.maximum(largest, tl.reduce(s, 1, _larger))
        p = tl.exp(s - most[:, None])
        shrunk = tl.exp(largest - most)
        total = total * shrunk + tl.reduce(p, 1, _sum)
        value = tl.load(
            values_ptr + token[:, None] * VALUE_DIM + v[None, :],
            mask=in_n[:, None] & (v < VALUE_DIM)[None, :],
            other=0.0,
        )
        if WIDEN:
            value = value.to(tl.float32)
        acc = tl.dot(p.to(value.dtype), value, acc * shrunk[:, None], input_precision="ieee")
        largest = most

    out_at = row.to(tl.int64) * KV_HEADS * GROUP + heads
    in_out = in_g[:, None] & (v < VALUE_DIM)[None, :]
    if SPLITS == 1:
        if SINKS:
            sink = tl.load(sinks_ptr + heads, mask=in_g, other=0.0).to(tl.float32)
            most = tl.maximum(largest, sink)
            factor = tl.exp(largest - most)
            total = total * factor + tl.exp(sink - most)
            acc = acc * factor[:, None]
        out = acc / total[:, None]
        tl.store(
            out_ptr + out_at[:, None] * VALUE_DIM + v[None, :], out.to(out_ptr.dtype.element_ty), mask=in_out
        )
    else:
        rows = tl.num_programs(0)
        out_at += split.to(tl.int64) * rows * KV_HEADS * GROUP
        nothing = total == 0.0
        out = tl.where(nothing[:, None], 0.0, acc / tl.where(nothing, 1.0, total)[:, None])
        lse = tl.where(nothing, float("-inf"), largest + tl.log(tl.where(nothing, 1.0, total)))
        tl.store(out_ptr + out_at[:, None] * VALUE_DIM + v[None, :], out, mask=in_out)
        tl.store(lse_ptr + out_at, lse, mask=in_g)


@triton.jit
def combine_kernel(
    out_ptr, parts_ptr, lse_ptr, sinks_ptr,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, SINKS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The parts of one row and head, each by its share of the whole sum."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    count = tl.num_programs(0) * HEADS
    at = row * HEADS + head
    split = tl.arange(0, SPLITS)
    v = tl.arange(0, BLOCK_V)
    lse = tl.load(lse_ptr + split * count + at)
    most = tl.reduce(lse, 0, _larger)
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        most = tl.maximum(most, sink)
    weight = tl.exp(lse - most)
    total = tl.reduce(weight, 0, _sum)
    if SINKS:
        total += tl.exp(sink - most)
    where = (split.to(tl.int64) * count + at)[:, None] * VALUE_DIM + v[None, :]
    parts = tl.load(parts_ptr + where, mask=(split >= 0)[:, None] & (v < VALUE_DIM)[None, :], other=0.0)
    out = tl.reduce(parts * weight[:, None], 0, _sum) / total
    tl.store(out_ptr + at.to(tl.int64) * VALUE_DIM + v, out.to(out_ptr.dtype.element_ty), mask=v < VALUE_DIM)
