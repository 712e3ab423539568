"""A Transformer + Pooling encoder (MiniLM, E5, BGE, ...) through transformers alone.

sentence-transformers computes the same, but its import pulls in scikit-learn, scipy and the training stack,
most of what a start takes. A test holds both to the same vectors.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .encoder_files import EncoderFiles, read_json, read_tokenizer
from .errors import RouterFileError

Vectors = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]

#: Makes the layers of a frozen model faster, in place.
Prepare = Callable[[Any], object]

POOLINGS = ("mean", "cls")
_BATCH = 32


def is_plain(files: EncoderFiles) -> bool:
    """Whether this backend gives the vectors of sentence-transformers: a fast tokenizer, mean or first-token
    pooling, and no lower-casing beside the tokenizer's own."""
    settings = _settings(files.weights_dir)
    return (
        files.kind == "transformer"
        and files.pooling in POOLINGS
        and (files.weights_dir / "tokenizer.json").is_file()
        and not settings.get("do_lower_case")
    )


class TransformerBackend:
    """The model in float32, its tokenizer, and a pooling over the last hidden states."""

    def __init__(
        self, files: EncoderFiles, max_tokens: int, device: str, prepare: Prepare | None = None
    ) -> None:
        """Raises RouterFileError when transformers cannot load the model."""
        folder = files.weights_dir
        try:
            model = _load(folder)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise RouterFileError(folder, "", f"transformers cannot load it: {error}") from None
        self._model = model.eval().to(device)
        if prepare is not None and device == "cpu":
            prepare(self._model)
        self._device = device
        self._first = files.pooling == "cls"
        self._max_tokens = min(max_tokens, _own_limit(folder, model.config))
        self._tokenizer = read_tokenizer(folder / "tokenizer.json")
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self._max_tokens)
        pad = getattr(model.config, "pad_token_id", None)
        self._pad = 0 if pad is None else int(pad)

    @property
    def dimension(self) -> int:
        return int(self._model.config.hidden_size)

    @property
    def max_tokens(self) -> int:
        return self._max_tokens

    def embed(self, texts: Sequence[str]) -> tuple[Vectors, Flags]:
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        encodings = self._tokenizer.encode_batch_fast(list(texts)) if texts else []
        truncated = np.array([bool(one.overflowing) for one in encodings], np.bool_)
        ids = [one.ids for one in encodings]
        # Texts of a like length together: padding is work.
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            vectors[rows] = self._pooled([ids[row] for row in rows])
        return vectors, truncated

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(one.ids) for one in self._tokenizer.encode_batch_fast(list(texts))] if texts else []

    def _pooled(self, ids: Sequence[Sequence[int]]) -> Vectors:
        import torch

        longest = max(1, *(len(row) for row in ids))
        tokens = torch.full((len(ids), longest), self._pad)
        mask = torch.zeros((len(ids), longest), dtype=torch.long)
        for number, row in enumerate(ids):
            tokens[number, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[number, : len(row)] = 1
        with torch.inference_mode():
            hidden = self._model(
                input_ids=tokens.to(self._device), attention_mask=mask.to(self._device)
            ).last_hidden_state
            if self._first:
                pooled = hidden[:, 0]
            else:
                weight = mask.to(self._device)[..., None].to(hidden.dtype)
                pooled = (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        result: Vectors = pooled.cpu().numpy()
        return result


def _load(folder: Path) -> Any:
    """The model of a folder, in float32.

    A file that has the model's own names is read into it. `from_pretrained`, which knows other names as well,
    makes the model on the meta device, for which torch loads its compiler: most of what this takes.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel
    from transformers.utils.logging import disable_progress_bar

    file = folder / "model.safetensors"
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if file.is_file() and getattr(config, "quantization_config", None) is None:
        with _without_random_values():
            model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
        try:
            stored = load_file(file)
        except SafetensorError as error:
            raise ValueError(str(error)) from None
        weights = {name: tensor.float() for name, tensor in stored.items() if tensor.is_floating_point()}
        if weights.keys() == dict(model.named_parameters()).keys():
            model.load_state_dict(weights, strict=False, assign=True)
            return model
    disable_progress_bar()  # it is there in a moment
    return AutoModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype="float32"
    )


def _without_random_values() -> Any:
    """Modules made in this context get none. Other threads see nothing of it, unlike transformers' own way,
    which takes the initialisers of torch away and, with two threads at once, does not give them back."""
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", None) in ("normal_", "uniform_", "kaiming_uniform_"):
                return args[0] if args else kwargs["tensor"]
            return func(*args, **(kwargs or {}))

    return Mode()


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "sentence_bert_config.json"
    content = read_json(file) if file.is_file() else {}
    return content if isinstance(content, dict) else {}


def _own_limit(folder: Path, config: Any) -> int:
    """Tokens that the model reads: what sentence-transformers was told, else the tokenizer's own limit, never
    more than there are positions."""
    own = [getattr(config, "max_position_embeddings", None)]
    if (stated := _settings(folder).get("max_seq_length")) is not None:
        own.append(stated)
    else:
        file = folder / "tokenizer_config.json"
        content = read_json(file) if file.is_file() else {}
        own.append(content.get("model_max_length") if isinstance(content, dict) else None)
    limits = [int(limit) for limit in own if isinstance(limit, int | float) and limit >= 1]
    return min(limits, default=512)
