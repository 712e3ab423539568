"""A GGUF file: its metadata, and where each tensor lies in it.

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3. The header
is read here and not with `gguf.GGUFReader`, which makes several arrays of every token of a vocabulary: six
seconds for 49 thousand tokens and 23 for 262 thousand, where this takes a half and one.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from loramux.server.engine.model import BaseModelError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_SCALARS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.BOOL: "?",
    GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h", GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i", GGUFValueType.FLOAT32: "f", GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q", GGUFValueType.FLOAT64: "d",
}  # fmt: skip


class GgufError(BaseModelError):
    """A GGUF file cannot be used; the message names the file, the place in it and the reason."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `shape` in torch's order (rows, columns), `start` and `size` in bytes of the file."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    size: int


class GgufFile:
    """An open GGUF file.

    Attributes:
        path: where it lies.
        metadata: every key; arrays are lists.
        tensors: by name, in the order of the file.
    """

    def __init__(
        self, path: Path, data: mmap.mmap, metadata: dict[str, Any], tensors: dict[str, TensorInfo]
    ) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors
        self._data = data

    @classmethod
    def read(cls, path: Path) -> GgufFile:
        """Read the header; no tensor is touched.

        Raises:
            GgufError: it cannot be opened, is no GGUF file, ends too early, or holds an unknown type.
        """
        try:
            with path.open("rb") as file:
                if file.read(len(MAGIC)) != MAGIC:
                    raise GgufError(f"{path}: not a GGUF file: it does not begin with {MAGIC.decode()}")
                # Private and writable: torch takes no read-only array, and nothing is ever written.
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise GgufError(f"{path}: {error.strerror or error}") from None
        metadata, tensors = _Header(path, data).read()
        return cls(path, data, metadata, tensors)

    @property
    def architecture(self) -> str:
        """`general.architecture`, e.g. `llama`.

        Raises:
            GgufError: the file does not say.
        """
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise GgufError(f"{self.path}: its metadata has no general.architecture")
        return name

    def bytes_of(self, name: str) -> npt.NDArray[np.uint8]:
        """A tensor as it lies in the file, uint8 [rows, bytes per row]; a vector is one row. Not to be
        written to."""
        info = self.tensors[name]
        flat = np.frombuffer(self._data, np.uint8, info.size, info.start)
        return flat.reshape(prod(info.shape[:-1]), -1)


class _Header:
    """A cursor over the head of a file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._place = len(MAGIC)

    def read(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        version, tensor_count, key_count = self._unpack("IQQ")
        if version not in _VERSIONS:
            raise GgufError(f"{self._path}: GGUF version {version} is not read; 2 and 3 are (little-endian)")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string()
            if key in metadata:
                raise GgufError(f"{self._path}: the key {key} stands in its metadata twice")
            metadata[key] = self._value(key, self._unpack("I")[0])
        entries = [self._entry() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise GgufError(f"{self._path}: general.alignment is {alignment!r}, which is no power of two")
        start = -(-self._place // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, type_number, offset in entries:
            if name in tensors:
                raise GgufError(f"{self._path}: the tensor {name} is there twice")
            tensors[name] = self._located(name, shape, type_number, start + offset)
        return metadata, tensors

    def _located(self, name: str, shape: tuple[int, ...], number: int, start: int) -> TensorInfo:
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise GgufError(f"{self._path}: tensor {name} has the unknown type {number}") from None
        block, width = GGML_QUANT_SIZES[kind]
        if not shape or min(shape) < 1 or shape[-1] % block:
            raise GgufError(
                f"{self._path}: tensor {name} of shape {list(shape)} is not whole {kind.name} blocks"
            )
        size = prod(shape) // block * width
        if start + size > len(self._data):
            raise GgufError(
                f"{self._path}: truncated: tensor {name} ends at byte {start + size:,}, "
                f"the file at {len(self._data):,}; fetch it again"
            )
        return TensorInfo(name, kind, shape, start, size)

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (count,) = self._unpack("I")
        if count > _MAX_DIMENSIONS:
            raise GgufError(
                f"{self._path}: tensor {name} has {count} dimensions, more than {_MAX_DIMENSIONS}"
            )
        dimensions = self._unpack(f"{count}Q")
        number, offset = self._unpack("IQ")
        # The fastest-moving dimension comes first in the file.
        return name, tuple(reversed(dimensions)), number, offset

    def _value(self, key: str, number: int) -> Any:
        kind = self._kind(key, number)
        if kind is GGUFValueType.FLOAT32:
            # 1e-05 and not 9.999999747378752e-06: the shortest number that is the same in 32 bits.
            return float(str(np.float32(self._unpack("f")[0])))
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind])[0]
        if kind is GGUFValueType.STRING:
            return self._string()
        number, count = self._unpack("IQ")
        kind = self._kind(key, number)
        if kind in _SCALARS:
            return list(self._unpack(f"{count}{_SCALARS[kind]}"))
        if kind is GGUFValueType.STRING:
            return [self._string() for _ in range(count)]
        raise GgufError(f"{self._path}: {key} is an array of arrays, which is not read")

    def _kind(self, key: str, number: int) -> GGUFValueType:
        try:
            return GGUFValueType(number)
        except ValueError:
            raise GgufError(f"{self._path}: {key} has the unknown value type {number}") from None

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        end = self._place + length
        if end > len(self._data):
            raise self._too_short()
        raw = self._data[self._place : end]
        self._place = end
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise GgufError(f"{self._path}: damaged: the text before byte {end:,} is not UTF-8") from None

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        layout = f"<{layout}"
        try:
            size = struct.calcsize(layout)
            if self._place + size > len(self._data):
                raise self._too_short()
        except (struct.error, OverflowError):
            # A count that no memory could hold.
            raise self._too_short() from None
        values = struct.unpack_from(layout, self._data, self._place)
        self._place += size
        return values

    def _too_short(self) -> GgufError:
        return GgufError(
            f"{self._path}: truncated or damaged: what stands at byte {self._place:,} goes beyond the end of "
            f"the file, {len(self._data):,}; fetch it again"
        )
