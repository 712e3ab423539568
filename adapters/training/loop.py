"""The one training loop, shared by bases, experts and sparse models."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from loramux.adapters.training import checkpoint
from loramux.adapters.training.batches import IGNORED, Batch, Batches
from loramux.adapters.training.compute import computing
from loramux.adapters.training.errors import DivergedError, OptionError
from loramux.adapters.training.progress import Ticker

_SMOOTHING = 0.95
_SEED_STRIDE = 1_000_003


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """When to stop and how the learning rate moves.

    The rate rises linearly over the first `warmup` of the run and falls linearly to zero over the last
    `decay` of it. How far the run is means steps over `max_steps` or seconds over `max_minutes`, whichever is
    further, so that a run bounded by the clock still ends with its decay finished.
    """

    max_steps: int | None
    max_minutes: float | None
    warmup: float = 0.03
    decay: float = 0.7
    clip: float = 1.0
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        if self.max_steps is None and self.max_minutes is None:
            raise OptionError("a training run needs max_steps or max_minutes")
        if (self.max_steps is not None and self.max_steps < 1) or (
            self.max_minutes is not None and self.max_minutes <= 0
        ):
            raise OptionError("max_steps must be at least 1 and max_minutes above 0")

    def fraction(self, step: int, seconds: float) -> float:
        """How much of the run is done, 0 to 1."""
        by_step = step / self.max_steps if self.max_steps is not None else 0.0
        by_clock = seconds / (60.0 * self.max_minutes) if self.max_minutes is not None else 0.0
        return min(1.0, max(by_step, by_clock))

    def rate(self, fraction: float) -> float:
        """The learning rate at a fraction of the run, relative to its peak."""
        rise = min(1.0, (fraction + 1e-3) / self.warmup) if self.warmup > 0 else 1.0
        fall = min(1.0, (1.0 - fraction) / self.decay) if self.decay > 0 else 1.0
        return min(rise, fall)


def token_losses(model: Any, batch: Batch) -> Tensor:
    """Cross entropy in nats of every target that counts, in row order: (batch.count,), float32 or wider.

    The output matrix, a large part of a small model's work, sees only the hidden states in front of a counted
    target; whatever the model does to its logits afterwards (soft caps, scales) stays in place.
    """
    ids = batch.ids.to(model.device)
    counted = (batch.targets != IGNORED).to(model.device)

    def select(_head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][counted],)

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        with computing(model):
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    targets = batch.targets.to(model.device)[counted]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return cross_entropy(logits.to(wide), targets, reduction="none")


Penalty = Callable[[Batch], Tensor]


def _step(
    model: Any,
    optimisers: Sequence[torch.optim.Optimizer],
    batches: Sequence[Batch],
    clip: float,
    penalty: Penalty | None,
) -> tuple[float, int]:
    """One optimiser step; mean loss per token, without penalty, and the number of tokens it is a mean
    over."""
    count = sum(batch.count for batch in batches)
    if count == 0:
        return float("nan"), 0
    total = 0.0
    for batch in batches:
        if batch.count:
            loss = token_losses(model, batch).sum() / count
            total += float(loss.detach())
            if penalty is not None:
                loss = loss + penalty(batch) * (batch.count / count)
            loss.backward()  # type: ignore[no-untyped-call]
    parameters = [p for o in optimisers for group in o.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, clip)
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return total, count


def train(
    model: Any,
    optimisers: Sequence[torch.optim.Optimizer],
    batches: Batches,
    options: LoopOptions,
    *,
    state_file: Path,
    fingerprint: str,
    label: str,
    on_checkpoint: Callable[[], str] | None = None,
    penalty: Penalty | None = None,
    seed: int | None = None,
) -> checkpoint.Progress:
    """Train the parameters that ask for gradients until the options say stop.

    The state is written to `state_file` every `checkpoint_minutes` and at the end; a run started again with
    the same fingerprint goes on from it, and one that had finished returns at once.

    Args:
        model: a causal language model of transformers, or a PEFT model around one, in training shape.
        optimisers: their groups' `lr` is the peak rate.
        batches: what each step trains on.
        options: when to stop and how the rate moves.
        state_file: where the resumable state lives.
        fingerprint: stands for every input of the run.
        label: shown beside the progress.
        on_checkpoint: called after each checkpoint; its text is printed.
        penalty: called after each forward pass; added to the mean loss per token, but not reported with it.
        seed: makes what a step draws (dropout, router noise) depend on it and the step's number alone, so
            that a resumed run draws the same. torch's generator is seeded by it.

    Raises:
        DivergedError: the loss is not a finite number.
        CheckpointError: the state file is damaged.
    """
    parameters: Mapping[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    peaks = [float(group["lr"]) for optimiser in optimisers for group in optimiser.param_groups]
    at = checkpoint.load(state_file, fingerprint, parameters, optimisers) or checkpoint.Progress(0, 0.0, 0.0)
    # Loading a state replaces the group objects.
    groups = [group for optimiser in optimisers for group in optimiser.param_groups]
    step, seconds, smoothed = at.step, at.seconds, at.loss
    saved_at, tokens, since = seconds, 0, time.monotonic()
    with Ticker(label) as ticker:
        while (fraction := options.fraction(step, seconds)) < 1.0:
            started = time.monotonic()
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * options.rate(fraction)
            if seed is not None:
                torch.manual_seed(seed * _SEED_STRIDE + step)
            loss, count = _step(model, optimisers, batches.step(step), options.clip, penalty)
            if count and not math.isfinite(loss):
                raise DivergedError(f"{label}: the loss is {loss} at step {step}; lower the learning rate")
            if count:
                smoothed = loss if smoothed == 0.0 else _SMOOTHING * smoothed + (1 - _SMOOTHING) * loss
            step, tokens = step + 1, tokens + count
            seconds += time.monotonic() - started
            speed = tokens / max(1e-9, time.monotonic() - since)
            ticker.update(
                options.fraction(step, seconds), f"step {step} loss {smoothed:.4f} {speed:.0f} tok/s"
            )
            if seconds - saved_at >= 60.0 * options.checkpoint_minutes:
                saved_at = seconds
                now = checkpoint.Progress(step, seconds, smoothed)
                checkpoint.save(state_file, fingerprint, now, parameters, optimisers)
                if on_checkpoint is not None:
                    ticker.say(f"{label}: step {step} {on_checkpoint()}")
    end = checkpoint.Progress(step, seconds, smoothed)
    if end != at:
        checkpoint.save(state_file, fingerprint, end, parameters, optimisers)
    return end
