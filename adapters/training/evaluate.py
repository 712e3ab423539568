"""Loss per token of a model on rows it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from loramux.adapters.training.batches import by_length, collate
from loramux.adapters.training.chat import EncodedRow
from loramux.adapters.training.errors import OptionError
from loramux.adapters.training.loop import token_losses


def loss_per_token(
    model: Any,
    rows: Sequence[EncodedRow],
    *,
    pad_id: int,
    answers_only: bool = True,
    batch_tokens: int = 4096,
) -> float:
    """Mean cross entropy in nats over all counted tokens of the rows: every token weighs the same.

    Raises:
        OptionError: no row has a token to count.
    """
    total, count = 0.0, 0
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for rows_of_batch in by_length(rows, batch_tokens):
                batch = collate(rows_of_batch, pad_id, answers_only)
                if batch.count:
                    total += float(token_losses(model, batch).double().sum())
                    count += batch.count
    finally:
        model.train(training)
    if count == 0:
        raise OptionError("no row leaves an answer token to measure; raise max_tokens")
    return total / count
