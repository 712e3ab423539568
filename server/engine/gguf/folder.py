"""A GGUF file as an ordinary model folder, made once and kept in the user's cache."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from hashlib import file_digest
from pathlib import Path

import filelock
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import GenerationConfig

from loramux.server.engine.gguf.container import GgufError, GgufFile
from loramux.server.engine.gguf.tokenizer import Vocabulary, read_tokenizer
from loramux.server.engine.gguf.weights import GgufWeights

#: What a folder says about the file it was made from.
SOURCE_FILE = "gguf_source.json"
#: Part of every key: to be raised whenever a file would be turned into something else than before.
_FORMAT = 1
#: A large model is written in pieces, so that only one of them is in memory.
_SHARD_BYTES = 2**31

log = logging.getLogger("loramux")


def cache_root() -> Path:
    """`loramux/bases` in `$XDG_CACHE_HOME`, else in `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "loramux" / "bases"


def content_hash(path: Path) -> str:
    """SHA-256 of a file, in hex.

    Raises:
        GgufError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise GgufError(f"{path}: {error.strerror or error}") from None


def model_id(file: GgufFile) -> str:
    """What a file calls its model, as a request can carry it: `general.name`, else the file's name."""
    name = file.metadata.get("general.name")
    stated = re.sub(r"[^\w.]+", "-", name).strip("-") if isinstance(name, str) else ""
    return stated or file.path.stem


def model_folder(path: Path, content: str) -> Path:
    """The model folder of a GGUF file, made now if it is not in the cache yet.

    It appears all at once; of two processes that want it, one makes it and the other waits.

    Args:
        path: the file.
        content: its `content_hash`.

    Raises:
        GgufError: the file cannot be used, or the cache cannot be written.
    """
    root = cache_root()
    folder = root / f"{content[:24]}-{_FORMAT}"
    if folder.is_dir():
        return folder
    # Everything that can be wrong with the header is said before anything is written.
    file = GgufFile.read(path)
    weights = GgufWeights(file)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(root / f"{folder.name}.lock"):
            if not folder.is_dir():
                _make(file, weights, folder, content)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise GgufError(
            f"{path}: its model folder cannot be written to {root}: {reason}; set XDG_CACHE_HOME "
            "to a place with room"
        ) from None
    return folder


def _make(file: GgufFile, weights: GgufWeights, folder: Path, content: str) -> None:
    """Write the folder beside its place, then move it there. The lock is held."""
    started = time.monotonic()
    log.info("%s: making a model folder of it, once, in %s", file.path, folder)
    partial = folder.with_name(f"{folder.name}.partial")
    # What is there was left by a process that died.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write_model_folder(file, weights, partial)
        source = {"id": model_id(file), "sha256": content, "file": file.path.name}
        (partial / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
        for written in partial.iterdir():
            with written.open("rb") as stream:
                os.fsync(stream.fileno())
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log.info("%s: model folder made in %.1f s", file.path, time.monotonic() - started)


def write_model_folder(file: GgufFile, weights: GgufWeights, folder: Path) -> None:
    """Config, tokenizer, chat template and weights of a file, into a folder that is there.

    Raises:
        GgufError: a part of the file cannot be used.
        OSError: the folder cannot be written.
    """
    config = weights.config
    tokenizer = read_tokenizer(file, context=config.max_position_embeddings)
    vocabulary = Vocabulary(file)
    if len(vocabulary.tokens) > config.vocab_size:
        raise GgufError(
            f"{file.path}: {len(vocabulary.tokens)} tokens, but {config.vocab_size} rows of token_embd.weight"
        )
    config.bos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.architectures = [weights.model_class]
    config.dtype = torch.bfloat16
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=vocabulary.end_ids,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
    write_weights(weights, folder)


def write_weights(weights: GgufWeights, folder: Path, shard_bytes: int = _SHARD_BYTES) -> None:
    """The weights as `model.safetensors`, or as numbered files with an index.

    Raises:
        GgufError: a weight cannot be decoded.
        OSError, SafetensorError: the folder cannot be written.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for parameter in weights.shapes:
        size = weights.nbytes(parameter)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(parameter)
        filled += size
    places: dict[str, str] = {}
    for number, parameters in enumerate(shards, start=1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({one: weights.value(one) for one in parameters}, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(parameters, name)
    if len(shards) > 1:
        total = sum(weights.nbytes(parameter) for parameter in weights.shapes)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=1) + "\n", encoding="utf-8"
        )
