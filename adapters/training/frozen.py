"""A frozen base while something is trained on it: which modules it has, and others put in their places."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from loramux.adapters.training.errors import OptionError

_BLOCK = re.compile(r"(?:.*\.)?layers\.\d+\.(self_attn|mlp)")


def blocks(model: nn.Module, kind: str) -> dict[str, nn.Module]:
    """Every block of one kind, `self_attn` or `mlp`, by module path, in the order of the layers."""
    return {
        name: module
        for name, module in model.named_modules()
        if (match := _BLOCK.fullmatch(name)) and match.group(1) == kind
    }


def linears(model: nn.Module, kind: str, targets: Sequence[str] | None) -> dict[str, nn.Linear]:
    """The linear modules of all blocks of one kind by path; `targets` narrows them down by last name."""
    return {
        f"{path}.{name}": child
        for path, block in blocks(model, kind).items()
        for name, child in block.named_children()
        if isinstance(child, nn.Linear) and (targets is None or name in targets)
    }


def check_targets(model: nn.Module, targets: Sequence[str] | None, kinds: Sequence[str]) -> None:
    """Refuse targets that are not linear modules of these kinds of block, and bases without such blocks.

    Raises:
        OptionError: naming the targets.
    """
    known = {path.rpartition(".")[2] for kind in kinds for path in linears(model, kind, None)}
    if not known:
        raise OptionError(
            f"{type(model).__name__} has no linear modules in layers.N.{' or layers.N.'.join(kinds)}; "
            "train a plain LoRA on it"
        )
    missing = sorted(set(targets or ()) - known)
    if missing:
        raise OptionError(
            f"the base has no module called {', '.join(missing)}; it has {', '.join(sorted(known))}"
        )


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put modules in the places of others by path; the others are back when the context ends."""
    before: list[tuple[Any, str, nn.Module]] = []
    try:
        for path, module in modules.items():
            parent_path, _, name = path.rpartition(".")
            parent = model.get_submodule(parent_path)
            before.append((parent, name, getattr(parent, name)))
            setattr(parent, name, module.to(_device(before[-1][2])).train(model.training))
        yield
    finally:
        for parent, name, module in reversed(before):
            setattr(parent, name, module)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
