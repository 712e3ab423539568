"""The layers of a decode step in one call, where a base on the CPU is one that this can be said of."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loramux.adapters.layers import AdapterLayers
from loramux.kernels import decoder_stack, gated_lora, packed_linear, paged_attention, pointwise
from loramux.kernels.decoder_stack import Layer, Operators, Place, Projection, Step
from loramux.kernels.gated_lora import BARE, NativeBound, Plan
from loramux.kernels.packed_linear import FEW, StoredLinear
from loramux.kernels.paged_attention import NativeForm, Rows
from loramux.server.engine.attention import PagedAttention
from loramux.server.engine.inputs import StepInputs
from loramux.server.engine.lean import norm_factor

_PATHS = {
    Place.Q: "self_attn.q_proj", Place.K: "self_attn.k_proj", Place.V: "self_attn.v_proj",
    Place.O: "self_attn.o_proj", Place.GATE: "mlp.gate_proj", Place.UP: "mlp.up_proj",
    Place.DOWN: "mlp.down_proj",
}  # fmt: skip
_LIBRARIES = (decoder_stack, gated_lora, packed_linear, paged_attention, pointwise)


class UnfitError(Exception):
    """The base is none of those that the stack computes; the message says what differs."""


class DecodeStack:
    """Embeds, runs all layers in one call, and asks the head: a decode step with nothing but blends in it.

    A base qualifies by its parts: layers of norm, attention and gated feed-forward, all matrices stored
    (`StoredLinear`), computing in float32. Whether parts mean what their names say is not believed: `agrees`
    compares a step with the model's own, and who makes a stack asks it first. Used by the stepping thread.

    Raises:
        UnfitError: a part is missing or of another kind.
    """

    def __init__(self, model: PreTrainedModel, layers: AdapterLayers, paged: PagedAttention) -> None:
        if any(one.library() is None for one in _LIBRARIES):
            raise UnfitError("installed without a C++ compiler")
        if not isinstance(paged.form, NativeForm) or model.dtype != torch.float32:
            raise UnfitError("it does not compute in float32 on a CPU")
        inner = model.base_model
        self._embed, self._rotary = _part(inner, "embed_tokens"), _part(inner, "rotary_emb")
        self._norm, self._head = _part(inner, "norm"), model.get_output_embeddings()
        if self._head is None or not isinstance(stack := _part(inner, "layers"), nn.ModuleList):
            raise UnfitError("it has no layers or no head")
        self._adapters, self._paged, self._form = layers, paged, paged.form
        names = {id(module): name for name, module in model.named_modules()}
        self._modules: list[str] = []
        self._owners: list[object] = []  # whose memory the call reads
        self._width = self._widest = 0
        self._layers = (Layer * len(stack))(*(self._layer(layer, names) for layer in stack))
        matrices, between = _of(packed_linear), _of(pointwise)
        functions = (
            matrices.packed_linear, between.pointwise_rms_norm, between.pointwise_rotate,
            between.pointwise_swiglu, paged.form.function,
            layers.form.function if isinstance(layers.form, gated_lora.NativeForm) else None,
        )  # fmt: skip
        self._operators = Operators(*(_address(function) for function in functions))
        self._step = Step(ctypes.addressof(self._operators), ctypes.addressof(self._layers))
        self._step.count, self._step.width = len(stack), self._width
        self._step.widest, self._step.serial = self._widest, pointwise.SERIAL
        self._address = ctypes.addressof(self._step)
        self._function = _of(decoder_stack).decoder_stack
        self._attended = False
        self._plan = BARE
        self._calls: ctypes.Array[ctypes.c_void_p] | None = None
        self._bounds: list[NativeBound | None] = []

    def _layer(self, layer: nn.Module, names: dict[int, str]) -> Layer:
        made = Layer()
        norms = [norm_factor(_part(layer, name)) for name in ("input_layernorm", "post_attention_layernorm")]
        if norms[0] is None or norms[1] is None:
            raise UnfitError("its norms are of another kind")
        (before, made.epsilon), (after, made.epsilon_feed_forward) = norms  # type: ignore[misc]
        made.before_attention, made.before_feed_forward = before.data_ptr(), after.data_ptr()
        self._owners += [before, after]
        self._width = before.shape[0]
        widths = [self._width, self._widest]
        for place, path in _PATHS.items():
            try:
                linear = layer.get_submodule(path)
            except AttributeError:
                raise UnfitError(f"its layers have no {path}") from None
            if not isinstance(linear, StoredLinear) or (native := linear.native) is None:
                raise UnfitError(f"{path} is not stored")
            if linear.in_features % packed_linear.BLOCK:
                raise UnfitError(f"rows of {path} are no whole blocks")
            made.projections[place] = Projection(native.address, native.rows, native.serial)
            widths += [linear.in_features, linear.out_features]
            self._modules.append(names[id(linear)])
            self._owners.append(native)
        self._widest = max(widths)
        attention = _part(layer, "self_attn")
        dim = getattr(attention, "head_dim", None)
        if not isinstance(dim, int) or dim <= 0 or dim % paged_attention.LANES:
            raise UnfitError("its heads are of an odd size")
        made.dim = dim
        made.heads = made.projections[Place.Q].rows // made.dim
        made.kv_heads = made.projections[Place.K].rows // made.dim
        if made.projections[Place.V].rows != made.projections[Place.K].rows:
            raise UnfitError("its values are of another size than its keys")
        return made

    def fits(self, plan: Plan, tokens: int) -> bool:
        """Whether a step of single tokens can be computed here: its gates do not depend on the token, and
        every layer has attended before."""
        if tokens > FEW or plan.shares or plan.table is not None or not self._ready():
            return False
        if plan is not self._plan:
            self._bind(plan)
        return plan.is_empty or self._calls is not None

    @torch.inference_mode()
    def hidden(self, inputs: StepInputs, rows: Rows) -> Tensor:
        """What the head is given, float32 [tokens, width], for the rows of a step that `fits`."""
        count = rows.lengths.shape[0]
        x = self._embed(inputs.ids[:, :count])
        cos, sin = (part.contiguous() for part in self._rotary(x, inputs.positions[:, :count]))
        room = x.new_empty(4 * count * self._widest)
        step = self._step
        step.rows = self._form.take(rows, self._keys, self._layers[0].heads * self._layers[0].dim)
        step.adapters = None if self._calls is None else ctypes.addressof(self._calls)
        step.cos, step.sin, step.hidden, step.room = (t.data_ptr() for t in (cos, sin, x, room))
        step.tokens, step.threads = count, torch.get_num_threads()
        self._function(self._address)
        found: Tensor = self._norm(x)[0]
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [rows, vocabulary] of rows [rows, width]."""
        found: Tensor = self._head(hidden)
        return found

    def agrees(self, inputs: StepInputs, rows: Rows, expected: Tensor) -> bool:
        """Whether a step of the bare base gives the logits that the model itself gave for it."""
        if not self.fits(BARE, rows.lengths.shape[0]):
            return False
        try:
            found = self.logits(self.hidden(inputs, rows))
        except (TypeError, ValueError, RuntimeError, AttributeError):
            return False
        return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-4)

    def _ready(self) -> bool:
        """Take over the cache of every layer once it is there."""
        if not self._attended:
            for number, layer in enumerate(self._layers):
                side = self._paged.side(number)
                if side is None:
                    return False
                keys, values, scores = side
                sinks = None if scores.sinks is None else scores.sinks.float().contiguous()
                heads = (layer.heads, layer.kv_heads, layer.dim, layer.dim)
                layer.attention = ctypes.addressof(self._form.layer(heads, scores))
                layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
                layer.sinks = None if sinks is None else sinks.data_ptr()
                self._owners += [keys, values, sinks]
                self._keys = keys
            self._attended = True
        return True

    def _bind(self, plan: Plan) -> None:
        """Have the calls of a plan's adapters for every projection; none where a form is not native."""
        self._plan, self._calls, self._bounds = plan, None, []
        if plan.is_empty:
            return
        arena, form = self._adapters.arena, self._adapters.form
        for module in self._modules:
            if module not in arena.a:
                self._bounds.append(None)
                continue
            bound = form.bind(plan, module, arena.a[module], arena.b[module])
            if bound is not None and not isinstance(bound, NativeBound):
                return
            self._bounds.append(bound)
        calls: Sequence[int | None] = [None if bound is None else bound.address for bound in self._bounds]
        self._calls = (ctypes.c_void_p * len(calls))(*calls)


def _part(module: nn.Module, name: str) -> nn.Module:
    found = getattr(module, name, None)
    if not isinstance(found, nn.Module):
        raise UnfitError(f"{type(module).__name__} has no {name}")
    return found


def _address(function: Any) -> int | None:
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


def _of(kernel: object) -> ctypes.CDLL:
    found: ctypes.CDLL | None = kernel.library()  # type: ignore[attr-defined]
    assert found is not None  # looked at before anything else
    return found
