"""Importance of parameters: against finite differences in float64, and what is read off it."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import UnsupportedAdapterError
from loramux.adapters.importance.measure import Importance, Scores, measure_importance
from loramux.adapters.importance.probes import Probes, make_probes
from loramux.adapters.importance.statistics import (
    concentration,
    correlation,
    mean_variance,
    rank_correlation,
    rank_shares,
    task_correlation,
    top_overlap,
    variance,
)
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.sparse.model import FfnRouting, FfnStrategy, SparseModel
from loramux.adapters.training.batches import by_length, collate
from loramux.adapters.training.chat import EncodedRow
from loramux.adapters.training.errors import OptionError
from loramux.adapters.training.frozen import replaced
from loramux.adapters.training.loop import token_losses
from tests.sparse_kit import small_base
from tests.tiny import random_adapter, with_delta
from tests.tiny_sparse import random_experts, random_loracoe, random_mixlora
from tests.unit.adapters.sparse import random_models
from tests.unit.adapters.sparse.random_models import tiny_base
from tests.unit.adapters.sparse.scripts import scripted

Adapter = LoraAdapter | SparseModel
MAKERS: dict[str, Callable[[BaseShapes], Adapter]] = {
    "lora": lambda shapes: random_adapter(shapes, 4, "lora"),
    "loracoe": lambda shapes: random_loracoe(shapes, "coe"),
    "loramoe": lambda shapes: random_experts(shapes, "moe"),
    "mola": lambda shapes: random_experts(shapes, "mola", top_k=2),
    "mixlora": lambda shapes: random_mixlora(shapes, "mix"),
}

SPARSE: dict[str, Callable[[BaseShapes], SparseModel]] = {
    "loracoe": random_models.loracoe,
    "loramoe": lambda shapes: random_models.loramoe(shapes, None),
    "mola": lambda shapes: random_models.loramoe(shapes, 2),
    "top_k": lambda shapes: random_models.mixlora(shapes, FfnRouting(FfnStrategy.TOP_K, top_k=2)),
    "top_p": lambda shapes: random_models.mixlora(shapes, FfnRouting(FfnStrategy.TOP_P, top_p=0.7)),
    "switch": lambda shapes: random_models.mixlora(shapes, FfnRouting(FfnStrategy.SWITCH)),
}


def made(kind: str, dtype: torch.dtype = torch.float64) -> tuple[torch.nn.Module, Probes, list[EncodedRow]]:
    """A random base, an adapter's probes, and rows of different lengths, one of which has no answer."""
    model = small_base()
    probes = make_probes(model, MAKERS[kind](BaseShapes.from_model(model, "tiny")), dtype)
    model = model.to(dtype)
    if dtype is torch.float64:
        in_float64_throughout(model)
    lengths = [(9, 4), (5, 2), (12, 11), (7, 6), (6, 6)]
    rows = [EncodedRow(tuple(torch.randint(37, (n,)).tolist()), start) for n, start in lengths]
    return model, probes, rows


def in_float64_throughout(model: Any) -> None:
    """transformers' RMSNorm and its own attention compute in float32, whatever the model is in."""
    model.set_attn_implementation("sdpa")
    for path, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            parent, _, name = path.rpartition(".")
            norm = torch.nn.RMSNorm(len(module.weight), module.variance_epsilon, dtype=torch.float64)
            norm.weight.data = module.weight.data
            setattr(model.get_submodule(parent), name, norm.requires_grad_(False))


def loss_of(model: torch.nn.Module, probes: Probes, rows: list[EncodedRow]) -> float:
    """The mean over all answer tokens, one row at a time."""
    with torch.no_grad(), replaced(model, probes.modules):
        found = [token_losses(model, collate([row], 0, True)) for row in rows if row.answer_start < len(row)]
    return float(torch.cat(found).mean())


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_it_is_the_gradient_times_the_parameter(kind: str) -> None:
    """Central differences of the loss at parameters drawn at random."""
    model, probes, rows = made(kind)
    found = measure_importance(model, probes, rows, pad_id=0, batch_tokens=24)
    assert found.loss == pytest.approx(loss_of(model, probes, rows), rel=1e-9)
    step = 1e-5
    for path in np.random.default_rng().choice(sorted(probes.leaves), 4, replace=False):
        leaf, scores = probes.leaves[path], found.scores[path]
        for parameter, scored in ((leaf.a, scores.a), (leaf.bt, scores.bt)):
            place = tuple(int(torch.randint(size, ())) for size in parameter.shape)
            value = float(parameter[place].detach())
            losses = []
            for moved in (value + step, value - step):
                with torch.no_grad():
                    parameter[place] = moved
                losses.append(loss_of(model, probes, rows))
            with torch.no_grad():
                parameter[place] = value
            expected = abs((losses[0] - losses[1]) / (2 * step) * value)
            assert float(scored[place]) == pytest.approx(expected, rel=1e-4, abs=1e-10)


@pytest.mark.parametrize("kind", ["lora", "loracoe", "loramoe", "mola"])
def test_a_rank_matters_as_much_by_a_as_by_b(kind: str) -> None:
    """A rank's delta is b aᵀ, so to grow a is to grow b: with their signs, both sums are the same number."""
    model, probes, rows = made(kind)
    batches = [collate(group, 0, True) for group in by_length(rows[:4], 1000)]
    parameters = [one for leaf in probes.leaves.values() for one in (leaf.a, leaf.bt)]
    with replaced(model, probes.modules):
        loss = torch.cat([token_losses(model, batch) for batch in batches]).mean()
        gradients = torch.autograd.grad(loss, parameters)
    for a, bt, grad_a, grad_bt in zip(
        parameters[::2], parameters[1::2], gradients[::2], gradients[1::2], strict=True
    ):
        assert torch.allclose((a * grad_a).sum(1), (bt * grad_bt).sum(1), rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_batching_changes_nothing_and_the_base_is_left_as_it_was(kind: str) -> None:
    model, probes, rows = made(kind)
    before = dict(model.named_modules())
    ids = torch.arange(10)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    seen: list[int] = []
    together = measure_importance(model, probes, rows, pad_id=3, batch_tokens=10_000, progress=seen.append)
    alone = measure_importance(model, probes, rows, pad_id=0, batch_tokens=1)
    for path, scores in together.scores.items():
        assert torch.allclose(scores.a, alone.scores[path].a, rtol=1e-6, atol=1e-12)
        assert torch.allclose(scores.bt, alone.scores[path].bt, rtol=1e-6, atol=1e-12)
    assert seen == [4]
    assert dict(model.named_modules()) == before
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, logits)


def test_each_row_is_the_mean_over_rows_alone() -> None:
    model, probes, rows = made("loracoe")
    found = measure_importance(model, probes, rows, pad_id=0, each_row=True)
    singles = [measure_importance(model, probes, [row], pad_id=0) for row in rows[:4]]
    for path, scores in found.scores.items():
        mean = torch.stack([single.scores[path].a for single in singles]).mean(0)
        assert torch.allclose(scores.a, mean, rtol=1e-8)
    whole = measure_importance(model, probes, rows, pad_id=0)
    assert all(
        float(found.scores[path].a.sum()) >= 0.5 * float(whole.scores[path].a.sum()) for path in found.scores
    )


@pytest.mark.parametrize("kind", ["lora", "loracoe", "loramoe", "mola", "top_k", "top_p", "switch"])
@pytest.mark.parametrize("base", ["llama", "phi", "phi3"])
def test_the_probes_compute_what_the_formulas_say(base: str, kind: str) -> None:
    """Against scripts of the formulas, and for LoRA against deltas added into the weights."""
    model = tiny_base(base)
    shapes = BaseShapes.from_model(model, "tiny")
    adapter: Adapter
    if kind == "lora":
        adapter = random_adapter(shapes, 4, "lora")
        wanted = with_delta(model, [(adapter, 1.0)])
    else:
        adapter = SPARSE[kind](shapes)
        wanted = scripted(model, adapter)
    ids = torch.randint(3, 120, (2, 15))
    with torch.no_grad():
        expected = wanted(input_ids=ids, use_cache=False).logits.double()
        with replaced(model, make_probes(model, adapter).modules):
            found = model(input_ids=ids, use_cache=False).logits.double()
    assert float((found - expected).norm() / expected.norm()) < 2e-5


def test_an_adapter_for_other_modules_is_refused() -> None:
    model = small_base()
    adapter = random_adapter(BaseShapes("tiny", {"model.layers.7.self_attn.q_proj": (30, 24)}), 4, "far")
    with pytest.raises(UnsupportedAdapterError, match=r"no module model\.layers\.7"):
        make_probes(model, adapter)


def test_rows_without_answers_are_refused() -> None:
    model, probes, rows = made("lora")
    with pytest.raises(OptionError, match="max_tokens"):
        measure_importance(model, probes, rows[4:], pad_id=0)


def importance(*parts: tuple[Tensor, Tensor]) -> Importance:
    return Importance(0.0, {f"m{number}": Scores(a, bt) for number, (a, bt) in enumerate(parts)})


def test_variance_by_dimension() -> None:
    a, bt = torch.rand(5, 11, dtype=torch.float64), torch.rand(5, 7, dtype=torch.float64)
    found = variance(Scores(a, bt))
    parts = [
        (part.numpy().var(axis=axis, ddof=1).mean() / part.numpy().mean() ** 2)
        for axis in (0, 1)
        for part in (a, bt)
    ]
    assert found.rank == pytest.approx((parts[0] + parts[1]) / 2)
    assert found.features == pytest.approx((parts[2] + parts[3]) / 2)
    # Ranks that differ, features that do not, and the other way round.
    rows, columns = torch.rand(5, 1).expand(5, 9), torch.rand(1, 9).expand(5, 9)
    assert variance(Scores(rows, rows)).features == pytest.approx(0, abs=1e-12)
    assert variance(Scores(columns, columns)).rank == pytest.approx(0, abs=1e-12)
    both = mean_variance([importance((rows, rows), (columns, columns))], ["m0", "m1"])
    assert both.rank == pytest.approx(variance(Scores(rows, rows)).rank / 2)


def test_correlations_are_numpys() -> None:
    tasks = [
        importance((torch.rand(4, 9), torch.rand(4, 6)), (torch.rand(4, 9), torch.rand(4, 6)))
        for _ in range(5)
    ]
    flat = [
        np.stack(
            [np.concatenate([t.scores[m].a.numpy().ravel(), t.scores[m].bt.numpy().ravel()]) for t in tasks]
        )
        for m in ("m0", "m1")
    ]
    expected = sum(np.corrcoef(rows.astype(np.float64)) for rows in flat) / 2
    assert np.allclose(task_correlation(tasks, ["m0", "m1"]).numpy(), expected, atol=1e-6)
    ranks = np.stack([t.scores["m0"].ranks.numpy() for t in tasks])
    assert np.allclose(task_correlation(tasks, ["m0"], by_rank=True).numpy(), np.corrcoef(ranks), atol=1e-6)
    shares = ranks / ranks.sum(axis=1, keepdims=True)
    assert np.allclose(rank_correlation(tasks, "m0").numpy(), np.corrcoef(shares.T), atol=1e-6)


def test_a_task_with_steeper_gradients_correlates_no_ranks() -> None:
    """Only shares count: one task that is a multiple of another says nothing about two ranks."""
    base = importance((torch.rand(4, 9), torch.rand(4, 6)))
    steep = importance((100 * base.scores["m0"].a, 100 * base.scores["m0"].bt))
    assert rank_correlation([base, steep, base], "m0").abs().max() < 1e-6
    assert torch.equal(correlation(torch.ones(2, 5)), torch.zeros(2, 2, dtype=torch.float64))


def test_concentration_and_overlap() -> None:
    even = torch.full((20,), 1 / 20, dtype=torch.float64)
    found = concentration(even)
    assert (found.effective, found.half, found.most) == (pytest.approx(1), 0.5, 0.9)
    one = torch.zeros(20, dtype=torch.float64)
    one[3] = 1
    found = concentration(one)
    assert (found.effective, found.half, found.most) == (pytest.approx(0.05), 0.05, 0.05)
    first, second, third = torch.eye(20, dtype=torch.float64)[:3]
    assert top_overlap({"a": first, "b": first}, 0.05) == 1
    assert top_overlap({"a": first, "b": second, "c": third}, 0.05) == 0
    assert top_overlap({"a": first}) is None
    shares = rank_shares(
        importance((torch.rand(4, 9), torch.rand(4, 6)), (torch.rand(2, 9), torch.rand(2, 6)))
    )
    assert len(shares) == 6
    assert math.isclose(float(shares.sum()), 1)
