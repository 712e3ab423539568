"""The weights of a GGUF file, by the names that transformers has for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor
from transformers import PreTrainedConfig

from loramux.server.engine.gguf.container import GgufError, GgufFile
from loramux.server.engine.gguf.families import ROPE_TENSORS, Family, config_of, family_of
from loramux.server.engine.model import skeleton

#: Types that are numbers already and stay what they are.
_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
#: What blocks become in a model folder; docs/models.md has what it was chosen by.
BLOCKS_DTYPE = torch.float16
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CHUNK = 2**24


@dataclass(frozen=True, slots=True)
class Blocks:
    """A weight as it lies in the file.

    Attributes:
        type: name of the GGML type: Q4_0, Q4_1, Q8_0, F16 and so on.
        data: uint8 [rows, bytes per row], a view of the mapped file where its rows are in order; read only.
        shape: (rows, columns) of the matrix.
    """

    type: str
    data: Tensor
    shape: tuple[int, int]


class GgufWeights:
    """The weights of one model.

    Attributes:
        config: transformers' config of the model.
        model_class: transformers' class of it.
        shapes: parameter -> shape, e.g. `model.layers.0.self_attn.q_proj.weight`; a tied head is not listed.
    """

    def __init__(self, file: GgufFile) -> None:
        """
        Raises:
            GgufError: the family is not read, a tensor is missing, unknown or not of the shape that the
                config says, or its type cannot be decoded.
        """
        self._file = file
        self._family: Family = family_of(file)
        self.config: PreTrainedConfig = config_of(file)
        self._sources = {self._renamed(name): name for name in file.tensors if name not in ROPE_TENSORS}
        self.shapes: Mapping[str, tuple[int, ...]] = MappingProxyType(
            {parameter: file.tensors[name].shape for parameter, name in self._sources.items()}
        )
        self._check()

    @classmethod
    def open(cls, path: Path) -> GgufWeights:
        """Those of the file at `path`; no tensor is read yet.

        Raises:
            GgufError: as in `GgufFile.read` and above.
        """
        return cls(GgufFile.read(path))

    def types(self) -> dict[str, str]:
        """Module -> name of the type of its weight, for every matrix of the model; a tied head included."""
        found = {
            parameter.removesuffix(".weight"): self._file.tensors[self._sources[parameter]].type.name
            for parameter, shape in self.shapes.items()
            if len(shape) == 2 and parameter.endswith(".weight")
        }
        if self.config.tie_word_embeddings:
            found["lm_head"] = found["model.embed_tokens"]
        return found

    def columns(self, module: str) -> int:
        """Of the weight of a module that `types` names."""
        tied = module == "lm_head" and self.config.tie_word_embeddings
        return self.shapes[f"{'model.embed_tokens' if tied else module}.weight"][1]

    def dtype_of(self, parameter: str) -> torch.dtype:
        """Of `value`: float32 for norms, the file's own float type, and `BLOCKS_DTYPE` for blocks."""
        kind = self._file.tensors[self._sources[parameter]].type
        return torch.float32 if self._is_norm(parameter) else _PLAIN.get(kind, BLOCKS_DTYPE)

    def nbytes(self, parameter: str) -> int:
        """Bytes of `value`."""
        return prod(self.shapes[parameter]) * self.dtype_of(parameter).itemsize

    def value(self, parameter: str, dtype: torch.dtype | None = None) -> Tensor:
        """A parameter as numbers.

        Args:
            parameter: one of `shapes`.
            dtype: of the result; None is `dtype_of`.

        Raises:
            GgufError: a value is not finite, or not in `dtype`.
        """
        name = self._sources[parameter]
        info = self._file.tensors[name]
        raw = self._file.bytes_of(name)
        dtype = dtype or self.dtype_of(parameter)
        if self._is_norm(parameter):
            # In float32, because a weight near nothing was stored as one near one.
            value = (_decoded(raw, info.type).float() - self._family.norm_offset).to(dtype)
        else:
            step = max(1, _CHUNK // info.shape[-1])
            value = torch.empty(len(raw), info.shape[-1], dtype=dtype)
            for row in range(0, len(raw), step):
                value[row : row + step] = _decoded(raw[row : row + step], info.type)
        # The extremes are NaN where any value is, and are found fifteen times as fast as what is not finite.
        if not bool(torch.stack(value.aminmax()).isfinite().all()):
            raise GgufError(
                f"{self._file.path}: damaged: tensor {name} holds a value that is no finite number"
            )
        value = value.reshape(info.shape)
        heads = self._rotary_heads(parameter)
        return _halves(value, heads) if heads else value

    def blocks(self, module: str) -> Blocks:
        """The weight of a linear module or of the embedding, e.g. `model.layers.0.mlp.up_proj`, undecoded and
        with its rows in transformers' order. `lm_head` has those of the embedding where it is tied.

        Raises:
            KeyError: the model has no such module.
        """
        if module == "lm_head" and self.config.tie_word_embeddings:
            module = "model.embed_tokens"
        name = self._sources[f"{module}.weight"]
        info = self._file.tensors[name]
        data = torch.from_numpy(self._file.bytes_of(name))
        heads = self._rotary_heads(module)
        rows, columns = info.shape
        return Blocks(info.type.name, _halves(data, heads) if heads else data, (rows, columns))

    def _renamed(self, name: str) -> str:
        stem, _, suffix = name.rpartition(".")
        outer, _, rest = stem.partition(".")
        layer, _, part = rest.partition(".")
        if suffix in ("weight", "bias"):
            if stem in _OUTER:
                return f"{_OUTER[stem]}.{suffix}"
            if outer == "blk" and layer.isdecimal() and part in self._family.names:
                return f"model.layers.{int(layer)}.{self._family.names[part]}.{suffix}"
        raise GgufError(f"{self._file.path}: tensor {name} is unknown in a {self._file.architecture} model")

    def _check(self) -> None:
        path = self._file.path
        for kind in {info.type for info in self._file.tensors.values()} - _PLAIN.keys():
            try:
                dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except NotImplementedError:
                name = next(info.name for info in self._file.tensors.values() if info.type is kind)
                raise GgufError(f"{path}: tensor {name} is {kind.name}, which cannot be decoded") from None
        try:
            model = skeleton(self.config)
        except (ValueError, TypeError, RuntimeError, AssertionError, ArithmeticError) as error:
            reason = " ".join(str(error).split())
            raise GgufError(f"{path}: its metadata make no model: {reason}") from None
        self.model_class = type(model).__name__
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        wanted = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
        if missing := sorted(wanted.keys() - self.shapes.keys()):
            raise GgufError(f"{path}: it lacks {len(missing)} tensors of its model, first {missing[0]}")
        if unknown := sorted(self.shapes.keys() - wanted.keys()):
            raise GgufError(f"{path}: tensor {self._sources[unknown[0]]} has no place in its model")
        for name, shape in wanted.items():
            if self.shapes[name] != shape:
                raise GgufError(
                    f"{path}: tensor {self._sources[name]} is {list(self.shapes[name])}, "
                    f"but its metadata make it {list(shape)}"
                )

    def _is_norm(self, parameter: str) -> bool:
        return parameter.endswith("norm.weight")

    def _rotary_heads(self, name: str) -> int:
        """Heads whose rows stand in pairs in the file; 0 where the rows are in order."""
        if self._family.interleaved and ".self_attn.q_proj" in name:
            return int(self.config.num_attention_heads)
        if self._family.interleaved and ".self_attn.k_proj" in name:
            return int(self.config.num_key_value_heads)
        return 0


def _decoded(raw: npt.NDArray[np.uint8], kind: GGMLQuantizationType) -> Tensor:
    """Rows of a tensor as numbers: of their own type, or float32 from blocks."""
    if (dtype := _PLAIN.get(kind)) is not None:
        return torch.from_numpy(raw).view(dtype)
    return torch.from_numpy(dequantize(raw, kind))


def _halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head from pairs (0, n/2, 1, n/2 + 1, …) back to halves (0, 1, …)."""
    paired = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return paired.transpose(1, 2).reshape(rows.shape).contiguous()
