"""A base opened for training experts on it: weights frozen, maybe in 4 bits, with its tokenizer."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from loramux.server.base_files import BaseFiles
from loramux.server.engine.model import BaseModelError, load_base
from loramux.server.errors import StartError


def load_training_base(location: str, *, quantization: str = "none", device: str = "auto") -> tuple[Any, Any]:
    """`(model, tokenizer)` of a base.

    Args:
        location: a model folder, a GGUF file, a package with one, or a hub id already in the cache.
        quantization: "none", "nf4" (QLoRA's NF4 through bitsandbytes) or "auto" (nf4 on CUDA).
        device: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        StartError: model or tokenizer cannot be read, or `quantization` is none of these.
    """
    if quantization not in ("none", "nf4", "auto"):
        raise StartError(f"quantization {quantization!r} is unknown; choose none, nf4 or auto")
    folder = BaseFiles.locate(location).folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StartError(f"tokenizer of base {location}: {reason}") from error
    try:
        return load_base(folder, quantization=quantization, device=device), tokenizer
    except BaseModelError as error:
        raise StartError(str(error)) from error
