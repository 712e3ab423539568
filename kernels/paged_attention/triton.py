"""The operator for CUDA: a launch that stores the new tokens, one that attends, and where rows are few one
that puts the parts of a row together.

Grids depend on shapes alone and lengths are read on the device, so the launches may be captured in a CUDA
graph and replayed for other rows. Launch once before capturing, so that the kernels are compiled by then.

Importing this module needs Triton.
"""

import torch
from torch import Tensor
from triton.runtime import JITFunction

from loramux.kernels.launch import Launch
from loramux.kernels.paged_attention.rows import Rows, Scores
from loramux.kernels.paged_attention.triton_kernels import attend_kernel, combine_kernel, store_kernel

#: Programs that a launch should have, to keep every multiprocessor of a large device busy; parts that a row
#: is cut into for it, at most, and the fewest tokens of a part.
_PROGRAMS, _SPLITS, _LEAST = 256, 16, 64

#: The interpreter would multiply the bits of bfloat16 as integers, so there everything is widened first.
_WIDEN = not isinstance(attend_kernel, JITFunction)


def splits_of(rows: int, kv_heads: int) -> int:
    """Into how many parts each row's tokens are cut."""
    splits = 1
    while splits < _SPLITS and rows * kv_heads * splits * 2 <= _PROGRAMS:
        splits *= 2
    return splits


class TritonForm:
    """Every program takes one head of keys of one row, or a part of it."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: Rows,
        scores: Scores,
    ) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        steps, out = launches(query, key, value, keys, values, rows, scores)
        for launch in steps:
            launch.run()
        return out


def launches(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, rows: Rows, scores: Scores
) -> tuple[list[Launch], Tensor]:
    """What `attend` runs, in order, and where the result will be; all tensors contiguous."""
    count, heads, dim = query.shape
    page, kv_heads, value_dim = keys.shape[1], keys.shape[2], values.shape[3]
    splits = splits_of(count, kv_heads)
    out = query.new_empty(count, heads, value_dim)
    parts = lse = out
    if splits > 1:
        parts = query.new_empty(splits, count, heads, value_dim, dtype=torch.float32)
        lse = query.new_empty(splits, count, heads, dtype=torch.float32)
    sinks = query if scores.sinks is None else scores.sinks
    widths = (kv_heads * dim, kv_heads * value_dim)
    block = min(1024, _power(max(widths)))
    store = Launch(
        store_kernel,
        (count, -(-max(widths) // block), 1),
        {
            "keys_ptr": keys,
            "values_ptr": values,
            "key_ptr": key,
            "value_ptr": value,
            "slots_ptr": rows.slots,
            "stride_key": key.stride(0),
            "stride_value": value.stride(0),
        },
        {"KEY_WIDTH": widths[0], "VALUE_WIDTH": widths[1], "BLOCK": block},
        {"num_warps": 4},
    )
    block_d, block_v = max(16, _power(dim)), max(16, _power(value_dim))
    attend = Launch(
        attend_kernel,
        (count, kv_heads, splits),
        {
            "out_ptr": parts,
            "lse_ptr": lse,
            "query_ptr": query,
            "keys_ptr": keys,
            "values_ptr": values,
            "tables_ptr": rows.tables,
            "lengths_ptr": rows.lengths,
            "sinks_ptr": sinks,
            "stride_query": query.stride(0),
            "stride_table": rows.tables.stride(0),
            "scale": scores.scale,
            "softcap": scores.softcap or 1.0,
        },
        {
            "GROUP": heads // kv_heads,
            "KV_HEADS": kv_heads,
            "DIM": dim,
            "VALUE_DIM": value_dim,
            "PAGE": page,
            "WINDOW": scores.window or 0,
            "SOFTCAP": scores.softcap is not None,
            "SINKS": scores.sinks is not None,
            "SPLITS": splits,
            "LEAST": _LEAST,
            "BLOCK_G": max(16, _power(heads // kv_heads)),
            "BLOCK_D": block_d,
            "BLOCK_V": block_v,
            "BLOCK_N": 64 if query.itemsize * (block_d + block_v) <= 512 else 32,
            "WIDEN": _WIDEN,
        },
        {"num_warps": 4, "num_stages": 2},
    )
    if splits == 1:
        return [store, attend], out
    combine = Launch(
        combine_kernel,
        (count, heads, 1),
        {"out_ptr": out, "parts_ptr": parts, "lse_ptr": lse, "sinks_ptr": sinks},
        {
            "HEADS": heads,
            "VALUE_DIM": value_dim,
            "SINKS": scores.sinks is not None,
            "SPLITS": splits,
            "BLOCK_V": block_v,
        },
        {"num_warps": 2},
    )
    return [store, attend, combine], out


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()
