"""The operator in C++ for a CPU (`native.cpp`): one call a layer, which stores and attends."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from loramux.kernels.compiled import compiled
from loramux.kernels.paged_attention.gathered import GatheredForm
from loramux.kernels.paged_attention.rows import Rows, Scores

FUNCTIONS = {torch.float32: "paged_attention_f32", torch.bfloat16: "paged_attention_bf16"}
#: Dimensions of heads are worked on eight at a time.
LANES = 8
#: Below this many products a layer is not worth waking a second thread for.
_SERIAL = 65536


class _Rows(ctypes.Structure):
    """`Rows` of native.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("tables", "lengths", "slots")),
        *((name, ctypes.c_int64) for name in ("count", "table_stride", "page", "threads")),
    ]


class _Layer(ctypes.Structure):
    """`Layer` of native.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "dim", "value_dim", "window")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or `None` where the package was installed without a C++ compiler."""
    found = compiled(__file__)
    if found is not None:
        for name in FUNCTIONS.values():
            function = getattr(found, name)
            function.argtypes = [ctypes.c_void_p] * 9
            function.restype = None
    return found


class NativeForm:
    """Every row reads its own pages where they lie.

    Raises:
        RuntimeError: when made without a library, or for a dtype that it has no kernel for.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        found, name = library(), FUNCTIONS.get(dtype)
        if found is None or name is None:
            raise RuntimeError(f"there is no native paged_attention for {dtype} here")
        self.function = getattr(found, name)
        self._dtype = dtype
        self._other = GatheredForm()
        self._layers: dict[tuple[object, ...], _Layer] = {}
        self._rows: Rows | None = None
        self._call = _Rows()
        self._address = ctypes.addressof(self._call)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: Rows,
        scores: Scores,
    ) -> Tensor:
        if query.shape[-1] % LANES or value.shape[-1] % LANES or query.dtype != self._dtype:
            return self._other.attend(query, key, value, keys, values, rows, scores)
        rows_at = self.take(rows, keys, query.shape[1] * query.shape[2])
        layer = self.layer((query.shape[1], key.shape[1], query.shape[2], value.shape[2]), scores)
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        out = query.new_empty(*query.shape[:2], value.shape[-1])
        sinks = None if scores.sinks is None else scores.sinks.float().contiguous()
        self.function(
            rows_at, ctypes.addressof(layer), query.data_ptr(), key.data_ptr(), value.data_ptr(),
            keys.data_ptr(), values.data_ptr(), out.data_ptr(), None if sinks is None else sinks.data_ptr(),
        )  # fmt: skip
        return out

    def take(self, rows: Rows, keys: Tensor, width: int) -> int:
        """The address of what the library is told about a step's rows; `width` is that of a row's query."""
        if rows is self._rows:
            return self._address
        call = self._call
        call.tables, call.lengths = rows.tables.data_ptr(), rows.lengths.data_ptr()
        call.slots, call.count = rows.slots.data_ptr(), rows.lengths.shape[0]
        call.table_stride, call.page = rows.tables.stride(0), keys.shape[1]
        products = int(rows.lengths.sum()) * width
        call.threads = torch.get_num_threads() if products >= _SERIAL else 1
        self._rows = rows  # also keeps the tensors alive, whose addresses the call has
        return self._address

    def layer(self, shape: tuple[int, int, int, int], scores: Scores) -> _Layer:
        """What the library is told about a layer of (heads, kv heads, dim, value dim); lives as long as this
        form."""
        made = self._layers.get((*shape, scores.scale, scores.window, scores.softcap))
        if made is None:
            made = _Layer(*shape, scores.window or 0, scores.scale, scores.softcap or 0.0)
            self._layers[(*shape, scores.scale, scores.window, scores.softcap)] = made
        return made
