"""What every training of an adapter has in common: options, examples, phases, and files that appear whole."""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from loramux.adapters.adapter_files import TENSOR_FILE
from loramux.adapters.training.batches import Batch, Batches, Source
from loramux.adapters.training.chat import EncodedRow, encode_rows
from loramux.adapters.training.errors import OptionError
from loramux.adapters.training.loop import LoopOptions, train
from loramux.adapters.training.rows import Row, rows_hash


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Size of an adapter and length of its training. Lengths of text are in tokens.

    Training stops after `steps` optimiser steps, or `epochs` passes where `steps` is None, or `minutes`
    minutes, whichever comes first. `targets` are last names of modules; None takes all that the method can
    adapt. `held_out_rows` bounds how many held-out rows the report measures.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    rate: float = 2e-3
    epochs: float = 3.0
    steps: int | None = None
    minutes: float | None = None
    max_tokens: int = 512
    step_tokens: int = 2048
    batch_tokens: int = 1024
    held_out_rows: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or not self.rate > 0 or not self.epochs > 0:
            raise OptionError("rank, alpha, rate and epochs must be positive")
        if self.steps is not None and self.steps < 1:
            raise OptionError(f"steps must be positive, got {self.steps}")
        if not 0.0 <= self.dropout < 1.0:
            raise OptionError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.targets is not None and not self.targets:
            raise OptionError("at least one target module is needed")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True)
class Examples:
    """Encoded rows that have an answer: to learn from, and to measure on."""

    rows: list[EncodedRow]
    unseen: list[EncodedRow]
    pad: int


def examples_for(
    tokenizer: Any, rows: Sequence[Row], held_out: Sequence[Row], options: RunOptions, label: str
) -> Examples:
    """Encode all rows, and a sample of the held-out ones.

    Raises:
        OptionError: no row leaves an answer within `max_tokens`.
    """
    encoded = _answerable(encode_rows(tokenizer, rows, options.max_tokens))
    if not encoded:
        raise OptionError(f"{label}: no row leaves room for an answer in {options.max_tokens} tokens")
    sample = random.Random(options.seed).sample(list(held_out), min(len(held_out), options.held_out_rows))
    unseen = _answerable(encode_rows(tokenizer, sample, options.max_tokens))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Examples(encoded, unseen, pad)


def _answerable(rows: Sequence[EncodedRow]) -> list[EncodedRow]:
    return [row for row in rows if row.answer_start < len(row)]


def fit(
    model: Any,
    examples: Examples,
    options: RunOptions,
    *,
    state_file: Path,
    fingerprint: str,
    label: str,
    share: float = 1.0,
    rate: float | None = None,
    skip: int = 0,
    penalty: Callable[[Batch], torch.Tensor] | None = None,
) -> int:
    """Train the parameters of `model` that ask for gradients; how many steps it took.

    Args:
        model: in evaluation shape before and after.
        examples: what to learn from.
        options: length, rate and seed.
        state_file: where the resumable state lives.
        fingerprint: stands for every input of the run.
        label: shown beside the progress.
        share: the part of the run's length that this fit gets.
        rate: peak learning rate; None is that of the options.
        skip: steps whose rows an earlier phase has seen.
        penalty: added to the mean loss per token, called after each forward pass.
    """
    batches = Batches(
        [Source(rows=examples.rows, weight=1.0)],
        pad_id=examples.pad,
        step_tokens=options.step_tokens,
        batch_tokens=options.batch_tokens,
        answers_only=True,
        seed=options.seed,
        skip=skip,
    )
    steps = options.steps or options.epochs * len(examples.rows) / batches.rows_per_step
    minutes = None if options.minutes is None else share * options.minutes
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.random.fork_rng():
        end = train(
            model.train(),
            [torch.optim.AdamW(parameters, lr=rate or options.rate, betas=(0.9, 0.98), weight_decay=0.0)],
            batches,
            LoopOptions(
                max_steps=max(1, math.ceil(share * steps)), max_minutes=minutes, checkpoint_minutes=2.0
            ),
            state_file=state_file,
            fingerprint=fingerprint,
            label=label,
            penalty=penalty,
            seed=options.seed,
        )
    model.eval()
    return end.step


class Work:
    """The folder beside a result, `<out>.work`: resumable state, and the report of a finished run."""

    def __init__(self, out: Path, kind: str, options: Any, *inputs: str) -> None:
        """Options and inputs together decide whether an earlier run is this one."""
        identity = json.dumps([kind, asdict(options), *inputs])
        self.out = out
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        self.folder = out.with_name(out.name + ".work")

    @classmethod
    def of_rows(
        cls,
        out: Path,
        kind: str,
        options: Any,
        *,
        base_id: str,
        base_hash: str,
        rows: Sequence[Row],
        held_out: Sequence[Row],
    ) -> Work:
        """The work of training on `rows`."""
        return cls(out, kind, options, base_id, base_hash, rows_hash(rows), rows_hash(held_out))

    @property
    def _report(self) -> Path:
        return self.folder / "report.json"

    def finished(self) -> dict[str, Any] | None:
        """The report of this very run if it ended and its result is there."""
        if not self._report.is_file() or not (self.out / TENSOR_FILE).is_file():
            return None
        record: dict[str, Any] = json.loads(self._report.read_text())
        return record if record.pop("fingerprint") == self.fingerprint else None

    def finish(self, report: Any) -> None:
        """Record that the run ended with a report, a dataclass of JSON types."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._report.write_text(json.dumps({"fingerprint": self.fingerprint, **asdict(report)}))

    @contextmanager
    def result(self) -> Iterator[Path]:
        """A folder to write the result into; it becomes `out` when the context ends without an error."""
        partial = self.out.with_name(self.out.name + ".partial")
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        yield partial
        if self.out.exists():
            shutil.rmtree(self.out)
        partial.replace(self.out)
