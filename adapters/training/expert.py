"""Training one expert: a PEFT LoRA on a frozen base, and what it gains on rows it has not seen."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from loramux.adapters.adapter_files import CONFIG_FILE, TENSOR_FILE
from loramux.adapters.training.compute import mark
from loramux.adapters.training.errors import DivergedError, OptionError
from loramux.adapters.training.evaluate import loss_per_token
from loramux.adapters.training.rows import Row
from loramux.adapters.training.run import RunOptions, Work, examples_for, fit

ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOptions(RunOptions):
    """Shape of a PEFT LoRA and how it is trained. With `dora` its weights are decomposed (DoRA)."""

    targets: tuple[str, ...] | None = ALL_PROJECTIONS
    dora: bool = False

    def __post_init__(self) -> None:
        RunOptions.__post_init__(self)
        if self.targets is None:
            raise OptionError("at least one target module is needed")


@dataclass(frozen=True, slots=True)
class ExpertReport:
    """Loss per answer token (nats) on held-out rows, without and with the expert; None without such rows."""

    rows: int
    held_out_rows: int
    steps: int
    base_loss: float | None
    expert_loss: float | None


def base_hash(path: Path) -> str:
    """SHA-256 over name, size and first mebibyte of each file of a base directory, to tell bases apart."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.glob("*") if p.is_file()):
        with file.open("rb") as stream:
            digest.update(f"{file.name}:{file.stat().st_size}:".encode() + stream.read(2**20))
    return digest.hexdigest()


def train_expert(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    out: Path,
    options: ExpertOptions,
    *,
    base_id: str,
    base_hash: str = "",
    label: str = "expert",
) -> ExpertReport:
    """Train a LoRA on the answers of `rows` and write an ordinary PEFT directory to `out`.

    The base is not changed and carries no adapter afterwards. The state while training lies beside `out`, in
    `<out>.work`: a killed run goes on from there, and a finished one is not repeated when rows, options and
    base are the same.

    Args:
        model: a frozen causal language model of transformers, in 4 bits or not.
        tokenizer: its tokenizer, with a chat template.
        rows: what to learn.
        held_out: what to measure on; may be empty.
        out: the PEFT directory to write.
        options: shape and training options.
        base_id: becomes `base_model_name_or_path` of the expert.
        base_hash: stands for the base's weights in the decision whether to go on from an earlier run.
        label: shown beside the progress.

    Raises:
        OptionError: no row leaves an answer within `max_tokens`, or no module is called as in `targets`.
        DivergedError: the loss is not a finite number.
    """
    work = Work.of_rows(
        out, "lora", options, base_id=base_id, base_hash=base_hash + mark(model), rows=rows, held_out=held_out
    )
    if (record := work.finished()) is not None:
        return ExpertReport(**record)
    examples = examples_for(tokenizer, rows, held_out, options, label)
    unseen, pad = examples.unseen, examples.pad
    base_loss = loss_per_token(model, unseen, pad_id=pad) if unseen else None
    peft_model = _with_lora(model, options, label)
    try:
        steps = fit(
            peft_model,
            examples,
            options,
            state_file=work.folder / "state.safetensors",
            fingerprint=work.fingerprint,
            label=label,
        )
        expert_loss = loss_per_token(peft_model, unseen, pad_id=pad) if unseen else None
        with work.result() as folder:
            _save(peft_model, folder, base_id, label)
    finally:
        peft_model.unload()
    report = ExpertReport(len(examples.rows), len(unseen), steps, base_loss, expert_loss)
    work.finish(report)
    return report


def _with_lora(model: Any, options: ExpertOptions, label: str) -> Any:
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = options.targets or ()
    missing = sorted(set(targets) - names)
    if missing:
        raise OptionError(
            f"{label}: the base has no module called {', '.join(missing)}; choose other targets"
        )
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules=list(targets),
        lora_dropout=options.dropout,
        use_dora=options.dora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        # PEFT 0.21 reads an attribute that transformers 5 deprecates.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        torch.manual_seed(options.seed)
        return get_peft_model(model, config)


def _save(model: Any, folder: Path, base_id: str, label: str) -> None:
    """Write the two files of a PEFT LoRA, in bfloat16."""
    tensors = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in get_peft_model_state_dict(model).items()
    }
    if not all(bool(value.isfinite().all()) for value in tensors.values()):
        raise DivergedError(f"{label}: the trained weights hold NaN or infinity; lower the learning rate")
    save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})
    config = model.peft_config["default"]
    config.inference_mode = True
    config.base_model_name_or_path = base_id
    config.save_pretrained(folder)
    fields = json.loads((folder / CONFIG_FILE).read_text())
    fields["target_modules"] = sorted(fields["target_modules"])
    (folder / CONFIG_FILE).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
