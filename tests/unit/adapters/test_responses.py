"""The experts' responses to one input, against scripts in float64, and what is heard inside the base."""

import math

import pytest
import torch
from torch import Tensor

from loramux.adapters.arena import Arena
from loramux.adapters.errors import BlendError
from loramux.adapters.layers import AdapterLayers
from loramux.adapters.lora import LoraAdapter, LoraPair
from loramux.adapters.responses import Listener, Responders, common_module
from loramux.kernels.gated_lora import plan_step
from tests.kernels.batches import draw
from tests.peft_kit import BASE, SEVEN, small_llama
from tests.unit.adapters.sparse.test_arrow import adapter


def experts(dtype: torch.dtype, n_in: int, n_out: int) -> list[LoraAdapter]:
    return [
        LoraAdapter(
            str(i),
            f"hash {i}",
            {
                "m": LoraPair(
                    torch.randn(rank, n_in).to(dtype), torch.randn(n_out, rank).to(dtype), 0.1 + i / 4
                )
            },
        )
        for i, rank in enumerate((4, 1, 7, 3))
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_signals_equal_their_script(dtype: torch.dtype) -> None:
    n_in, n_out = draw(5, 60), draw(2, 60)
    made, x = experts(dtype, n_in, n_out), torch.randn(n_in) / n_in
    responders = Responders(made, "m")
    norms, entropies = [], []
    for one in made:
        output = (one.delta("m") @ x.double()).tolist()
        norms.append(math.sqrt(sum(value**2 for value in output)))
        exps = [math.exp(value - max(output)) for value in output]
        shares = [value / sum(exps) for value in exps]
        entropies.append(1 / (-sum(p * math.log(p) for p in shares if p > 0) + 1e-6))
    assert responders.signals(x, "norm") == pytest.approx(norms, rel=1e-4)
    assert responders.signals(x, "entropy") == pytest.approx(entropies, rel=1e-3)


def test_an_output_in_one_place_has_a_finite_signal() -> None:
    pair = LoraPair(torch.ones(1, 3), torch.tensor([[1e4], [0.0]]), 1.0)
    [signal] = Responders([LoraAdapter("a", "hash", {"m": pair})], "m").signals(torch.ones(3), "entropy")
    assert signal == pytest.approx(1e6)


def test_a_listener_hears_what_a_module_reads_of_the_last_token_and_changes_nothing() -> None:
    base = small_llama()
    prompt = torch.randint(0, 37, (3, 8))
    module = "model.layers.1.self_attn.q_proj"
    reads: list[Tensor] = []
    hook = base.get_submodule(module).register_forward_pre_hook(lambda _, given: reads.append(given[0]))
    with torch.inference_mode():
        wanted = base(prompt, use_cache=False).logits
    hook.remove()
    layers = AdapterLayers(base, Arena(BASE, 1))
    first, second = Listener(module), Listener(module)
    with torch.inference_mode(), layers.running(plan_step([(first, 8), (None, 8), (second, 8)])):
        found = base(prompt, use_cache=False).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for listener, row in ((first, 0), (second, 2)):
        heard = listener.heard()
        assert heard is not None
        torch.testing.assert_close(heard, reads[0][row, -1], atol=1e-5, rtol=1e-5)
    assert Listener(module).heard() is None


def test_the_module_is_the_query_of_the_last_block_that_all_have() -> None:
    last = max(BASE.modules, key=lambda path: [int(part) for part in path.split(".") if part.isdigit()])
    block = last.split(".")[2]
    whole, ffn = adapter("a", 2, list(SEVEN)), adapter("b", 2, ["up_proj", "down_proj"])
    assert common_module({"a": whole}) == f"model.layers.{block}.self_attn.q_proj"
    assert common_module({"a": whole, "b": ffn}) == f"model.layers.{block}.mlp.up_proj"
    early = {path: pair for path, pair in whole.pairs.items() if ".0." in path}
    shallow = LoraAdapter("c", "hash c", early)
    assert common_module({"a": whole, "c": shallow}) == "model.layers.0.self_attn.q_proj"
    many = {path: pair for path, pair in whole.pairs.items() if ".0." in path and "q_proj" in path}
    renamed = {p.replace(".0.", f".{n}."): pair for n in (2, 9, 10) for p, pair in many.items()}
    assert ".10." in common_module({"d": LoraAdapter("d", "hash d", renamed)})
    with pytest.raises(BlendError, match="none in common: b, c"):
        common_module({"b": ffn, "c": LoraAdapter("c", "h", {p: x for p, x in early.items() if "attn" in p})})
