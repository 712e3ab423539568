"""What an edge knows of the experts and sparse models that its replicas hold: everything but the numbers."""

from collections.abc import Iterable
from typing import Any

import torch

from loramux.adapters.lora import FactorStack, LoraAdapter
from loramux.adapters.sparse.kind import Kind
from loramux.adapters.sparse.shelf import SparseCard

Json = dict[str, Any]


def outlines(adapters: Iterable[LoraAdapter]) -> Json:
    """Adapters without their factors. Module names, which many adapters share, are there once."""
    modules: dict[tuple[str, ...], int] = {}
    found = []
    for adapter in adapters:
        stacks = [
            [
                modules.setdefault(stack.modules, len(modules)),
                *stack.shape,
                stack.rank,
                str(stack.a.dtype).removeprefix("torch."),
            ]
            for stack in adapter.stacks
        ]
        found.append([adapter.id, adapter.content_hash, stacks])
    return {"modules": list(modules), "adapters": found}


def outlined(body: Json) -> list[LoraAdapter]:
    """Adapters whose tensors have shapes and no numbers."""
    modules = [tuple(names) for names in body["modules"]]
    return [
        LoraAdapter.from_stacks(id, content, [_stack(modules, *stack) for stack in stacks])
        for id, content, stacks in body["adapters"]
    ]


def _stack(
    modules: list[tuple[str, ...]], which: int, n_out: int, n_in: int, rank: int, dtype: str
) -> FactorStack:
    names, kind = modules[which], getattr(torch, dtype)
    a = torch.empty(len(names), rank, n_in, dtype=kind, device="meta")
    bt = torch.empty(len(names), rank, n_out, dtype=kind, device="meta")
    return FactorStack(names, a, bt, (1.0,) * len(names))


def card_body(card: SparseCard) -> Json:
    """A sparse model's card."""
    return {
        "id": card.id,
        "kind": str(card.kind),
        "content_hash": card.content_hash,
        "rank": card.rank,
        "modules": card.modules,
        "nbytes": card.nbytes,
        "summary": dict(card.summary),
    }


def card_of(body: Json) -> SparseCard:
    """The card again."""
    return SparseCard(**{**body, "kind": Kind(body["kind"])})
