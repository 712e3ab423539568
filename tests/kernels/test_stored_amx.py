"""Products on the matrix unit (AMX) say what float64 says; a machine without one is left alone."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from loramux.kernels.packed_linear import (
    FEW,
    Instructions,
    Kind,
    StoredLinear,
    instruction_sets,
    library,
    pack,
    unpack,
)

native = pytest.mark.skipif(library() is None, reason="installed without a C++ compiler")
amx = pytest.mark.skipif(
    Instructions.AMX not in instruction_sets(), reason="no AMX here: processor, system or compiler lacks it"
)


def both(kind: Kind, rows: int, columns: int, bias: bool = False) -> tuple[StoredLinear, StoredLinear]:
    """One matrix for the matrix unit, and for what else the processor has."""
    packed = pack(torch.randn(rows, columns), kind)
    added = torch.randn(rows) if bias else None
    sets = instruction_sets()
    return (
        StoredLinear(packed, added, instructions=Instructions.AMX),
        StoredLinear(packed, added, instructions=sets[sets.index(Instructions.AMX) - 1]),
    )


def error(found: Tensor, x: Tensor, layer: StoredLinear) -> float:
    expected = x.double() @ unpack(layer.packed).double().T
    if layer.bias is not None:
        expected += layer.bias.double()
    return float((found.double() - expected).norm() / expected.norm())


@amx
@pytest.mark.parametrize("kind", Kind)
def test_as_exact_as_float32_for_every_number_of_tokens(kind: Kind) -> None:
    """Groups of 1, 4, 8 and 16 tokens, several of them, and all the remainders."""
    tiles, vectors = both(kind, 83, 300, bias=True)
    for tokens in range(1, 68):
        x = torch.randn(tokens, 300)
        assert error(tiles(x), x, tiles) < max(5e-7, 2 * error(vectors(x), x, vectors))


@amx
@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize(
    ("rows", "columns", "tokens"), [(1, 1, 1), (15, 31, 300), (16, 32, 257), (17, 33, 512), (260, 1000, 90)]
)
def test_prompts_equal_the_oracle(kind: Kind, rows: int, columns: int, tokens: int) -> None:
    """More tokens, rows and blocks than are held at a time, and fewer than a tile."""
    tiles, _ = both(kind, rows, columns)
    x = torch.randn(tokens, columns)
    assert error(tiles(x), x, tiles) < 1e-6


@amx
@pytest.mark.parametrize("kind", Kind)
def test_small_and_large_numbers_side_by_side(kind: Kind) -> None:
    """Each token keeps its 24 bits, whatever its size and that of its neighbours."""
    tiles, _ = both(kind, 40, 128)
    x = torch.randn(24, 128) * torch.logspace(-25, 25, 24)[:, None]
    y = tiles(x)
    for token in range(24):
        assert error(y[token], x[token], tiles) < 1e-6


@amx
@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_numbers_that_are_not_finite_stay_in_their_token(kind: Kind, tokens: int) -> None:
    tiles, vectors = both(kind, 33, 64)
    x = torch.randn(tokens, 64)
    clean = tiles(x)
    for value in (float("inf"), float("-inf"), float("nan")):
        bad = x.clone()
        bad[-1, 5] = value
        found, expected = tiles(bad), vectors(bad)
        assert torch.equal(found[:-1], clean[:-1])
        assert torch.equal(found[-1].isfinite(), expected[-1].isfinite())
        if kind in (Kind.BF16, Kind.INT8):  # others add infinite parts, which may be of either sign
            assert torch.equal(found[-1].isnan(), expected[-1].isnan())


@amx
@pytest.mark.parametrize("kind", Kind)
def test_the_smallest_numbers_count_as_zero_at_worst(kind: Kind) -> None:
    tiles, vectors = both(kind, 20, 64)
    x = torch.randn(4, 64) * torch.tensor([[1e-41], [1e-38], [1e-35], [1e-33]])
    torch.testing.assert_close(tiles(x), vectors(x), rtol=1e-5, atol=1e-35)


@amx
@pytest.mark.parametrize("kind", Kind)
def test_bits_do_not_depend_on_neighbours_or_threads(kind: Kind) -> None:
    """Also between prompts and single tokens, which have other tiles."""
    tiles, _ = both(kind, 150, 700, bias=True)
    x = torch.randn(300, 700)
    together, threads = tiles(x), torch.get_num_threads()
    for tokens in (1, 2, 4, 7, 16, 33, 65):
        assert torch.equal(tiles(x[:tokens]), together[:tokens])
    try:
        torch.set_num_threads(1)
        assert torch.equal(tiles(x), together)
    finally:
        torch.set_num_threads(threads)


@amx
def test_threads_and_torch_keep_their_tiles_apart() -> None:
    """Shapes of tiles belong to a thread, and torch's own bfloat16 products use them too."""
    layers = [both(kind, 64, 256)[0] for kind in (Kind.BF16, Kind.Q4_1, Kind.F16)]
    other = nn.Linear(256, 64, bias=False).bfloat16().requires_grad_(False)
    inputs = [torch.randn(tokens, 256) for tokens in (1, 5, 16, 40)]
    plain = [other(x.bfloat16()) for x in inputs]
    expected = [[layer(x) for x in inputs] for layer in layers]

    def work(number: int) -> bool:
        same = True
        for turn in range(20):
            which = (number + turn) % len(inputs)
            same &= torch.equal(other(inputs[which].bfloat16()), plain[which])
            for layer, known in zip(layers, expected, strict=True):
                same &= torch.equal(layer(inputs[which]), known[which])
        return same

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


@native
@pytest.mark.parametrize("tokens", [1, 5, FEW + 6])
def test_a_set_that_is_not_there_falls_back(tokens: int) -> None:
    """Asked for by name on any processor, it is answered with the best that there is."""
    packed = pack(torch.randn(50, 96), Kind.Q8_0)
    x = torch.randn(tokens, 96)
    found = StoredLinear(packed, instructions=Instructions.AMX)(x)
    assert torch.equal(found, StoredLinear(packed)(x))


@native
def test_the_processor_is_asked_as_linux_asks_it() -> None:
    """What /proc/cpuinfo does not show is not used; where it shows AMX, the library has a word for it."""
    try:
        with open("/proc/cpuinfo") as lines:
            flags = next((line.split() for line in lines if line.startswith("flags")), [])
    except OSError:
        pytest.skip("no /proc/cpuinfo")
    if Instructions.AMX in instruction_sets():
        assert {"amx_tile", "amx_bf16", "avx512bw"} <= set(flags)
    if Instructions.AVX512 in instruction_sets():
        assert {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= set(flags)


REFUSED = """
import ctypes, struct, sys
ask, syscall, refuse, allow = 0x1023, 158, 0x00050001, 0x7FFF0000
code = [(0x20, 0, 0, 0), (0x15, 0, 3, syscall), (0x20, 0, 0, 16), (0x15, 0, 1, ask), (0x06, 0, 0, refuse),
        (0x06, 0, 0, allow)]
program = b"".join(struct.pack("HBBI", *one) for one in code)
room = ctypes.create_string_buffer(program)
class Filter(ctypes.Structure):
    _fields_ = [("count", ctypes.c_ushort), ("code", ctypes.c_void_p)]
libc = ctypes.CDLL(None)
filter = Filter(len(code), ctypes.addressof(room))
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(filter), 0, 0):
    sys.exit(77)
import torch
from loramux.kernels.packed_linear import Instructions, Kind, StoredLinear, instruction_sets, pack
assert Instructions.AMX not in instruction_sets(), instruction_sets()
layer = StoredLinear(pack(torch.ones(20, 64), Kind.BF16), instructions=Instructions.AMX)
assert torch.equal(layer(torch.ones(5, 64)), torch.full((5, 20), 64.0))
"""


@amx
def test_refused_permission_means_vectors() -> None:
    """The system may refuse a process its tiles: in a child a filter (seccomp) answers the request so."""
    done = subprocess.run([sys.executable, "-c", REFUSED], check=False, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("this system lets no process filter its calls")
    assert done.returncode == 0, done.stderr
