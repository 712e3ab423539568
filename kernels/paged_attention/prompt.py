"""Attention of a piece of one prompt over all that came before it."""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from loramux.kernels.paged_attention.reference import attention_reference, visible
from loramux.kernels.paged_attention.rows import Scores

#: Up to so many tokens the heads of a group are taken together: beyond, it is no faster (docs/log.md).
FOLDED = 128


def prompt_attention(query: Tensor, keys: Tensor, values: Tensor, scores: Scores) -> Tensor:
    """Causal attention of the last q tokens of a sequence over all its n tokens.

    No mask is made for a whole prompt and for a single token; a later piece has one of its own, [q, n].

    Args:
        query: [q, heads, dim].
        keys, values: [n, kv heads, dim]; of a windowed layer, the first may be missing.

    Returns:
        [q, heads, value dim].
    """
    if scores.softcap is not None or scores.sinks is not None:  # scaled_dot_product_attention has neither
        return attention_reference(query, keys, values, scores)
    q, n = query.shape[0], keys.shape[0]
    windowed = scores.window is not None and n > scores.window
    keys, values = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
    if q == 1 and not windowed:
        # The group of query heads becomes the query axis, so that keys are read once.
        grouped = query.reshape(1, keys.shape[1], -1, query.shape[-1])
        out = scaled_dot_product_attention(grouped, keys, values, scale=scores.scale)
        return out.reshape(1, query.shape[1], -1)
    mask = None if q == n and not windowed else visible(q, n, scores.window, query.device)
    group = query.shape[1] // keys.shape[1]
    if mask is not None and group > 1 and q <= FOLDED and not query.is_cuda:
        # As above, with the mask for each head of the group: otherwise torch copies the keys for each of
        # them.
        heads = query.reshape(q, -1, group, query.shape[-1]).permute(1, 2, 0, 3).flatten(1, 2).unsqueeze(0)
        folded = mask.repeat(group, 1)
        out = scaled_dot_product_attention(heads, keys, values, attn_mask=folded, scale=scores.scale)
        return out.view(-1, group, q, out.shape[-1]).permute(2, 0, 1, 3).flatten(1, 2)
    out = scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0), keys, values,
        attn_mask=mask, is_causal=mask is None, scale=scores.scale, enable_gqa=True,
    )  # fmt: skip
    return out[0].transpose(0, 1)
