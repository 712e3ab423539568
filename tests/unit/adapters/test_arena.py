"""Rows written in stacks hold what rows written module by module would."""

import pytest
import torch

from loramux.adapters.arena import Arena
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.lora import LoraAdapter, LoraPair

MODULES = {
    f"layers.{layer}.{name}": shape
    for layer in range(3)
    for name, shape in {"q": (16, 16), "k": (8, 16), "v": (8, 16), "o": (16, 16), "up": (24, 16)}.items()
}
SHAPES = BaseShapes("tiny", MODULES)

# module -> rank; a module that is left out is not adapted
TARGETS = {
    "all": lambda module: 5,
    "q and v": lambda module: 5 if module[-1] in "qv" else 0,
    "one layer": lambda module: 5 * module.startswith("layers.1"),
    "a rank per kind": lambda module: {"q": 5, "k": 2, "v": 3, "o": 1, "p": 4}[module[-1]],
    "a rank per layer": lambda module: 3 + int(module.split(".")[1]),
    "one module": lambda module: 5 * (module == "layers.2.up"),
}
SCALES = {"none": lambda: 1.0, "one": lambda: 1.7, "each its own": lambda: float(torch.rand(()) + 0.5)}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("extents", [((2, 7),), ((1, 3), (4, 5), (8, 10))], ids=["whole", "scattered"])
def test_rows_hold_the_factors_and_nothing_else(
    targets: str, scales: str, dtype: torch.dtype, extents: tuple[tuple[int, int], ...]
) -> None:
    ranks = {module: TARGETS[targets](module) for module in MODULES if TARGETS[targets](module)}
    pairs = {
        module: LoraPair(
            torch.randn(rank, MODULES[module][1]).to(dtype),
            torch.randn(MODULES[module][0], rank).to(dtype),
            SCALES[scales](),
        )
        for module, rank in ranks.items()
    }
    adapter = LoraAdapter("x", "hash", pairs)
    arena = Arena(SHAPES, 12, dtype=dtype)
    for tensor in (*arena.a.values(), *arena.b.values()):
        tensor.fill_(7)  # what an earlier occupant left
    arena.write(adapter, extents)
    rows = [row for lo, hi in extents for row in range(lo, hi)]
    others = [row for row in range(12) if row not in rows]
    for module, (n_out, n_in) in MODULES.items():
        rank = ranks.get(module, 0)
        a, b = torch.zeros(5, n_in, dtype=dtype), torch.zeros(5, n_out, dtype=dtype)
        if rank:
            a[:rank] = pairs[module].a
            b[:rank] = (pairs[module].b.double() * pairs[module].scale).float().to(dtype).T
        assert torch.equal(arena.a[module][rows], a)
        # In float32, the product of this and of the arena may differ in the last bit of the scale.
        torch.testing.assert_close(arena.b[module][rows], b, rtol=torch.finfo(dtype).eps, atol=0)
        assert (arena.a[module][others] == 7).all()
        assert (arena.b[module][others] == 7).all()


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrower_factors_are_widened_before_they_are_multiplied(scales: str, dtype: torch.dtype) -> None:
    pairs = {
        module: LoraPair(torch.randn(3, n_in).to(dtype), torch.randn(n_out, 3).to(dtype), SCALES[scales]())
        for module, (n_out, n_in) in MODULES.items()
    }
    narrow = LoraAdapter("x", "hash", pairs)
    wide = narrow.to(torch.float32)
    assert (narrow.dtype, wide.dtype) == (dtype, torch.float32)
    assert wide.to(torch.float32) is wide
    arenas = Arena(SHAPES, 3), Arena(SHAPES, 3)
    for arena, adapter in zip(arenas, (narrow, wide), strict=True):
        arena.write(adapter, ((0, 3),))
    for module in MODULES:
        assert torch.equal(arenas[0].a[module], arenas[1].a[module])
        assert torch.equal(arenas[0].b[module], arenas[1].b[module])


def test_every_module_has_rows_of_its_own_in_the_order_of_the_base() -> None:
    arena = Arena(SHAPES, 4)
    assert list(arena.a) == list(arena.b) == list(MODULES)
    for number, tensor in enumerate((*arena.a.values(), *arena.b.values())):
        assert tensor.is_contiguous()
        tensor.fill_(number)
    values = [tensor.unique().tolist() for tensor in (*arena.a.values(), *arena.b.values())]
    assert values == [[number] for number in range(2 * len(MODULES))]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_factors_reach_the_device_before_write_returns() -> None:
    pairs = {
        m: LoraPair(torch.randn(5, n_in), torch.randn(n_out, 5), 1.3) for m, (n_out, n_in) in MODULES.items()
    }
    adapter = LoraAdapter("x", "hash", pairs).pinned()
    assert all(stack.a.is_pinned() and stack.bt.is_pinned() for stack in adapter.stacks)
    arena = Arena(SHAPES, 8, device="cuda")
    arena.write(adapter, ((1, 6),))
    with torch.cuda.stream(torch.cuda.Stream()):
        for module, pair in pairs.items():
            assert torch.equal(arena.a[module][1:6].cpu(), pair.a)
            assert torch.allclose(arena.b[module][1:6].cpu(), pair.b.T * 1.3)
