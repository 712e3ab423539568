"""The base of a rig once more, in plain transformers and in any type: float64 says what is right, the served
type says how far from it an ordinary run is."""

from collections.abc import Callable, Sequence

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from loramux.adapters.lora import LoraAdapter, LoraPair

Parts = Sequence[tuple[LoraAdapter, float]]


class Judge:
    """Teacher-forced log-probabilities of a model whose products are made in `dtype`.

    A weight is widened while its product is made, one at a time, so that a large base fits beside itself.
    Norms, rotary angles and the softmax of the attention stay in float32, as transformers has them: against
    the rounding of 16 bits that is exact.
    """

    def __init__(self, served: PreTrainedModel, dtype: torch.dtype) -> None:
        """Stand beside a served model, whose linear modules are those of transformers or of bitsandbytes."""
        config = type(served.config).from_dict(served.config.to_dict())
        config._attn_implementation = "eager"
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self._products: dict[str, Product] = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                self._products[name] = Product(served.get_submodule(name), dtype)
                model.set_submodule(name, self._products[name])
        rest = {name for name, _ in model.named_parameters()}
        state = {name: value.to(dtype) for name, value in served.state_dict().items() if name in rest}
        model.load_state_dict(state, assign=True)
        for name, buffer in served.named_buffers():
            if name in dict(model.named_buffers()):
                owner, _, leaf = name.rpartition(".")
                model.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
        self._model = model.eval()
        self._device = served.device

    @torch.no_grad()
    def scores(self, prompt: Sequence[int], answer: Sequence[int], parts: Parts = ()) -> list[float]:
        """Log-probability, in nats, of each token of an answer, under a weighted sum of experts."""
        for name, product in self._products.items():
            product.parts = [(expert.pairs[name], w) for expert, w in parts if name in expert.pairs]
        tokens = torch.tensor([[*prompt, *answer[:-1]]], device=self._device)
        logits = self._model(tokens, use_cache=False).logits[0, len(prompt) - 1 :]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chosen = torch.tensor(answer, device=self._device)[:, None]
        found: list[float] = wide.log_softmax(dim=-1).gather(1, chosen)[:, 0].tolist()
        return found


class Product(nn.Module):
    """`W x` and the deltas of some experts, the weight taken from a served module."""

    def __init__(self, served: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self._weight: Callable[[], Tensor] = lambda: weight_of(served).to(dtype)
        self._bias = None if served.bias is None else served.bias.to(dtype)
        self._dtype = dtype
        self.parts: Sequence[tuple[LoraPair, float]] = ()

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self._weight(), self._bias)
        for pair, weight in self.parts:
            a, b = (side.to(x.device, self._dtype) for side in (pair.a, pair.b))
            y = y + weight * pair.scale * ((x @ a.T) @ b.T)
        return y


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear module; one in 4 bits in float32, which holds every value of it."""
    weight: Tensor = module.weight
    if not isinstance(module, Linear4bit):
        return weight
    state, kept = weight.quant_state, weight.quant_state.dtype
    try:
        state.dtype = torch.float32
        wide: Tensor = dequantize_4bit(weight.data, state)
    finally:
        state.dtype = kept
    return wide
