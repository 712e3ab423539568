"""The operator in C++ for a CPU (`native.cpp`), where its library was built."""

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from loramux.kernels.compiled import compiled
from loramux.kernels.gated_lora.blocks import RowBlock, row_blocks
from loramux.kernels.gated_lora.form import Bound, BoundAll, bind_each
from loramux.kernels.gated_lora.plan import BARE, Plan

#: (dtype of activations, dtype of factors) -> kernel
FUNCTIONS = {
    (torch.float32, torch.float32): "gated_lora_f32_f32",
    (torch.float32, torch.bfloat16): "gated_lora_f32_bf16",
    (torch.bfloat16, torch.bfloat16): "gated_lora_bf16_bf16",
}
#: Rows and tokens that one thread takes at a time, as native.cpp has them.
STRIP_ROWS, STRIP_TOKENS = 4, 24
#: Below this many products a module is not worth waking a second thread for.
SERIAL = 32768
SHRINK, EXPAND, BOTH = 1, 2, 3


class Call(ctypes.Structure):
    """`Call` of native.cpp."""

    _fields_ = [
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("n_in", ctypes.c_int64),
        ("n_out", ctypes.c_int64),
        ("block", ctypes.c_void_p),
        ("blocks", ctypes.c_int64),
        ("strip", ctypes.c_void_p),
        ("strips", ctypes.c_int64),
        ("tokens", ctypes.c_void_p),
        ("gates", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or `None` where the package was installed without a C++ compiler."""
    found = compiled(__file__)
    if found is not None:
        for name in FUNCTIONS.values():
            function = getattr(found, name)
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
            function.restype = None
        found.gated_lora_allow.argtypes, found.gated_lora_allow.restype = [ctypes.c_int], ctypes.c_int
        found.gated_lora_tokens_f32.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_int64]
        found.gated_lora_tokens_f32.restype = None
        for function in (found.gated_lora_shrink_f32, found.gated_lora_expand_f32):
            function.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_int64]
            function.restype = None
    return found


def allow(most: int) -> int:
    """Let the library use no wider instructions than these from now on, for tests: 1, 2 for AVX2, 3 for
    AVX-512. Returns what it uses then, 0 without a library."""
    found = library()
    return 0 if found is None else int(found.gated_lora_allow(most))


class NativeForm:
    """Every token meets the rows that its blend uses, and no others.

    Raises:
        RuntimeError: when made without a library, or for dtypes that it has no kernel for.
    """

    shares_inputs = False
    takes_tables = False

    def __init__(self, activations: torch.dtype, factors: torch.dtype) -> None:
        found = library()
        name = FUNCTIONS.get((activations, factors))
        if found is None or name is None:
            raise RuntimeError(f"there is no native gated_lora for {activations} with {factors} factors here")
        self.function = getattr(found, name)
        self._plan = BARE
        self._blocks: list[RowBlock] = []
        self._tables: dict[tuple[int, ...], Table] = {}

    def bind(self, plan: Plan, module: str, a: Tensor, b: Tensor) -> Bound | None:
        if plan is not self._plan:
            self._blocks = row_blocks(plan.segments)
            self._tables = {}
            self._plan = plan
        which = tuple(i for i, block in enumerate(self._blocks) if module in block.modules)
        if not which:
            return None
        table = self._tables.get(which)
        if table is None:
            table = self._tables[which] = Table([self._blocks[i] for i in which])
        return table.bind(self.function, a, b)

    def bind_all(
        self, plan: Plan, modules: Sequence[str], a: Sequence[Tensor], b: Sequence[Tensor]
    ) -> BoundAll | None:
        return bind_each(self, plan, modules, a, b)


class Table:
    """Some blocks in the layout that the library reads."""

    def __init__(self, blocks: list[RowBlock]) -> None:
        rows: list[tuple[int, int, int, int, int]] = []
        strips: list[tuple[int, int, int]] = []
        token_at = gate_at = 0
        for number, block in enumerate(blocks):
            lo, hi = block.extent
            count = len(block.tokens)
            rows.append((lo, hi - lo, token_at, count, gate_at))
            strips += [
                (number, row, token)
                for token in range(0, count, STRIP_TOKENS)
                for row in range(0, hi - lo, STRIP_ROWS)
            ]
            token_at += count
            gate_at += block.gate.numel()
        self._blocks = torch.tensor(rows, dtype=torch.int64)
        self._strips = torch.tensor(strips, dtype=torch.int64)
        self._tokens = torch.tensor([t for block in blocks for t in block.tokens], dtype=torch.int32)
        self._gates = torch.cat([block.gate.float().reshape(-1) for block in blocks])
        self._hidden = torch.empty_like(self._gates)
        self._products = gate_at

    def bind(self, function: "ctypes._FuncPointer", a: Tensor, b: Tensor) -> "NativeBound":
        n_in, n_out = a.shape[1], b.shape[1]
        threads = torch.get_num_threads() if self._products * (n_in + n_out) >= SERIAL else 1
        call = Call(
            a.data_ptr(), b.data_ptr(), n_in, n_out,
            self._blocks.data_ptr(), len(self._blocks), self._strips.data_ptr(), len(self._strips),
            self._tokens.data_ptr(), self._gates.data_ptr(), self._hidden.data_ptr(), threads,
        )  # fmt: skip
        return NativeBound(function, call, (self, a, b))


class NativeBound:
    """What a plan adds at one module: `bound(y, x)`, or by others of the library `function(address, ...)`."""

    def __init__(self, function: "ctypes._FuncPointer", call: Call, owners: tuple[object, ...]) -> None:
        self.address = ctypes.addressof(call)
        self._function = function
        self._owners = (call, *owners)  # the addresses are good for as long as these live

    def __call__(self, y: Tensor, x: Tensor) -> None:
        x = x.contiguous()
        self._function(self.address, y.data_ptr(), x.data_ptr(), BOTH)
