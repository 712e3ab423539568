"""First-order importance of every parameter of an adapter for a task: |∂L/∂θ · θ| (LoRACoE eq. 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loramux.adapters.importance.probes import Probes
from loramux.adapters.training.batches import Batch, by_length, collate
from loramux.adapters.training.chat import EncodedRow
from loramux.adapters.training.errors import OptionError
from loramux.adapters.training.frozen import replaced
from loramux.adapters.training.loop import token_losses


@dataclass(frozen=True, slots=True)
class Scores:
    """Importance of the factors of one linear module: `a [R, in]`, `bt [R, out]`, on the host."""

    a: Tensor
    bt: Tensor

    @property
    def ranks(self) -> Tensor:
        """Of each rank `[R]`: the sum over its row of A and its column of B."""
        return self.a.sum(1, dtype=torch.float64) + self.bt.sum(1, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Importance:
    """One task: the loss per answer token (nats), and the scores by the path of the module."""

    loss: float
    scores: Mapping[str, Scores]


def measure_importance(
    model: Any,
    probes: Probes,
    rows: Sequence[EncodedRow],
    *,
    pad_id: int,
    batch_tokens: int = 1024,
    each_row: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Importance:
    """Importance for the mean loss of the answer tokens of `rows`.

    Args:
        model: the frozen base; it is as before afterwards.
        probes: of the adapter, made for this base.
        each_row: take |∂L/∂θ · θ| of every row's own loss and average over the rows. Without it the loss is
            that of the whole task, as in the paper, and what rows want in opposite directions cancels.
        progress: called with how many rows are done.

    Raises:
        OptionError: no row has an answer.
    """
    kept = [row for row in rows if row.answer_start < len(row)]
    if not kept:
        raise OptionError("no row leaves room for an answer; raise max_tokens")
    parameters = [one for leaf in probes.leaves.values() for one in (leaf.a, leaf.bt)]
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    batches = list(_batches(kept, pad_id, 1 if each_row else batch_tokens))
    tokens = sum(batch.count for batch in batches)
    loss, done = 0.0, 0
    with replaced(model, probes.modules):
        for batch in batches:
            whole = token_losses(model, batch).sum()
            # A row's own loss is its mean; all rows count the same.
            divisor = batch.count * len(batches) if each_row else tokens
            gradients = torch.autograd.grad(whole / divisor, parameters, allow_unused=True)
            loss += float(whole.detach())
            for total, parameter, gradient in zip(sums, parameters, gradients, strict=True):
                if gradient is not None:  # an expert that no token of the batch went to has none
                    total += (gradient * parameter.detach()).abs() if each_row else gradient
            done += len(batch.ids)
            progress(done)
    if not each_row:
        sums = [(s * p.detach()).abs() for s, p in zip(sums, parameters, strict=True)]
    found = iter(one.cpu() for one in sums)
    return Importance(loss / tokens, {path: Scores(next(found), next(found)) for path in probes.leaves})


def _batches(rows: Sequence[EncodedRow], pad_id: int, batch_tokens: int) -> Iterator[Batch]:
    for group in by_length(rows, batch_tokens):
        yield collate(group, pad_id, answers_only=True)
