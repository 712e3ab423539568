"""Training one expert: a PEFT LoRA on a frozen base, and what it gains on rows it has not seen."""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from loramux.adapters.peft_format import CONFIG_FILE, TENSOR_FILE
from loramux.adapters.training.batches import Batches, Source
from loramux.adapters.training.chat import EncodedRow, encode_rows
from loramux.adapters.training.errors import DivergedError, OptionError
from loramux.adapters.training.evaluate import loss_per_token
from loramux.adapters.training.loop import LoopOptions, train
from loramux.adapters.training.rows import Row, rows_hash

ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class ExpertOptions:
    """Shape of an expert and how it is trained. Lengths are in tokens.

    Training stops after `epochs` passes or `minutes` minutes, whichever comes first; `minutes=None` sets no
    limit. `held_out_rows` bounds how many held-out rows the report measures.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ALL_PROJECTIONS
    rate: float = 2e-3
    epochs: float = 3.0
    minutes: float | None = None
    max_tokens: int = 512
    step_tokens: int = 2048
    batch_tokens: int = 1024
    held_out_rows: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or not self.rate > 0 or not self.epochs > 0:
            raise OptionError("rank, alpha, rate and epochs must be positive")
        if not self.targets:
            raise OptionError("an expert needs at least one target module")


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
    identity = json.dumps([asdict(options), base_id, base_hash, rows_hash(rows), rows_hash(held_out)])
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    work = out.with_name(out.name + ".work")
    done = work / "report.json"
    if done.is_file() and (out / TENSOR_FILE).is_file():
        record = json.loads(done.read_text())
        if record.pop("fingerprint") == fingerprint:
            return ExpertReport(**record)
    encoded = _answerable(encode_rows(tokenizer, rows, options.max_tokens))
    if not encoded:
        raise OptionError(f"{label}: no row leaves room for an answer in {options.max_tokens} tokens")
    sample = random.Random(options.seed).sample(list(held_out), min(len(held_out), options.held_out_rows))
    unseen = _answerable(encode_rows(tokenizer, sample, options.max_tokens))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    base_loss = loss_per_token(model, unseen, pad_id=pad) if unseen else None
    peft_model = _with_lora(model, options, label)
    try:
        steps = _fit(peft_model, encoded, pad, options, work / "state.safetensors", fingerprint, label)
        expert_loss = loss_per_token(peft_model, unseen, pad_id=pad) if unseen else None
        _save(peft_model, out, base_id)
    finally:
        peft_model.unload()
    report = ExpertReport(len(encoded), len(unseen), steps, base_loss, expert_loss)
    done.write_text(json.dumps({"fingerprint": fingerprint, **asdict(report)}))
    return report


def _answerable(rows: Sequence[EncodedRow]) -> list[EncodedRow]:
    return [row for row in rows if row.answer_start < len(row)]


def _with_lora(model: Any, options: ExpertOptions, label: str) -> Any:
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    missing = sorted(set(options.targets) - names)
    if missing:
        raise OptionError(
            f"{label}: the base has no module called {', '.join(missing)}; choose other targets"
        )
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules=list(options.targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        # PEFT 0.21 reads an attribute that transformers 5 deprecates.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        torch.manual_seed(options.seed)
        return get_peft_model(model, config)


def _fit(
    model: Any,
    rows: Sequence[EncodedRow],
    pad: int,
    options: ExpertOptions,
    state_file: Path,
    fingerprint: str,
    label: str,
) -> int:
    """Train the LoRA parameters in place; how many steps it took."""
    batches = Batches(
        [Source(rows=rows, weight=1.0)],
        pad_id=pad,
        step_tokens=options.step_tokens,
        batch_tokens=options.batch_tokens,
        answers_only=True,
        seed=options.seed,
    )
    steps = max(1, math.ceil(options.epochs * len(rows) / batches.rows_per_step))
    parameters = [p for p in model.parameters() if p.requires_grad]
    end = train(
        model.train(),
        [torch.optim.AdamW(parameters, lr=options.rate, betas=(0.9, 0.98), weight_decay=0.0)],
        batches,
        LoopOptions(max_steps=steps, max_minutes=options.minutes, checkpoint_minutes=2.0),
        state_file=state_file,
        fingerprint=fingerprint,
        label=label,
    )
    model.eval()
    return end.step


def _save(model: Any, out: Path, base_id: str) -> None:
    """Write the two files of a PEFT LoRA, in bfloat16; `out` is never half written."""
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    tensors = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in get_peft_model_state_dict(model).items()
    }
    if not all(bool(value.isfinite().all()) for value in tensors.values()):
        raise DivergedError(f"{out.name}: the trained weights hold NaN or infinity; lower the learning rate")
    save_file(tensors, partial / TENSOR_FILE, metadata={"format": "pt"})
    config = model.peft_config["default"]
    config.inference_mode = True
    config.base_model_name_or_path = base_id
    config.save_pretrained(partial)
    fields = json.loads((partial / CONFIG_FILE).read_text())
    fields["target_modules"] = sorted(fields["target_modules"])
    (partial / CONFIG_FILE).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    if out.exists():
        shutil.rmtree(out)
    partial.replace(out)
