"""Training a small Llama-architecture base and its tokenizer from scratch."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loramux.adapters.training.batches import Batches, tempered_sources
from loramux.adapters.training.chat import EncodedRow, encode_rows
from loramux.adapters.training.errors import OptionError
from loramux.adapters.training.evaluate import loss_per_token
from loramux.adapters.training.loop import LoopOptions, train
from loramux.adapters.training.muon import Muon
from loramux.adapters.training.rows import Row, find_data_files, read_rows, rows_hash, split_held_out
from loramux.adapters.training.tokenizer import train_tokenizer


@dataclass(frozen=True, slots=True)
class BaseOptions:
    """Shape of the base, and how it is trained. Lengths and sizes are in tokens."""

    vocabulary: int = 8192
    hidden: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    ffn: int = 768
    context: int = 2048
    max_tokens: int = 512
    step_tokens: int = 3072
    batch_tokens: int = 1024
    matrix_rate: float = 6e-3
    other_rate: float = 4e-3
    weight_decay: float = 0.1
    temperature: float = 0.5
    held_out: float = 0.01
    held_out_rows: int = 200
    seed: int = 0


@dataclass(frozen=True, slots=True)
class BaseReport:
    """What came of it: parameters, optimiser steps, held-out loss per token (all tokens, nats)."""

    parameters: int
    steps: int
    loss: float


def _new_model(options: BaseOptions, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(options.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.kv_heads,
            intermediate_size=options.ffn,
            max_position_embeddings=options.context,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def optimisers_for(model: nn.Module, options: BaseOptions) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms.

    A base trained on a laptop CPU sees few tokens, and Muon needs fewer than AdamW for the same loss.
    """
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "layers." in name else others).append(parameter)
    return [
        Muon(matrices, lr=options.matrix_rate, weight_decay=options.weight_decay),
        torch.optim.AdamW(others, lr=options.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(out)


def _tokenizer_for(
    groups: Sequence[Sequence[Row]], options: BaseOptions, folder: Path, fingerprint: str
) -> PreTrainedTokenizerFast:
    """The tokenizer of this run, kept in the work folder so that a resumed run uses the very same."""
    done = folder / "tokenizer.done"
    if done.is_file() and done.read_text() == fingerprint:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    tokenizer = train_tokenizer(groups, vocabulary=options.vocabulary, context=options.context)
    if len(tokenizer) > options.vocabulary:
        raise OptionError(
            f"a vocabulary of {options.vocabulary} is too small: {len(tokenizer)} tokens are needed"
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    done.write_text(fingerprint)
    return tokenizer


def _read_groups(data: Sequence[Path], options: BaseOptions) -> tuple[list[list[Row]], list[Row]]:
    """The rows of each file, shuffled, and the held-out rows of all of them, shuffled together."""
    groups: list[list[Row]] = []
    held_out: list[Row] = []
    for path in find_data_files(data):
        kept, held = split_held_out(read_rows([path]), options.held_out)
        random.Random(options.seed).shuffle(kept)
        groups.append(kept)
        held_out.extend(held)
    random.Random(options.seed).shuffle(held_out)
    return groups, held_out


def train_base(
    data: Sequence[Path],
    out: Path,
    options: BaseOptions,
    *,
    max_minutes: float | None = None,
    max_steps: int | None = None,
) -> BaseReport:
    """Train a tokenizer and a base on JSONL rows and write an ordinary Hugging Face directory to `out`.

    Rows are rendered as chats and every token is predicted. Each file is a source of its own and drawn with
    weight `tokens ** temperature`. The state lives in `out/work` until the end; a killed run goes on from it.

    Args:
        data: JSONL files, or folders of them (see `find_data_files`).
        out: the directory to write.
        options: shape and training options.
        max_minutes: wall-clock limit; the learning rate reaches zero there.
        max_steps: limit in optimiser steps.

    Raises:
        RowError: the data cannot be read.
        OptionError: no rows, no limit, or a vocabulary smaller than the alphabet.
    """
    groups, held_out = _read_groups(data, options)
    identity = json.dumps([asdict(options), [rows_hash(rows) for rows in groups]])
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    work = out / "work"
    tokenizer = _tokenizer_for(groups, options, work / "tokenizer", fingerprint)
    encoded: list[list[EncodedRow]] = [encode_rows(tokenizer, rows, options.max_tokens) for rows in groups]
    held_rows = encode_rows(tokenizer, held_out[: options.held_out_rows], options.max_tokens)
    model = _new_model(options, tokenizer)
    pad: Any = tokenizer.pad_token_id

    def held_out_loss() -> str:
        return f"held-out loss {loss_per_token(model, held_rows, pad_id=pad, answers_only=False):.4f}"

    end = train(
        model.train(),
        optimisers_for(model, options),
        Batches(
            tempered_sources(encoded, options.temperature),
            pad_id=pad,
            step_tokens=options.step_tokens,
            batch_tokens=options.batch_tokens,
            answers_only=False,
            seed=options.seed,
        ),
        LoopOptions(max_steps=max_steps, max_minutes=max_minutes),
        state_file=work / "state.safetensors",
        fingerprint=fingerprint,
        label="base",
        on_checkpoint=held_out_loss if held_rows else None,
    )
    loss = loss_per_token(model, held_rows, pad_id=pad, answers_only=False) if held_rows else end.loss
    parameters = sum(p.numel() for p in model.parameters())
    _save(model, tokenizer, out)
    return BaseReport(parameters=parameters, steps=end.step, loss=loss)
