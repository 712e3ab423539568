"""A feed-forward block taken apart, and the experts' factors laid out for the operator."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loramux.kernels import pointwise
from loramux.kernels.mixlora_ffn.activations import SILU, activation_code

Linear = Callable[[Tensor], Tensor]


class Factors(Protocol):
    """The experts of one projection: delta W_e = scale * b[e] @ a[e], a [E, r, in], b [E, out, r]."""

    @property
    def a(self) -> Tensor: ...
    @property
    def b(self) -> Tensor: ...
    @property
    def scale(self) -> float: ...


class Combine(Protocol):
    """What is between the first projections and the last."""

    @property
    def activation(self) -> Linear: ...
    def __call__(self, parts: Sequence[Tensor]) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Gated:
    """`activation(gate) * up` for (gate, up)."""

    activation: Linear

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        gate, up = parts
        # As a block computes it that `server/engine/lean.py` has changed: a token may meet either.
        if activation_code(self.activation) == SILU and pointwise.takes(gate, up):
            return pointwise.swiglu_(gate.clone(), up.contiguous())
        return self.activation(gate) * up


@dataclass(frozen=True, eq=False)
class Halves:
    """`activation(gate) * up` for one tensor that holds gate, then up."""

    activation: Linear

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        gate, up = parts[0].chunk(2, dim=-1)
        return self.activation(gate) * up


@dataclass(frozen=True, eq=False)
class Plain:
    """`activation(x)` for the one tensor there is."""

    activation: Linear

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        return self.activation(parts[0])


@dataclass(frozen=True, eq=False)
class Ffn:
    """The base's block: `last(activate([linear(x) for linear in first]))`.

    Attributes:
        first: the projections that read the block's input, by name, in the order `activate` takes them.
        last: name of the projection that writes the block's output, and itself.
        bias: of `last`, `[hidden]`, if it has one.
    """

    first: Mapping[str, Linear]
    last: tuple[str, Linear]
    activate: Combine
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.last[1](self.activate([linear(x) for linear in self.first.values()]))


@dataclass(frozen=True, eq=False)
class Spread:
    """The second factors of a projection that reads the block's input.

    Attributes:
        columns: where its rows lie in the stacked first factors: expert e and rank j at e * rank + j.
        bt: `[E, r, out]`, scale folded in.
    """

    columns: slice
    bt: Tensor


@dataclass(frozen=True, eq=False)
class Experts:
    """The experts of one block in the layout that the operator reads.

    Attributes:
        count: E.
        shrink: `[R, hidden]`: the first factors of all projections that read the block's input, stacked so
            that one product serves them all; `None` if there are none.
        first: by the name of the projection; one that is missing has no delta.
        last_a: `[E, r, ffn]` of the projection that writes the output, or `None`.
        last_bt: `[E * r, hidden]`, scale folded in.
    """

    count: int
    shrink: Tensor | None
    first: Mapping[str, Spread]
    last_a: Tensor | None
    last_bt: Tensor | None

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the factors; `None` where there are none."""
        return next((tensor.dtype for tensor in self._tensors()), None)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        for tensor in (
            self.shrink,
            self.last_a,
            self.last_bt,
            *(spread.bt for spread in self.first.values()),
        ):
            if tensor is not None:
                yield tensor

    @classmethod
    def prepare(
        cls,
        count: int,
        projections: Mapping[str, Factors],
        last: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "Experts":
        """Lay out factors; `last` names the projection that writes the block's output.

        Raises:
            ValueError: a projection has another number of experts than `count`.
        """
        for name, factors in projections.items():
            if factors.a.shape[0] != count or factors.b.shape[0] != count:
                raise ValueError(
                    f"{name} has factors of {factors.a.shape[0]} experts, the router has {count}"
                )
        stacked, first, at = [], {}, 0
        for name, factors in projections.items():
            if name != last:
                stacked.append(factors.a.to(device, dtype).flatten(0, 1))
                columns = slice(at, at + stacked[-1].shape[0])
                first[name] = Spread(columns, _spread(factors).to(device, dtype))
                at = columns.stop
        final = projections.get(last)
        return cls(
            count,
            torch.cat(stacked) if stacked else None,
            first,
            None if final is None else final.a.to(device, dtype).contiguous(),
            None if final is None else _spread(final).to(device, dtype).flatten(0, 1),
        )


def _spread(factors: Factors) -> Tensor:
    """B transposed with the scale in it, `[E, r, out]`, rounded once."""
    wide = torch.promote_types(factors.b.dtype, torch.float32)
    return (factors.b.mT.to(wide) * factors.scale).contiguous()
