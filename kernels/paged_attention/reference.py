"""The operator as its formula reads."""

import torch
from torch import Tensor

from loramux.kernels.paged_attention.rows import Rows, Scores, store_


def paged_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, rows: Rows, scores: Scores
) -> Tensor:
    """Store the new tokens, then attend row by row; shapes as `Form.attend` has them."""
    store_(keys, values, key, value, rows.slots)
    page = keys.shape[1]
    out = query.new_empty(*query.shape[:2], value.shape[-1])
    for row, length in enumerate(rows.lengths.tolist()):
        at = torch.arange(length, device=query.device)
        if scores.window is not None:
            at = at[-scores.window :]
        pages = rows.tables[row].long()[at // page]
        out[row] = attention_reference(
            query[row : row + 1], keys[pages, at % page], values[pages, at % page], scores
        )
    return out


def attention_reference(query: Tensor, keys: Tensor, values: Tensor, scores: Scores) -> Tensor:
    """Causal attention of the last q tokens of a sequence over all its n: query [q, heads, dim], keys and
    values [n, kv heads, dim]; the result is [q, heads, value dim]."""
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    logits = torch.einsum("qhd,nhd->hqn", query, keys) * scores.scale
    if scores.softcap is not None:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    logits = logits.masked_fill(
        ~visible(query.shape[0], keys.shape[0], scores.window, query.device), float("-inf")
    )
    if scores.sinks is not None:
        sinks = scores.sinks.to(logits.dtype).view(-1, 1, 1).expand(-1, logits.shape[1], 1)
        logits = torch.cat([logits, sinks], dim=-1)
    weights = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    weights = weights[..., : keys.shape[0]].to(values.dtype)
    return torch.einsum("hqn,nhd->qhd", weights, values)


def visible(q: int, n: int, window: int | None, device: torch.device) -> Tensor:
    """Boolean [q, n]: token j is visible to the i-th of the last q when it is not later, and not out of the
    window."""
    positions = torch.arange(n - q, n, device=device)[:, None]
    tokens = torch.arange(n, device=device)[None, :]
    seen = tokens <= positions
    if window is not None:
        seen &= tokens > positions - window
    return seen
