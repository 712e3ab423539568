"""Merging: several weighted LoRA adapters become one, by a named method, with its error told.

Works on raw factors only. Nothing here forms a dense delta W or touches the base.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from loramux.adapters.blend import MethodOptions, resolve_method
from loramux.adapters.errors import BlendError
from loramux.adapters.lora import FactorStack, LoraAdapter
from loramux.adapters.merge import factorwise
from loramux.adapters.merge.exact import concatenate
from loramux.adapters.merge.joint import JointStack, join
from loramux.adapters.merge.measure import relative_error
from loramux.adapters.merge.svd import truncate

Parts = Sequence[tuple[LoraAdapter, float]]


class Merged(NamedTuple):
    """The result of a merge.

    Attributes:
        adapter: one adapter that stands for all parts; its content hash covers parts, weights and method.
        relative_error: Frobenius norm of its distance from the exact weighted sum, over the norm of the sum.
        rank: its largest rank.
    """

    adapter: LoraAdapter
    relative_error: float
    rank: int


def merge(
    blend_parts: Parts,
    method: str = "exact",
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    compute_dtype: torch.dtype = torch.float32,
) -> Merged:
    """Merge adapters into one.

    | method | result |
    |---|---|
    | `exact` | the weighted sum of deltas, by rank concatenation; error 0 up to the storage type |
    | `svd` | the best approximation of it by rank `rank` (default: the largest rank among the parts) |
    | `linear` | A's and B's summed apart, each with the square root of the weight; has cross terms |
    | `magnitude_prune` | `linear` after keeping the largest `density` of the entries of each factor |
    | `dare_linear` | `linear` after dropping entries at random (`density`, `seed`) |
    | `ties`, `dare_ties` | prune as above, elect a sign per entry, average those that agree |

    One adapter alone gives itself back times its weight, whatever the method, unless `rank` truncates it.
    Parts of weight zero take no part. Differing target sets are merged module by module among the adapters
    that have the module. Mixed ranks work for `exact` and `svd`; scales (alpha, rsLoRA, patterns) for all.

    Args:
        blend_parts: (adapter, weight); weights may be negative.
        method: see the table.
        rank, density, seed: options, see `resolve_method`.
        compute_dtype: type of the element-wise methods. `svd` and the error always use float64, on matrices
            of rank size and on factors a few modules at a time.

    Returns:
        Factors in the widest type of the parts, on their device.

    Raises:
        BlendError: no part with a weight, a weight that is not finite, unknown method, bad options, parts
            that do not fit together.
    """
    parts = [(adapter, float(weight)) for adapter, weight in blend_parts if weight != 0.0]
    for adapter, weight in parts:
        if not math.isfinite(weight):
            raise BlendError(f"adapter {adapter.id!r}: weight {weight!r} is not a finite number")
    if not parts:
        raise BlendError("nothing to merge: no adapter has a weight other than zero")
    options = resolve_method(method, len(parts), rank=rank, density=density, seed=seed)
    joints = join(parts)
    stacks = [_merger(options, parts, compute_dtype)(joint) for joint in joints]
    error = 0.0 if options.method == "exact" else relative_error(joints, stacks)
    names = "+".join(adapter.id for adapter, _ in parts)
    adapter = LoraAdapter.from_stacks(
        f"{options.method}({names})", _content_hash(parts, options), stacks, {"method": options.method}
    )
    return Merged(adapter, error, adapter.max_rank)


def _merger(options: MethodOptions, parts: Parts, dtype: torch.dtype) -> Callable[[JointStack], FactorStack]:
    """The function that merges one joint stack by the chosen method."""
    if options.method == "exact":
        return concatenate
    if options.method == "svd":
        limit = options.rank or max(adapter.max_rank for adapter, _ in parts)
        return lambda joint: truncate(joint, limit)
    hashes = [adapter.content_hash for adapter, _ in parts]
    density, seed = options.density or 1.0, options.seed or 0
    prune = {
        "linear": lambda _modules: factorwise.keep_all,
        "ties": factorwise.keep_largest(density),
        "magnitude_prune": factorwise.keep_largest(density),
        "dare_linear": factorwise.keep_random(density, seed, hashes),
        "dare_ties": factorwise.keep_random(density, seed, hashes),
    }[options.method]
    combine = factorwise.elect if options.method.endswith("ties") else factorwise.add
    return lambda joint: factorwise.merge_factors(joint, parts, prune(joint.modules), combine, dtype)


def _content_hash(parts: Parts, options: MethodOptions) -> str:
    described = {
        "parts": sorted((adapter.content_hash, weight) for adapter, weight in parts),
        "method": list(options),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
