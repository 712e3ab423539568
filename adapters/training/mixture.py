"""Training a sparse model: MixLoRA, LoRACoE or LoRAMoE on a frozen base, and what it gains on unseen rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loramux.adapters.sparse.write import write_loracoe, write_loramoe, write_mixlora
from loramux.adapters.training.batches import Batch
from loramux.adapters.training.compute import mark
from loramux.adapters.training.errors import DivergedError
from loramux.adapters.training.evaluate import loss_per_token
from loramux.adapters.training.factors import Factors
from loramux.adapters.training.frozen import replaced
from loramux.adapters.training.loracoe import LoraCoeOptions, LoraCoeTrainer
from loramux.adapters.training.loramoe import LoraMoeOptions, LoraMoeTrainer
from loramux.adapters.training.mixlora import MixLoraOptions, MixLoraTrainer
from loramux.adapters.training.rows import Row
from loramux.adapters.training.run import Examples, Work, examples_for, fit

MixtureOptions = MixLoraOptions | LoraCoeOptions | LoraMoeOptions
Trainer = MixLoraTrainer | LoraCoeTrainer | LoraMoeTrainer


@dataclass(frozen=True, slots=True)
class MixtureReport:
    """Loss per answer token (nats) on held-out rows, without and with the model; None without such rows.

    `warmup_loss` is that of LoRACoE after its first phase. `steps` counts both phases.
    """

    rows: int
    held_out_rows: int
    steps: int
    parameters: int
    base_loss: float | None
    warmup_loss: float | None
    loss: float | None


def trainer_for(model: Any, options: MixtureOptions) -> Trainer:
    """Fresh modules of the method that the options are for, the same for the same seed.

    Raises:
        OptionError: the base has nothing that the method adapts, or lacks a target.
    """
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        if isinstance(options, MixLoraOptions):
            return MixLoraTrainer(model, options)
        if isinstance(options, LoraCoeOptions):
            return LoraCoeTrainer(model, options)
        return LoraMoeTrainer(model, options)


def train_mixture(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    out: Path,
    options: MixtureOptions,
    *,
    base_id: str,
    base_hash: str = "",
    label: str = "mixture",
    dtype: torch.dtype = torch.bfloat16,
) -> MixtureReport:
    """Train a sparse model on the answers of `rows` and write `adapter_config.json` and safetensors to `out`.

    The base is not changed and carries nothing afterwards. The state while training lies in `<out>.work`: a
    killed run goes on from there, and a finished one is not repeated when rows, options and base are the
    same. LoRACoE leaves its first phase there too, as `warmup/`.

    Args:
        model: a frozen causal language model of transformers, in 4 bits or not.
        tokenizer: its tokenizer, with a chat template.
        rows: what to learn.
        held_out: what to measure on; may be empty.
        out: the directory to write.
        options: method, shape and training options.
        base_id: becomes `base_model_name_or_path`.
        base_hash: stands for the base's weights in the decision whether to go on from an earlier run.
        label: shown beside the progress.
        dtype: what factors are stored in; routers are stored in float32.

    Raises:
        OptionError: no row leaves an answer within `max_tokens`, or the base has nothing to adapt.
        DivergedError: the loss is not a finite number.
    """
    work = Work.of_rows(
        out,
        f"{type(options).__name__} {dtype}",
        options,
        base_id=base_id,
        base_hash=base_hash + mark(model),
        rows=rows,
        held_out=held_out,
    )
    if (record := work.finished()) is not None:
        return MixtureReport(**record)
    examples = examples_for(tokenizer, rows, held_out, options, label)
    base_loss = _measure(model, examples)
    trainer = trainer_for(model, options)
    run = _Run(model, trainer, examples, options, work, base_id, label, dtype)
    with replaced(model, trainer.modules):
        steps, warmup_loss = run.warm_up()
        steps += run.joint(after=steps)
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        run.settle()
        loss = _measure(model, examples)
    run.write()
    report = MixtureReport(
        len(examples.rows), len(examples.unseen), steps, parameters, base_loss, warmup_loss, loss
    )
    work.finish(report)
    return report


def _measure(model: Any, examples: Examples) -> float | None:
    return loss_per_token(model, examples.unseen, pad_id=examples.pad) if examples.unseen else None


@dataclass(frozen=True, slots=True)
class _Run:
    model: Any
    trainer: Trainer
    examples: Examples
    options: MixtureOptions
    work: Work
    base_id: str
    label: str
    dtype: torch.dtype

    def warm_up(self) -> tuple[int, float | None]:
        """LoRACoE's first phase: a plain LoRA. `(0, None)` for other methods and where it is skipped."""
        if not isinstance(self.trainer, LoraCoeTrainer) or not self.trainer.options.warmup:
            return 0, None
        self.trainer.gate(False)
        steps = self._fit("warmup", share=self.trainer.options.warmup)
        loss = _measure(self.model, self.examples)
        with Work(self.work.folder / "warmup", "warmup", self.options).result() as folder:
            self._write(folder)
        return steps, loss

    def joint(self, *, after: int) -> int:
        """The main phase, which goes on with the rows after so many steps."""
        if not isinstance(self.trainer, LoraCoeTrainer):
            return self._fit("state")
        self.trainer.gate(True)
        options = self.trainer.options
        rate = options.joint_rate or (options.rate / 4 if options.warmup else options.rate)
        return self._fit("joint", share=1.0 - options.warmup, rate=rate, skip=after)

    def _fit(self, phase: str, *, share: float = 1.0, rate: float | None = None, skip: int = 0) -> int:
        return fit(
            self.model,
            self.examples,
            self.options,
            state_file=self.work.folder / f"{phase}.safetensors",
            fingerprint=self.work.fingerprint,
            label=self.label if phase == "state" else f"{self.label}, {phase}",
            share=share,
            rate=rate,
            skip=skip,
            penalty=self._penalty(),
        )

    def _penalty(self) -> Callable[[Batch], Tensor] | None:
        trainer = self.trainer
        if isinstance(trainer, LoraCoeTrainer):
            return None
        device = self.model.device
        return lambda batch: trainer.penalty(batch.real.to(device))

    def settle(self) -> None:
        """Round the factors to what will be stored.

        Raises:
            DivergedError: a trained value is not a finite number.
        """
        for path, module in self.trainer.modules.items():
            for name, value in module.named_parameters():
                if value.requires_grad and not bool(value.isfinite().all()):
                    raise DivergedError(
                        f"{self.label}: {path}.{name} holds NaN or infinity; lower the learning rate"
                    )
            for child in module.modules():
                if isinstance(child, Factors):
                    child.round_to(self.dtype)

    def write(self) -> None:
        """Write the result, whole or not at all."""
        with self.work.result() as folder:
            self._write(folder)

    def _write(self, folder: Path) -> None:
        result = self.trainer.result(self.work.out.name, self.dtype)
        common: Mapping[str, Any] = {"base_id": self.base_id, "dropout": self.options.dropout}
        if isinstance(self.trainer, MixLoraTrainer):
            config = self.model.config
            act = getattr(config, "hidden_act", None) or config.hidden_activation
            write_mixlora(result, folder, act_fn=act, **common)
        elif isinstance(self.trainer, LoraCoeTrainer):
            write_loracoe(result, folder, **common)
        else:
            write_loramoe(result, folder, **common)
