"""Arrow over the experts of a pool, against PEFT's own implementation and a float64 script."""

import copy
import math
from pathlib import Path

import pytest
import torch
from peft import ArrowConfig, create_arrow_model
from torch import Tensor, nn

from loramux.adapters.arena import Arena
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import BaseMismatchError, BlendError
from loramux.adapters.layers import AdapterLayers
from loramux.adapters.lora import LoraAdapter, LoraPair
from loramux.adapters.peft_format import read_lora
from loramux.adapters.sparse.arrow import ArrowExperts
from loramux.kernels.gated_lora import plan_step
from loramux.kernels.gated_lora.prototypes import prototypes
from tests.peft_kit import BASE, SEVEN, save_peft, small_llama

# PEFT 0.21 asks transformers 5.23 for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def served(model: nn.Module, experts: ArrowExperts, prompt: Tensor, top_k: int, temperature: float) -> Tensor:
    layers = AdapterLayers(model, Arena(BASE, 1))
    plan = plan_step([(experts.slot(top_k, temperature), prompt.numel())])
    with torch.inference_mode(), layers.running(plan):
        found: Tensor = model(input_ids=prompt, use_cache=False).logits
    return found


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (3, 1.0), (2, 0.3), (5, 2.0)])
def test_logits_equal_those_of_peft(top_k: int, temperature: float, tmp_path: Path) -> None:
    base = small_llama()
    folders = [tmp_path / f"e{i}" for i in range(5)]
    for i, folder in enumerate(folders):
        save_peft(folder, lora_alpha=4 + i, target_modules=list(SEVEN))
    adapters = [read_lora(folder, id=folder.name, base=BASE, any_base=True) for folder in folders]
    config = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=7)
    oracle = create_arrow_model(copy.deepcopy(base), [str(folder) for folder in folders], config).eval()
    prompt = torch.randint(0, 37, (2, 19))
    with torch.inference_mode():
        wanted = oracle(input_ids=prompt, use_cache=False).logits
    found = served(base, ArrowExperts(adapters, seed=7), prompt, top_k, temperature)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def adapter(name: str, rank: int, modules: list[str], shapes: BaseShapes = BASE) -> LoraAdapter:
    pairs = {
        module: LoraPair(torch.randn(rank, n_in) / 4, torch.randn(n_out, rank) / 4, 0.25 * rank)
        for module, (n_out, n_in) in shapes.modules.items()
        if module.rpartition(".")[2] in modules
    }
    return LoraAdapter(name, f"hash {name}", pairs)


def test_experts_may_differ_in_rank_and_modules() -> None:
    base = small_llama()
    adapters = [
        adapter("attention", 3, ["q_proj", "v_proj"]),
        adapter("ffn", 7, ["up_proj", "down_proj"]),
        adapter("all", 2, list(SEVEN)),
        adapter("wide", 5, ["q_proj", "up_proj"]),
    ]

    class Script(nn.Module):
        def __init__(self, path: str, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner
            self.pairs = [a.pairs[path] for a in adapters if path in a.pairs]

        def forward(self, x: Tensor) -> Tensor:
            rows = [self.token(row) for row in x.reshape(-1, x.shape[-1])]
            return torch.stack(rows).view(*x.shape[:-1], -1)

        def token(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x)
            scores = [abs(float(prototypes(p.a, p.b, 3).double() @ x)) for p in self.pairs]
            best = sorted(range(len(scores)), key=lambda e: -scores[e])[:2]
            total = sum(math.exp(scores[e] / 0.7) for e in best)
            for e in best:
                p = self.pairs[e]
                y = y + math.exp(scores[e] / 0.7) / total * p.scale * (p.b.double() @ (p.a.double() @ x))
            return y

    oracle = copy.deepcopy(base).double()
    for path in BASE.modules:
        parent, _, name = path.rpartition(".")
        setattr(oracle.get_submodule(parent), name, Script(path, oracle.get_submodule(path)))
    prompt = torch.randint(0, 37, (1, 6))
    with torch.inference_mode():
        wanted = oracle(input_ids=prompt, use_cache=False).logits
    found = served(base, ArrowExperts(adapters, seed=3), prompt, 2, 0.7)
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)


def test_slots_share_the_tensors_and_do_not_disturb_each_other() -> None:
    base = small_llama()
    experts = ArrowExperts([adapter(name, 4, list(SEVEN)) for name in "abc"])
    sharp, soft = experts.slot(1), experts.slot(3, 5.0)
    layers = AdapterLayers(base, Arena(BASE, 1))
    prompt = torch.randint(0, 37, (2, 8))

    def logits(rows: Tensor, *slots: object) -> Tensor:
        with torch.inference_mode(), layers.running(plan_step([(slot, 8) for slot in slots])):  # type: ignore[misc]
            found: Tensor = base(input_ids=rows, use_cache=False).logits
        return found

    together = logits(prompt, sharp, soft)
    torch.testing.assert_close(together[:1], logits(prompt[:1], sharp), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together[1:], logits(prompt[1:], soft), atol=1e-4, rtol=1e-4)
    assert experts.nbytes == 4 * sum(12 * (n_out + n_in) + 3 * n_in for n_out, n_in in BASE.modules.values())


def test_what_cannot_be_routed_is_refused() -> None:
    with pytest.raises(BlendError, match="at least one expert"):
        ArrowExperts([])
    experts = ArrowExperts([adapter("a", 4, ["q_proj"])])
    with pytest.raises(BlendError, match="positive top_k and temperature, not 0 and 1"):
        experts.slot(0)
    with pytest.raises(BlendError, match="not 2 and 0"):
        experts.slot(2, 0.0)
    other = BaseShapes("other", {"model.layers.0.self_attn.q_proj": (10, 24)})
    with pytest.raises(BaseMismatchError, match=r"q_proj: the experts were made for different bases"):
        ArrowExperts([adapter("a", 4, ["q_proj"]), adapter("b", 4, ["q_proj"], other)])
