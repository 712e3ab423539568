"""The base model: loaded from local safetensors, in 4 bits where asked, frozen."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

LARGE = 2**30
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


#: What initial values are made with: functions of torch, which transformers wraps, and methods of tensors.
_INITIALISERS = {
    "normal_", "uniform_", "constant_", "kaiming_uniform_", "trunc_normal_",
    "zero_", "fill_", "copy_", "erfinv_", "mul_", "add_", "clamp_",
}  # fmt: skip


class BaseModelError(ValueError):
    """The base model cannot be loaded; the message names the directory and the reason."""


def skeleton(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model on the meta device, of the config's dtype or another: shapes and ties without numbers. No code
    of the checkpoint runs.

    Only what makes parameters is on that device: for the angles of rotary embeddings torch would load its
    compiler there, which takes as long as all the rest.
    """
    chosen = {} if dtype is None else {"dtype": dtype}
    with _OnMeta():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **chosen)
    model.tie_weights()
    return model


class _OnMeta(TorchFunctionMode):
    """New tensors on the meta device, where they are empty or full of one number. They get no initial values,
    for which torch would load its compiler. Other threads see nothing of it, unlike transformers' own way,
    which takes the initialisers of torch away and, with two threads at once, does not give them back."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", None) in _INITIALISERS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        if func in (torch.empty, torch.ones, torch.zeros) and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one.

    Raises:
        BaseModelError: the device does not exist here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BaseModelError(f"device {device!r} was asked for, but torch sees no CUDA GPU; use device: cpu")
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device, stored: torch.dtype | None) -> torch.dtype:
    """`auto` is bfloat16 on a GPU that has it and float16 on one that has not; on a CPU it is `stored`, else
    float32."""
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return stored or torch.float32


def worth_keeping(path: str | Path, config: PreTrainedConfig) -> torch.dtype | None:
    """The checkpoint's own dtype where it should stay what it is on a CPU.

    A checkpoint of over a gigabyte would double in float32; but a processor without bfloat16 products takes
    fifty times as long with them, and that is worse (docs/log.md).
    """
    folder = Path(path)
    large = not folder.is_dir() or weight_bytes(folder) > LARGE
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return getattr(config, "dtype", None) if large and has_bfloat16 else None


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files of a checkpoint."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def resolve_quantization(quantization: str, device: torch.device) -> str:
    """`auto` is nf4 on CUDA and none on a CPU, where it would change answers and NF4's prefill is slow."""
    if quantization == "auto":
        return "nf4" if device.type == "cuda" else "none"
    return quantization


def load_base(
    path: str | Path, *, dtype: str = "auto", quantization: str = "auto", device: str = "auto"
) -> PreTrainedModel:
    """Load a causal language model for serving; `dtype: stored` leaves it in the type of the checkpoint.

    Only safetensors are read and no code of the checkpoint runs. A hub id works if its files are in the local
    cache already.

    Raises:
        BaseModelError: a file is missing or damaged, or the device, dtype and quantization do not go
        together.
    """
    target = resolve_device(device)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"base model {path}: {_first_line(error)}") from error
    stored = getattr(config, "dtype", None) or torch.float32
    compute = stored if dtype == "stored" else resolve_dtype(dtype, target, worth_keeping(path, config))
    arguments: dict[str, object] = {}
    if resolve_quantization(quantization, target) == "nf4":
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_use_double_quant=True,
        )
    try:
        model: PreTrainedModel
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=compute,
            device_map={"": target},
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **arguments,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise BaseModelError(f"base model {path}: {_first_line(error)}") from error
    # transformers fills what a checkpoint lacks with random numbers and a warning.
    if missing := sorted(loading["missing_keys"]):
        raise BaseModelError(
            f"base model {path}: the checkpoint lacks {len(missing)} tensors, first {missing[0]}"
        )
    if getattr(model, "is_loaded_in_4bit", False):
        keep_four_bit_layout(model)
    model.requires_grad_(False)
    return model.eval()


def empty_base(path: str | Path) -> PreTrainedModel:
    """A base for serving in float32, whose weights are still to be given to it; its buffers are there.

    Raises:
        BaseModelError: a file is missing or damaged.
    """
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        model = skeleton(config, torch.float32)
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"base model {path}: {_first_line(error)}") from error
    model.requires_grad_(False)
    return model.eval()


def context_of(config: PreTrainedConfig) -> int:
    """Tokens of the longest sequence that a model computes alike whatever its length.

    `longrope` has other factors for sequences beyond its original length, for all of their tokens: in a
    batch, and for a sequence that grows, only those up to there are the same in every step.

    Raises:
        BaseModelError: its config sets no length.
    """
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        raise BaseModelError(
            f"{config.model_type} sets no max_position_embeddings: position biases (ALiBi) are not supported"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
    return min(int(positions), int(original or positions))


def unsupported(model: PreTrainedModel) -> str | None:
    """The feature for which a model cannot be served, if it has one."""
    config = model.config.get_text_config()
    if getattr(model, "_is_stateful", False):
        return "recurrent layers, whose state is not part of the key-value cache"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    return f"layers of the kind {min(kinds)}" if kinds else None


def keep_four_bit_layout(model: torch.nn.Module) -> int:
    """Keep bitsandbytes from repacking 4-bit weights at their first use on a CPU; how many layers there are.

    On processors with AVX-512 BF16 bitsandbytes 0.50 lays the weights out anew for a kernel that takes only
    outputs in multiples of 32 and inputs of at least 64, computes in bfloat16 whatever was asked for, and has
    no backward pass. The layout as it was quantised is dequantised exactly, in every shape, on every one.
    """
    from bitsandbytes.nn import Linear4bit

    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def eos_ids_of(model: PreTrainedModel) -> list[int]:
    """The tokens that end an answer of this model."""
    generation = model.generation_config.eos_token_id if model.generation_config else None
    eos = model.config.eos_token_id if generation is None else generation
    return [eos] if isinstance(eos, int) else list(eos or ())
