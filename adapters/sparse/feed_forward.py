"""A base's feed-forward blocks taken apart, and what a MixLoRA model does to one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from loramux.adapters.errors import BaseMismatchError
from loramux.adapters.sparse.model import FfnRouting, FfnStrategy, MixtureFfn
from loramux.adapters.sparse.tally import Tally
from loramux.kernels.gated_lora.plain import shrink
from loramux.kernels.mixlora_ffn import (
    Combine,
    Experts,
    Ffn,
    Gated,
    Halves,
    Plain,
    Routes,
    probabilities,
    switch,
    top_k,
    top_p,
)

#: Projections that write a block's output.
LAST = ("down_proj", "fc2")

#: (projections that read the input, projection that writes the output, how the former are combined)
_FORMS: tuple[tuple[tuple[str, ...], str, Callable[[nn.Module], Combine]], ...] = (
    (("gate_proj", "up_proj"), "down_proj", Gated),  # llama, mistral, qwen2, qwen3, gemma, gemma2
    (("gate_up_proj",), "down_proj", Halves),  # phi3
    (("fc1",), "fc2", Plain),  # phi
)


def take_apart(block: nn.Module, path: str, *, activation: str | None = None, bare: bool = False) -> Ffn:
    """The projections of a block and what is between them.

    Args:
        activation: by its name in transformers; `None` is the block's own.
        bare: leave out what adapter layers put around the projections.

    Raises:
        BaseMismatchError: the block is of no known form, or there is no such activation.
    """
    first, last, combine = _form(block, path)
    linears = {name: block.get_submodule(name) for name in (*first, last)}
    inner = {name: _bare(linear) for name, linear in linears.items()}
    used = inner if bare else linears
    return Ffn(
        {name: used[name] for name in first},
        (last, used[last]),
        combine(_activation(block, path, activation)),
        getattr(inner[last], "bias", None),
    )


def _form(block: nn.Module, path: str) -> tuple[tuple[str, ...], str, Callable[[nn.Module], Combine]]:
    children = {name for name, _ in block.named_children()}
    for form in _FORMS:
        if children.issuperset((*form[0], form[1])):
            return form
    known = "; ".join(", ".join((*first, last)) for first, last, _ in _FORMS)
    raise BaseMismatchError(f"{path} ({type(block).__name__}) has none of the known forms: {known}")


def _bare(linear: nn.Module) -> nn.Module:
    inner = getattr(linear, "base", linear)
    return inner if isinstance(inner, nn.Module) else linear


def _activation(block: nn.Module, path: str, name: str | None) -> nn.Module:
    if name is None:
        own = getattr(block, "act_fn", None) or getattr(block, "activation_fn", None)
        if own is None:
            raise BaseMismatchError(f"{path} ({type(block).__name__}) has neither act_fn nor activation_fn")
        found: nn.Module = own
        return found
    if name not in ACT2FN:
        raise BaseMismatchError(f"{path}: transformers has no activation {name!r}")
    made: nn.Module = ACT2FN[name]
    return made


@dataclass(frozen=True, eq=False)
class PlacedFfn:
    """MixLoRA at one block, on the device.

    Attributes:
        router: `[E, hidden]` float32.
        activation: as in `MixtureFfn`.
        projections: the names of those that have experts.
    """

    router: Tensor
    experts: Experts
    routing: FfnRouting
    activation: str | None
    projections: tuple[str, ...]
    tally: Tally

    @classmethod
    def place(
        cls, mixture: MixtureFfn, tally: Tally, device: torch.device | str, dtype: torch.dtype
    ) -> "PlacedFfn":
        """Copy and lay out a mixture.

        Raises:
            ValueError: a projection has another number of experts than the router.
        """
        last = next((name for name in LAST if name in mixture.projections), LAST[0])
        return cls(
            mixture.router.to(device, torch.float32),
            Experts.prepare(mixture.experts, mixture.projections, last, device=device, dtype=dtype),
            mixture.routing,
            mixture.activation,
            tuple(mixture.projections),
            tally,
        )

    @property
    def nbytes(self) -> int:
        return self.router.nbytes + self.experts.nbytes

    def check(self, block: nn.Module, path: str) -> None:
        """See whether the block has the projections that the experts change.

        Raises:
            BaseMismatchError: it has not.
        """
        ffn = take_apart(block, path, activation=self.activation)
        names = {*ffn.first, ffn.last[0]}
        if unknown := sorted(set(self.projections) - names):
            raise BaseMismatchError(f"{path}: the base's block has no {unknown[0]}, it has {sorted(names)}")

    def route(self, x: Tensor, lengths: Sequence[int]) -> Routes:
        """Who serves which token of x [T, hidden]; `lengths` are the tokens of each request, in order."""
        p = probabilities(shrink(x.float(), self.router))
        how = self.routing
        if how.strategy is FfnStrategy.TOP_K:
            routes = top_k(p, how.top_k)
        elif how.strategy is FfnStrategy.TOP_P:
            routes = top_p(p, how.top_p, how.temperature)
        else:
            routes = switch(p, how.capacity, lengths)
        self.tally.add(routes.chosen, p)
        return routes
