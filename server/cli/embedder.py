"""`loramux train embedder`: an embedder of one's own, trained on the rows of a pool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loramux.server.cli.rows import Rows


def embedder(
    data: Rows,
    out: Annotated[Path, typer.Option(help="Directory to write, in the layout of sentence-transformers.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizer.json to use; unset: a BPE trained on the rows.")
    ] = None,
    dimension: Annotated[int, typer.Option(min=1, help="Length of the vectors.")] = 192,
    vocabulary: Annotated[int, typer.Option(min=257, help="Tokens of the BPE vocabulary.")] = 12_000,
    epochs: Annotated[float, typer.Option(min=0.01, help="Passes over the rows.")] = 3.0,
    batch: Annotated[int, typer.Option(min=2, help="Rows a step, each the others' negative.")] = 1024,
    full: Annotated[bool, typer.Option("--full", help="Store float32 instead of float16.")] = False,
    seed: Annotated[int, typer.Option(help="Of weights and row order.")] = 0,
) -> None:
    """Train a static embedder on (user text, output) pairs with a ranking loss.

    Example: loramux train embedder --data corpus --out my-encoder
    """
    from loramux.adapters.training.progress import Ticker
    from loramux.adapters.training.rows import read_rows, user_text
    from loramux.router.encoder_files import read_tokenizer
    from loramux.router.fit.embedder import EmbedderOptions, train_embedder

    options = EmbedderOptions(
        dimension=dimension,
        vocab_size=vocabulary,
        epochs=epochs,
        batch_size=batch,
        half=not full,
        seed=seed,
    )
    given = None if tokenizer is None else read_tokenizer(tokenizer)
    pairs = [(user_text(row), row.output) for row in read_rows(data)]
    with Ticker("embedder") as ticker:
        loss = train_embedder(
            pairs,
            out,
            options,
            tokenizer=given,
            progress=lambda step, steps, value: ticker.update(step / steps, f"loss {value:.3f}"),
        )
    typer.echo(f"{out}: trained on {len(pairs)} rows, final loss {loss:.4f} nats")
