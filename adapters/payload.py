"""All numbers of a safetensors file at once.

Reading one tensor after another costs some ten microseconds each whatever its size, which in a pool of
thousands of small adapters is most of the start.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
#: Larger files are read tensor by tensor: there a copy of everything costs more than it saves.
MAX_BYTES = 8 << 20
#: Numbers are only moved here, so that integers of their size stand for them: NumPy has no bfloat16.
_WORDS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, slots=True)
class Payload:
    """The numbers of a file in one row, converted, and where the tensors lie in it: (first, shape) by key."""

    numbers: Tensor
    places: dict[str, tuple[int, tuple[int, ...]]]

    @classmethod
    def read(cls, path: Path, dtype: torch.dtype) -> Payload | None:
        """Of a file that safetensors has opened and found in order; `None` where tensors are better read one
        by one: a large file, or one of several types."""
        if path.stat().st_size > MAX_BYTES:
            return None
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        kinds = {entry["dtype"] for entry in header.values()}
        if len(kinds) != 1 or not kinds <= DTYPES.keys():
            return None
        stored = DTYPES[kinds.pop()]
        numbers = torch.frombuffer(data, dtype=stored, offset=start).to(dtype)
        return cls(
            numbers,
            {
                key: (entry["data_offsets"][0] // stored.itemsize, tuple(entry["shape"]))
                for key, entry in header.items()
            },
        )

    def fill(self, keys: Sequence[str], target: Tensor) -> None:
        """Copy the tensors of `keys` into the rows of `target`, which has their shape and this type."""
        words = _WORDS[self.numbers.dtype.itemsize]
        source, rows = self.numbers.view(words).numpy(), target.view(words).numpy()
        for row, key in enumerate(keys):
            first, shape = self.places[key]
            rows[row] = source[first : first + shape[0] * shape[1]].reshape(shape)
