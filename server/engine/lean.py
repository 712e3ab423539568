"""Fewer calls a step: norms, rotary embeddings and gated activations of a base on the CPU as one call each.

Modules stay where they are; those that do what one of our kernels does get a `forward` of their own. Whether
they do is not told by their names but tried with random numbers, so that families need no list, and one that
differs keeps its own code.
"""

import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from loramux.kernels.pointwise import library, rms_norm, rotate_, swiglu_

ROTARY = "apply_rotary_pos_emb"


@torch.no_grad()
def make_lean(model: nn.Module) -> int:
    """Replace what can be replaced in a frozen float32 model on the CPU; returns how many modules.

    The outputs may differ in the last bits. Gradients do not flow through the replaced parts.
    """
    if library() is None:
        return 0
    count = 0
    for module in model.modules():
        made = _norm(module) or _feed_forward(module) or _attention(module)
        if made is not None:
            module.forward = made
            count += 1
    return count


def _norm(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    found = norm_factor(module)
    if found is None:
        return None
    factor, epsilon = found
    return lambda x: rms_norm(x, factor, epsilon)


def norm_factor(module: nn.Module) -> tuple[Tensor, float] | None:
    """What an RMSNorm multiplies by, float32 [width], and its epsilon; `None` for any other module.

    It is the module's weight or, as Gemma has it, one more.
    """
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" not in type(module).__name__ or not isinstance(epsilon, float):
        return None
    if not isinstance(weight, Tensor) or weight.dim() != 1 or weight.dtype != torch.float32:
        return None
    x = 3 * torch.randn(3, weight.shape[0])
    for factor in (weight.detach(), weight.detach() + 1):
        factor = factor.contiguous()
        if _equal(rms_norm(x, factor, epsilon), module(x)):
            return factor, epsilon
    return None


def _feed_forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """`down(silu(gate(x)) * up(x))`; the projections are looked up in every call, for adapters take their
    places."""
    names = ("gate_proj", "up_proj", "down_proj")
    if not all(isinstance(getattr(module, name, None), nn.Linear) for name in names):
        return None

    def forward(x: Tensor) -> Tensor:
        gate = module.gate_proj(x)  # type: ignore[operator]
        y: Tensor = module.down_proj(swiglu_(gate, module.up_proj(x)))  # type: ignore[operator]
        return y

    x = torch.randn(3, module.gate_proj.in_features)  # type: ignore[union-attr,arg-type]
    return forward if _equal(forward(x), module(x)) else None


def _attention(module: nn.Module) -> Callable[..., Any] | None:
    """The module's own forward, which finds our rotary embedding under the name of the family's.

    Every call looks whether ours takes what it is given, and else leaves it to the family's.
    """
    forward = inspect.unwrap(type(module).forward)
    if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names:
        return None
    made = _with_our_rotary(forward)
    return None if made is None else MethodType(made, module)


@cache
def _with_our_rotary(forward: FunctionType) -> FunctionType | None:
    theirs = forward.__globals__.get(ROTARY)
    if theirs is None or not _rotates_halves(theirs):
        return None

    def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any) -> Any:
        if rest or options or not _rotatable(q, cos, sin) or not _rotatable(k, cos, sin):
            return theirs(q, k, cos, sin, *rest, **options)
        cos, sin = cos[0].contiguous(), sin[0].contiguous()
        q, k = (rotate_(x[0].transpose(0, 1).contiguous(), cos, sin) for x in (q, k))
        return q.transpose(0, 1)[None], k.transpose(0, 1)[None]

    made = FunctionType(
        forward.__code__,
        {**forward.__globals__, ROTARY: ours},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _rotatable(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether x is [1, heads, tokens, dim] and cos and sin are [1, tokens, dim]: the same for any number of
    tokens."""
    return (
        x.shape[0] == 1
        and x.dtype == cos.dtype == torch.float32
        and cos.shape == sin.shape == (1, x.shape[2], x.shape[3])
        and not x.requires_grad
    )


def _rotates_halves(theirs: Callable[..., Any]) -> bool:
    """Whether a family's function is the usual one."""
    q, k = torch.randn(1, 3, 4, 16), torch.randn(1, 2, 4, 16)
    cos, sin = torch.randn(2, 1, 4, 16)
    try:
        expected = theirs(q, k, cos, sin)
    except (TypeError, RuntimeError, ValueError, IndexError):
        return False
    found = [rotate_(x[0].transpose(0, 1).contiguous(), cos[0], sin[0]).transpose(0, 1) for x in (q, k)]
    return all(_equal(a, b[0]) for a, b in zip(found, expected, strict=True))


def _equal(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
