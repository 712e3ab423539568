"""A base opened for training experts on it: weights frozen, maybe in 4 bits, with its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AutoTokenizer

from loramux.adapters.training.compute import choose, hold
from loramux.server.base_files import BaseFiles
from loramux.server.engine.model import BaseModelError, load_base, resolve_device, resolve_quantization
from loramux.server.errors import StartError


def load_training_base(
    location: str,
    *,
    quantization: str = "none",
    device: str = "auto",
    dtype: str | None = None,
    say: Callable[[str], None] | None = None,
) -> tuple[Any, Any]:
    """`(model, tokenizer)` of a base.

    Args:
        location: a model folder, a GGUF file, a package with one, or a hub id already in the cache.
        quantization: "none", "nf4" (QLoRA's NF4 through bitsandbytes) or "auto" (nf4 on CUDA).
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: what products with the base are computed in: "float32", "bfloat16" or "auto", which takes
            bfloat16 on a CPU where that is measured to be faster. None is what serving takes.
        say: told in a line what `auto` chose on a CPU, and why.

    Raises:
        StartError: model or tokenizer cannot be read, or `quantization` is none of these.
        OptionError: `dtype` is none of these.
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
        target = resolve_device(device)
        plain_cpu = target.type == "cpu" and resolve_quantization(quantization, target) == "none"
        compute = choose(dtype, measured=plain_cpu) if dtype is not None else None
        # On a CPU only the matrices are narrowed, and those after loading.
        load = "auto" if dtype is None or compute is None else "float32" if plain_cpu else dtype
        model = load_base(folder, dtype=load, quantization=quantization, device=device)
    except BaseModelError as error:
        raise StartError(str(error)) from error
    if plain_cpu and compute is not None:
        hold(model, compute.dtype)
        if say is not None:
            say(f"training computes in {str(compute.dtype).removeprefix('torch.')}: {compute.why}")
    return model, tokenizer
