"""MixLoRA against pip `mixlora`, the authors' own inference code, where that is installed."""

from importlib.util import find_spec

import pytest
import torch

from loramux.adapters.arena import Arena
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.layers import AdapterLayers
from loramux.adapters.sparse.slot import place
from loramux.kernels.gated_lora import plan_step
from tests.unit.adapters.sparse.authors import theirs
from tests.unit.adapters.sparse.random_models import mixlora, tiny_base

pytestmark = pytest.mark.skipif(
    find_spec("mixlora") is None,
    reason="needs `pip install --no-deps mixlora==0.2.3`; with its dependencies it pins an old transformers",
)

RANK, ALPHA = 4, 6


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gemma", "gemma2", "phi", "phi3"])
def test_logits_equal_those_of_the_package(kind: str) -> None:
    base = tiny_base(kind)
    shapes = BaseShapes.from_model(base, "tiny")
    model = mixlora(shapes, experts=5, rank=RANK, scale=ALPHA / RANK)
    oracle = theirs(base, model, RANK, ALPHA)
    layers = AdapterLayers(base, Arena(shapes, 1))
    slot = place(model)
    for length in (1, 30):
        prompt = torch.randint(3, 120, (2, length))
        with torch.inference_mode():
            wanted = oracle(input_ids=prompt, use_cache=False).logits
            with layers.running(plan_step([(slot, 2 * length)])):
                found = base(input_ids=prompt, use_cache=False).logits
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
