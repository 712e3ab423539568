"""Options that the commands which train adapters share, and what they do with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from loramux.server.cli.rows import Rows

if TYPE_CHECKING:
    from loramux.adapters.training.rows import Row

Option = typer.Option
DTYPE_HELP = "Of products with the base: float32, bfloat16 or auto, on a CPU the faster as measured."
BASE_HELP = "Base: a model folder, a GGUF file, an installed package with one, or a cached hub id."


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """The options of every such command; the field names are the option names."""

    data: Rows
    out: Annotated[Path, Option(help="Directory to write.")]
    base: Annotated[str, Option(help=BASE_HELP)]
    base_id: Annotated[str | None, Option(help="Name of the base to write; unset: its own, or --base.")] = (
        None
    )
    rank: Annotated[int, Option(min=1, help="LoRA rank, of each expert where there are several.")] = 8
    alpha: Annotated[float, Option(min=1e-6, help="LoRA alpha; the scale is alpha / rank.")] = 16.0
    dropout: Annotated[float, Option(min=0.0, max=0.99, help="Of what goes into a LoRA.")] = 0.0
    target: Annotated[list[str] | None, Option(help="Module name to adapt; repeatable; unset: all.")] = None
    rate: Annotated[float, Option(min=1e-9, help="Peak learning rate.")] = 2e-3
    epochs: Annotated[float, Option(min=1e-3, help="Passes over the rows; --steps goes before.")] = 3.0
    steps: Annotated[int | None, Option(min=1, help="Optimiser steps, instead of --epochs.")] = None
    minutes: Annotated[float | None, Option(min=0.01, help="Wall-clock limit.")] = None
    step_tokens: Annotated[int, Option(min=64, help="Tokens of one optimiser step.")] = 2048
    batch_tokens: Annotated[int, Option(min=64, help="Tokens of one forward pass.")] = 1024
    max_tokens: Annotated[int, Option(min=8, help="Longer rows lose the end of their answer.")] = 512
    held_out: Annotated[float, Option(min=0.0, max=0.5, help="Fraction of rows to measure on.")] = 0.02
    held_out_rows: Annotated[int, Option(min=0, help="How many of them to measure at most.")] = 200
    quantization: Annotated[str, Option(help="Of the frozen base: none or nf4.")] = "none"
    device: Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")] = "auto"
    dtype: Annotated[str, Option(help=DTYPE_HELP)] = "auto"
    seed: Annotated[int, Option(min=0, help="Of first weights, row order and noise.")] = 0

    @property
    def run(self) -> dict[str, Any]:
        """Keyword arguments of `RunOptions`."""
        names = (
            "rank",
            "alpha",
            "dropout",
            "rate",
            "epochs",
            "steps",
            "minutes",
            "step_tokens",
            "batch_tokens",
        )
        chosen = {name: getattr(self, name) for name in (*names, "max_tokens", "held_out_rows", "seed")}
        return {**chosen, "targets": tuple(self.target) if self.target else None}


def with_common(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command `(common, own options…)` the common options, with other defaults where it says so."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(Common, include_extras=True)
        shared = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty
                if field.default is MISSING
                else defaults.get(field.name, field.default),
                annotation=hints[field.name],
            )
            for field in fields(Common)
        ]
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

        def run(**given: Any) -> None:
            common = Common(**{parameter.name: given.pop(parameter.name) for parameter in shared})
            command(common, **given)

        parameters = [*shared, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own)]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


@dataclass(frozen=True, slots=True)
class Prepared:
    """Rows and a base to train on."""

    model: Any
    tokenizer: Any
    rows: Sequence[Row]
    held_out: Sequence[Row]
    base_id: str
    base_hash: str


def prepare(common: Common) -> Prepared:
    """Read the rows, hold some out, and load the frozen base.

    Raises:
        RowError, OptionError, StartError: as the options show.
    """
    from loramux.adapters.training.rows import read_rows, split_held_out
    from loramux.server.base_files import BaseFiles
    from loramux.server.pool.training_base import load_training_base

    kept, unseen = split_held_out(read_rows(common.data), common.held_out)
    base = BaseFiles.locate(common.base)
    model, tokenizer = load_training_base(
        base.folder,
        quantization=common.quantization,
        device=common.device,
        dtype=common.dtype,
        say=partial(typer.echo, err=True),
    )
    base_id = common.base_id or base.id or common.base
    return Prepared(model, tokenizer, kept, unseen, base_id, base.hash)


def gain(before: float | None, after: float | None) -> str:
    """What training changed, for the last line of a command; empty without held-out rows."""
    if before is None or after is None:
        return ""
    return f", held-out loss per answer token {before:.4f} -> {after:.4f}"
