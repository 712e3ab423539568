"""`y = x Wᵀ + b` by oneDNN: with W laid out once for the processor, or as it is.

A product of a few tokens with a large matrix is what decoding consists of. oneDNN's own layout of the matrix
makes it one and a half to two times as fast in float32 as the plain one. For the many tokens of a prompt the
layout no longer matters, and the library does: on some processors torch's own product takes twice as long
(docs/log.md).
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: The number of tokens the layout is chosen for; it is right for any other number too.
TOKENS = 16
#: oneDNN compiles a product for every number of tokens, in 0.3 ms and 0.6 MB: there are fewer numbers so.
_MULTIPLE = 16


def can_pack(weight: Tensor) -> bool:
    """Whether there is a layout for this weight: dense float32 on a CPU that oneDNN knows."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.layout == torch.strided
        and _is_there()
    )


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, float32 [..., rows], of many tokens [..., columns] and a matrix [rows, columns] on the CPU,
    plain or in oneDNN's layout."""
    if not _is_there():
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    tokens = len(flat)
    if missing := -tokens % _MULTIPLE:
        flat = F.pad(flat, (0, 0, 0, missing))
    return _product(flat, weight, bias)[:tokens].view(*x.shape[:-1], len(weight))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


@cache
def _is_there() -> bool:
    found: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return found


class PackedLinear(nn.Linear):
    """A frozen linear layer in oneDNN's layout. Its weight still tells shape and dtype, but not its
    elements."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), TOKENS)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias
        self._packed = [packed]  # without the look-up of a parameter, which costs a microsecond a call

    def forward(self, x: Tensor) -> Tensor:
        product = _product if x.numel() <= TOKENS * self.in_features else multiply
        return product(x, self._packed[0], self.bias)


class DirectLinear(nn.Linear):
    """A frozen linear layer that oneDNN multiplies with its weight as it lies, which may be a mapped file: a
    layout would be another copy."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return multiply(x, self.weight, self.bias)


def direct_linears(model: nn.Module) -> int:
    """Make every linear layer of a frozen float32 model on the CPU a `DirectLinear`; returns how many."""
    found = list(_linears(model))
    for parent, name, linear in found:
        setattr(parent, name, DirectLinear(linear))
    return len(found)


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Linear layers that oneDNN can multiply: the module that has each, its name there, and the layer."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear and can_pack(child.weight):
                yield parent, name, child


def pack_linears(model: nn.Module) -> int:
    """Replace every linear layer of a frozen model that has a weight of its own; returns how many.

    A weight that something else uses too (tied embeddings) stays as it is: packing it would keep it twice.
    """
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    found = [place for place in _linears(model) if uses[id(place[2].weight)] == 1]
    count = len(found)
    while found:  # each gives up its plain weight before the next one is laid out
        parent, name, linear = found.pop()
        setattr(parent, name, PackedLinear(linear))
    return count
