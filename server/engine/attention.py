"""Attention over a packed batch, one request at a time: what a CPU does best without a varlen kernel.

The stock SDPA path masks one dense block of all queries against all keys of the batch, so that sixteen
requests pay for sixteen times the keys they need. Here each request sees its own keys only, grouped-query
heads stay grouped, and no mask is built for a decode step or a whole prompt.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PER_REQUEST = "loramux_per_request"


def per_request_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - the interface passes it; here every request is causal
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Update the paged cache, then attend request by request.

    Shapes: query [1, heads, Q, dim], key and value [1, kv heads, Q, dim], packed over the batch's requests;
    the result is [1, Q, heads, dim].

    Raises:
        ValueError: for attention sinks, which this form does not compute, or without a paged cache.
    """
    if kwargs.get("s_aux") is not None or getattr(module, "sinks", None) is not None:
        raise ValueError(
            f"{type(module).__name__} uses attention sinks, which are not supported on this device"
        )
    cache = kwargs.get("cache")
    if cache is None:
        raise ValueError(f"the attention {PER_REQUEST!r} works on a paged cache only")
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    q_bounds = kwargs["cu_seq_lens_q"].tolist()
    k_bounds = kwargs["cu_seq_lens_k"].tolist()
    window = kwargs.get("sliding_window")
    softcap = kwargs.get("softcap")
    out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    for q0, q1, k0, k1 in zip(q_bounds, q_bounds[1:], k_bounds, k_bounds[1:], strict=False):
        part = _attend(query[:, :, q0:q1], key[:, :, k0:k1], value[:, :, k0:k1], scaling, window, softcap)
        out[:, q0:q1] = part.transpose(1, 2)
    return out, None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention of the last queries of one request over all its keys, [1, heads, q, dim]."""
    n_q, n_k = query.shape[2], key.shape[2]
    windowed = window is not None and n_k > window
    if softcap is not None:
        return _soft_capped(query, key, value, scaling, _visible(n_q, n_k, window, query.device), softcap)
    if n_q == 1 and not windowed:
        # One query token: fold the group of query heads into the query axis, so that keys are read once.
        kv_heads = key.shape[1]
        grouped = query.reshape(1, kv_heads, -1, query.shape[-1])
        return scaled_dot_product_attention(grouped, key, value, scale=scaling).reshape(
            1, query.shape[1], 1, value.shape[-1]
        )
    if n_q == n_k and not windowed:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    mask = _visible(n_q, n_k, window, query.device)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)


def _visible(n_q: int, n_k: int, window: int | None, device: torch.device) -> Tensor:
    """Boolean [q, k]: key j is visible to query i when it is not later, and not out of the window."""
    positions = torch.arange(n_k - n_q, n_k, device=device)[:, None]
    keys = torch.arange(n_k, device=device)[None, :]
    visible = keys <= positions
    if window is not None:
        visible &= keys > positions - window
    return visible


def _soft_capped(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, visible: Tensor, softcap: float
) -> Tensor:
    """Scores squashed to ±softcap before the softmax (Gemma 2), which SDPA does not offer."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value


AttentionInterface.register(PER_REQUEST, per_request_attention)
