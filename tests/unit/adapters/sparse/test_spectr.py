"""SpectR over the experts of a pool, against scripts in float64."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from loramux.adapters.arena import Arena
from loramux.adapters.errors import BlendError
from loramux.adapters.layers import AdapterLayers
from loramux.adapters.lora import LoraAdapter, LoraPair
from loramux.adapters.sparse.spectr import SpectrExperts
from loramux.adapters.sparse.spectral import spectral
from loramux.adapters.sparse.token_methods import token_experts
from loramux.adapters.sparse.token_mixtures import TokenMethod, prepared_bytes
from loramux.kernels.gated_lora import plan_step
from tests.peft_kit import BASE, SEVEN, small_llama
from tests.unit.adapters.sparse.test_arrow import adapter


def logits(model: nn.Module, prompt: Tensor, *slots: object) -> Tensor:
    layers = AdapterLayers(model, Arena(BASE, 1))
    length = prompt.numel() // len(slots)
    plan = plan_step([(slot, length) for slot in slots])  # type: ignore[misc]
    with torch.inference_mode(), layers.running(plan):
        found: Tensor = model(input_ids=prompt, use_cache=False).logits
    return found


class Script(nn.Module):
    """One module token by token, expert by expert: an SVD of the dense update, every score by itself."""

    def __init__(self, pairs: list[LoraPair], inner: nn.Linear, top_k: int, temperature: float) -> None:
        super().__init__()
        self.inner, self.top_k, self.temperature = inner, top_k, temperature
        self.deltas = [pair.b.double() @ pair.a.double() for pair in pairs]
        self.scales = [pair.scale for pair in pairs]
        self.reads = []
        for delta, pair in zip(self.deltas, pairs, strict=True):
            _, values, vt = torch.linalg.svd(delta)
            self.reads.append(vt[: int((values[: pair.rank] > 1e-6 * values[0]).sum())])

    def forward(self, x: Tensor) -> Tensor:
        rows = [self.token(row) for row in x.reshape(-1, x.shape[-1])]
        return torch.stack(rows).view(*x.shape[:-1], -1)

    def token(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        scores = [float((reads @ x).norm()) for reads in self.reads]
        best = sorted(range(len(scores)), key=lambda e: -scores[e])[: self.top_k]
        highest = max(scores, default=0.0)
        shares = {e: math.exp((scores[e] - highest) / self.temperature) for e in best}
        for e, share in shares.items():
            y = y + share / sum(shares.values()) * self.scales[e] * (self.deltas[e] @ x)
        return y


def scripted(base: nn.Module, adapters: list[LoraAdapter], top_k: int, temperature: float) -> nn.Module:
    oracle = copy.deepcopy(base).double()
    for path in BASE.modules:
        parent, _, name = path.rpartition(".")
        pairs = [one.pairs[path] for one in adapters if path in one.pairs]
        script = Script(pairs, oracle.get_submodule(path), top_k, temperature)  # type: ignore[arg-type]
        setattr(oracle.get_submodule(parent), name, script)
    return oracle


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.7), (3, 1.0), (9, 100.0)])
def test_logits_equal_those_of_the_script(top_k: int, temperature: float) -> None:
    """Experts of several ranks and modules; one whose rows of A say nothing of the update's norm."""
    base = small_llama()
    lopsided = adapter("lopsided", 4, list(SEVEN))
    pairs = {
        path: LoraPair(
            pair.a * torch.tensor([1e3, 1.0, 1e-3, 1.0])[:, None],
            pair.b * torch.tensor([1e-3, 1.0, 1e3, 1.0]),
            0.5,
        )
        for path, pair in lopsided.pairs.items()
    }
    adapters = [
        adapter("attention", 3, ["q_proj", "v_proj"]),
        adapter("ffn", 7, ["up_proj", "down_proj"]),
        adapter("all", 2, list(SEVEN)),
        LoraAdapter("lopsided", "hash of lopsided", pairs),
    ]
    prompt = torch.randint(0, 37, (1, 6))
    with torch.inference_mode():
        wanted = scripted(base, adapters, top_k, temperature)(input_ids=prompt, use_cache=False).logits
    found = logits(base, prompt, SpectrExperts(adapters).slot(top_k, temperature))
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("rank", "n_in", "n_out"), [(1, 9, 5), (4, 31, 17), (8, 8, 30), (12, 20, 7), (9, 6, 4)]
)
def test_the_spectral_form_is_the_same_update_and_its_rows_are_orthonormal(
    rank: int, n_in: int, n_out: int
) -> None:
    a, b = torch.randn(3, rank, n_in), torch.randn(3, n_out, rank)
    rows, columns = spectral(a, b.mT)
    assert rows.shape == a.shape
    assert columns.shape == (3, rank, n_out)
    torch.testing.assert_close(columns.mT @ rows, b.double() @ a.double())
    kept = min(rank, n_in, n_out)
    eye = torch.eye(rank).double() * (torch.arange(rank) < kept)
    torch.testing.assert_close(rows @ rows.mT, eye.expand(3, -1, -1), atol=1e-9, rtol=0)
    lengths = columns.norm(dim=2)
    assert torch.all(lengths[:, :-1] >= lengths[:, 1:] - 1e-9)


def test_what_an_expert_does_not_read_does_not_count() -> None:
    """Two rows that are one, and a row whose B is zero: the update has rank 2 of 4."""
    a, b = torch.randn(1, 4, 12), torch.randn(1, 9, 4)
    a[0, 1], b[0, :, 3] = a[0, 0], 0.0
    rows, columns = spectral(a, b.mT)
    torch.testing.assert_close(columns.mT @ rows, b.double() @ a.double())
    assert [bool(row.any()) for row in rows[0]] == [True, True, False, False]
    none, nothing = spectral(a, torch.zeros(1, 4, 9))
    assert not none.any()
    assert not nothing.any()


def test_slots_of_both_methods_share_a_batch_with_the_base() -> None:
    base = small_llama()
    adapters = [adapter(name, 4, list(SEVEN)) for name in "abc"]
    slots = [
        token_experts(TokenMethod.SPECTR, adapters).slot(1),
        token_experts(TokenMethod.ARROW, adapters).slot(2),
        token_experts(TokenMethod.SPECTR, adapters).slot(3, 5.0),
    ]
    prompt = torch.randint(0, 37, (3, 8))
    together = logits(base, prompt, *slots)
    for number, slot in enumerate(slots):
        alone = logits(base, prompt[number : number + 1], slot)
        torch.testing.assert_close(together[number : number + 1], alone, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(together[number], base(prompt[number : number + 1]).logits[0], atol=1e-3)


def test_it_takes_the_room_that_is_said() -> None:
    adapters = [adapter(name, rank, list(SEVEN)) for name, rank in (("a", 3), ("b", 5))]
    assert SpectrExperts(adapters).nbytes == prepared_bytes(TokenMethod.SPECTR, adapters)
    with pytest.raises(BlendError, match="at least one expert"):
        SpectrExperts([])


@pytest.mark.parametrize("method", TokenMethod)
def test_experts_that_wait_in_16_bits_are_widened_first(method: TokenMethod) -> None:
    narrow = [adapter(name, 4, list(SEVEN)).to(torch.bfloat16) for name in "ab"]
    wide = [one.to(torch.float32) for one in narrow]
    made = token_experts(method, narrow)
    assert made.nbytes == token_experts(method, wide).nbytes == prepared_bytes(method, narrow)
    base, prompt = small_llama(), torch.randint(0, 37, (1, 8))
    found = logits(base, prompt, made.slot(1))
    assert torch.equal(found, logits(base, prompt, token_experts(method, wide).slot(1)))
