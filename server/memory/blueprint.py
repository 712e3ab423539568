"""The base as its config describes it, built without weights: what it will weigh, and what a step of it
needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import cached_file

from loramux.adapters.base_shapes import BaseShapes
from loramux.kernels.packed_linear import Kinds, storable
from loramux.server.engine.gguf.weights import GgufWeights
from loramux.server.engine.model import (
    DTYPES,
    LARGE,
    BaseModelError,
    context_of,
    resolve_device,
    resolve_dtype,
    resolve_quantization,
    skeleton,
    weight_bytes,
    worth_keeping,
)
from loramux.server.engine.weights import (
    QUANTIZED,
    choose_alike,
    choose_blocks,
    choose_full,
    choose_weights,
    is_compiled,
)
from loramux.server.errors import StartError

#: NF4 with double quantisation, as bitsandbytes stores it: one byte of scale a block, one float a block of
#: scales, and per matrix two code books and an offset.
_NF4_BLOCK, _NF4_SCALE_BLOCK, _NF4_FIXED = 64, 256, 4 * (16 + 256 + 1)


@dataclass(frozen=True, slots=True)
class Target:
    """Where and how the base is to be loaded; nothing is `auto` any more.

    Attributes:
        dtype: what it computes in.
        kinds: how its matrices are held, where that is not `dtype` or nf4.
        why: how that came about, for the log.
        invariant: whether what a token gets must not depend on the others of a step.
    """

    device: torch.device
    dtype: torch.dtype
    quantization: str
    kinds: Kinds | None = None
    why: str = ""
    invariant: bool = False

    @property
    def dtype_name(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    @property
    def host_dtype(self) -> torch.dtype | None:
        """What experts that wait on the host are held in; None is the type of their files.

        On a CPU that computes in float32 that is the same or narrower, and widening them as they are copied
        into their rows is exact. Else it is the type of the rows, so that nothing but copying is left.
        """
        return None if self.device.type == "cpu" and self.dtype == torch.float32 else self.dtype


class Blueprint:
    """A causal language model on the meta device."""

    def __init__(self, location: str, model: PreTrainedModel) -> None:
        self._location = location
        self._model = model
        self._config = model.config.get_text_config()

    @classmethod
    def read(cls, location: str) -> Blueprint:
        """Build it from `config.json`; no weight is read and no code of the checkpoint runs.

        Raises:
            StartError: there is no config, or transformers knows no such model.
        """
        try:
            config = AutoConfig.from_pretrained(location, local_files_only=True, trust_remote_code=False)
            model = skeleton(config)
            context_of(config)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise StartError(f"base model {location}: {reason}") from None
        return cls(location, model)

    def target(
        self,
        *,
        device: str,
        dtype: str,
        quantization: str,
        weights: GgufWeights | None = None,
        invariant: bool = False,
    ) -> Target:
        """Settle what the settings leave to us; `weights` are those of the GGUF file, where there is one.

        Raises:
            StartError: the device does not exist here, or does not go together with the quantization or with
                `invariant`.
        """
        try:
            where = resolve_device(device)
        except BaseModelError as error:
            raise StartError(str(error)) from None
        chosen = resolve_quantization(quantization, where)
        config = self._model.config
        stored = getattr(config, "dtype", None)
        if invariant:
            self._check_invariant(where, dtype, chosen)
        if chosen in QUANTIZED:
            if where.type != "cpu" or dtype not in ("auto", "float32"):
                raise StartError(
                    f"quantization {chosen} is for a CPU and computes in float32, not for {where} "
                    f"in {dtype}; take nf4 there"
                )
            if getattr(config, "quantization_config", None) is not None:
                raise StartError(
                    f"base model {self._location} is quantised already; set quantization to none"
                )
            return Target(
                where,
                torch.float32,
                chosen,
                QUANTIZED[chosen],
                f"weights in {chosen}, as asked for",
                invariant,
            )
        if invariant:
            if dtype == "auto" and weights is not None:
                choice = choose_blocks(weights)
            else:
                choice = choose_alike(stored if dtype == "auto" else None)
            return Target(where, torch.float32, chosen, choice.kinds, choice.why, invariant)
        compute = resolve_dtype(dtype, where, worth_keeping(self._location, config))
        free = where.type == "cpu" and compute == torch.float32 and chosen == "none"
        if not free or getattr(config, "quantization_config", None) is not None:
            return Target(where, compute, chosen)
        if dtype != "auto":
            choice = choose_full(self._largest_matrix())
            return Target(where, compute, chosen, choice.kinds, choice.why)
        if weights is not None:
            choice = choose_blocks(weights)
            return Target(where, compute, chosen, choice.kinds, choice.why)
        large = 2 * self.parameters > LARGE
        choice = choose_weights(stored, self._largest_matrix(), large=large)
        return Target(where, compute, chosen, choice.kinds, choice.why)

    def _check_invariant(self, where: torch.device, dtype: str, quantization: str) -> None:
        if where.type != "cpu":
            reason = f"is for a CPU, not for {where}"
        elif dtype not in ("auto", "float32"):
            reason = f"computes in float32, not in {dtype}"
        elif quantization == "nf4" or getattr(self._model.config, "quantization_config", None) is not None:
            reason = "is not for bases in nf4 or quantised already; take int8 or int4"
        elif not is_compiled():
            reason = "needs the compiled kernels, and this was installed without a C++ compiler"
        else:
            return
        raise StartError(f"engine.batch_invariant {reason}")

    def shapes(self, id: str) -> BaseShapes:
        """Its linear modules."""
        config = cached_file(self._location, "config.json", local_files_only=True)
        return BaseShapes.from_model(self._model, id, folder=Path(config).parent)

    @property
    def parameters(self) -> int:
        """How many numbers it has; tied ones count once."""
        return int(sum(parameter.numel() for parameter in self._model.parameters()))

    @property
    def positions(self) -> int:
        """Tokens of its longest context."""
        return context_of(self._config)

    @property
    def vocabulary(self) -> int:
        """Rows of its embedding, as many as logits."""
        return int(self._config.vocab_size)

    def weight_bytes(self, dtype: torch.dtype, quantization: str, kinds: Kinds | None = None) -> int:
        """Bytes of parameters and buffers once loaded.

        With `kinds` linear layers and embeddings are held so, and the rest in float32. With nf4 the linear
        layers are packed and embeddings, norms, biases and the output head keep `dtype`.
        A checkpoint that is quantised already is loaded as it is stored, so it weighs what its files do.
        """
        if getattr(self._model.config, "quantization_config", None) is not None:
            config = cached_file(self._location, "config.json", local_files_only=True)
            return weight_bytes(Path(config).parent)
        packed = self._packed() if quantization == "nf4" else frozenset()
        places = storable(self._model, kinds) if kinds is not None else []
        stored = {id(place.layer.weight): place.kind for place in places}
        total = int(sum(buffer.nbytes for buffer in self._model.buffers()))
        for name, parameter in self._model.named_parameters():
            if id(parameter) in stored:
                total += stored[id(parameter)].nbytes(*parameter.shape)
            elif name in packed:
                total += nf4_bytes(parameter.numel())
            else:
                total += parameter.numel() * self._stored_as(name, parameter, dtype).itemsize
        return total

    def kv_token_bytes(self, dtype: torch.dtype) -> int:
        """Keys and values of one token in all layers."""
        return 2 * int(self._config.num_hidden_layers) * self._kv_heads * self._head * dtype.itemsize

    def step_bytes(self, dtype: torch.dtype, tokens: int, sequences: int) -> int:
        """Activations of a step of `tokens` tokens, of which `sequences` are sampled from.

        The largest thing is the logits: one row a token when prompt tokens are scored, in float32 (4 bytes),
        and three rows a sampled sequence (logits, their float32 copy, their cumulative probabilities). Beside
        them the layer that runs: residual and normed states in and out (4 x hidden), queries and attention
        output, keys and values, and gate, up and their product. Layers run one after another, so one is
        counted.
        """
        config = self._config
        hidden = int(config.hidden_size)
        inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
        width = 4 * hidden + 2 * int(config.num_attention_heads) * self._head
        width += 2 * self._kv_heads * self._head + 3 * inner
        logits = (tokens + 3 * sequences) * int(config.vocab_size) * 4
        return tokens * width * dtype.itemsize + logits

    def gathered_bytes(self, dtype: torch.dtype, tokens: int, context: int) -> int:
        """What attending to a sequence of `context` tokens takes beside the cache, in a step of `tokens`.

        A piece of a prompt gathers keys and values of its sequence for the layer that runs, repeated per
        query head, and has one entry of a mask per token of the step; sequences do so one after another, and
        the kernels for single tokens read the pages where they lie.
        """
        heads = 2 * int(self._config.num_attention_heads) + self._kv_heads
        return min(context, self.positions) * ((heads * self._head + tokens) * dtype.itemsize + 8)

    @property
    def _kv_heads(self) -> int:
        config = self._config
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)

    @property
    def _head(self) -> int:
        config = self._config
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def _largest_matrix(self) -> tuple[int, int]:
        """Rows and columns of the largest linear layer that is not the head."""
        head = self._model.get_output_embeddings()
        linear = [one for one in self._model.modules() if type(one) is nn.Linear and one is not head]
        shapes = [(one.out_features, one.in_features) for one in linear] or [(1024, 1024)]
        return max(shapes, key=lambda shape: shape[0] * shape[1])

    def _packed(self) -> frozenset[str]:
        """The weights that bitsandbytes packs."""
        skipped = get_keys_to_not_convert(self._model) + list(self._model._keep_in_fp32_modules or ())
        return frozenset(
            f"{path}.weight"
            for path, module in self._model.named_modules()
            if type(module) is nn.Linear and should_convert_module(path, skipped)
        )

    def _stored_as(self, name: str, parameter: Tensor, dtype: torch.dtype) -> torch.dtype:
        """The type of a parameter after loading: a few architectures keep some in float32."""
        if not parameter.is_floating_point():
            return parameter.dtype
        kept = set(self._model._keep_in_fp32_modules_strict or ()) if dtype != torch.float32 else set()
        if dtype == torch.float16:
            kept |= set(self._model._keep_in_fp32_modules or ())
        return torch.float32 if any(part in kept for part in name.split(".")) else dtype


def nf4_bytes(count: int) -> int:
    """Bytes of a matrix of `count` numbers in NF4 with double quantisation."""
    blocks = -(-count // _NF4_BLOCK)
    return -(-count // 2) + blocks + 4 * -(-blocks // _NF4_SCALE_BLOCK) + _NF4_FIXED


def loaded_bytes(model: nn.Module) -> int:
    """Bytes that the parameters and buffers of a loaded model hold, quantisation states included."""
    total, seen = 0, set[int]()
    for tensor in (*model.parameters(), *model.buffers()):
        state = getattr(tensor, "quant_state", None)
        parts = [tensor]
        if state is not None:
            nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
            parts += [state.absmax, state.code, *nested]
        for part in parts:
            if id(part) not in seen:
                seen.add(id(part))
                total += part.numel() * part.element_size()
    return total
