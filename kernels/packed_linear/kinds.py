"""The ways in which a matrix may be stored, and their plain form in torch: what the compiled kernels are
tested against."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn import functional as F

#: Values that are packed at a time.
_PIECE = 2**19
#: Values of a block; rows are filled up with zeros to a multiple of it.
BLOCK = 32


class Kind(StrEnum):
    """How a matrix is stored.

    `Q8_0`, `Q4_0` and `Q4_1` are GGUF's: blocks of 32 values of a row, as they lie in the file. Scales (d, m)
    are float16 and come first; of 16 bytes of nibbles, the low ones are the first 16 values. `INT8` has one
    float32 scale a row.
    """

    BF16 = "bf16"
    F16 = "f16"
    INT8 = "int8"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"
    Q4_1 = "q4_1"
    F32 = "f32"

    @property
    def block_bytes(self) -> int:
        return _BLOCK_BYTES[self]

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix."""
        scales = 4 * rows if self is Kind.INT8 else 0
        return rows * -(-columns // BLOCK) * self.block_bytes + scales


_BLOCK_BYTES = {
    Kind.BF16: 64, Kind.F16: 64, Kind.INT8: 32, Kind.Q8_0: 34, Kind.Q4_0: 18, Kind.Q4_1: 20, Kind.F32: 128,
}  # fmt: skip
#: Kinds whose blocks are numbers of a type of torch's.
_TYPES = {Kind.F32: torch.float32, Kind.BF16: torch.bfloat16, Kind.F16: torch.float16}


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix of `columns` columns: data uint8 [rows, bytes of a row], contiguous; of int8, scales float32
    [rows]."""

    kind: Kind
    columns: int
    data: Tensor
    scales: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.data.shape[0]

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return self.data.shape[1] // self.kind.block_bytes

    @classmethod
    def from_blocks(cls, data: Tensor, kind: Kind | str) -> "Packed":
        """Rows of blocks as a GGUF file has them.

        Args:
            data: uint8 [rows, bytes of a row] on the CPU.
            kind: `Q4_0`, `Q4_1`, `Q8_0`, `F32`, `F16` or `BF16`, in any case.

        Raises:
            ValueError: there is no such kind, or the rows are no whole number of blocks.
        """
        try:
            known = Kind(kind.lower())
        except ValueError:
            known = Kind.INT8
        if known is Kind.INT8:
            raise ValueError(f"there is no kernel for blocks of the kind {kind!r}")
        if data.dtype != torch.uint8 or data.dim() != 2 or data.shape[1] % known.block_bytes:
            raise ValueError(
                f"rows of {known} are uint8 in multiples of {known.block_bytes}, not {data.dtype} "
                f"{list(data.shape)}"
            )
        return cls(known, data.shape[1] // known.block_bytes * BLOCK, data.contiguous())


@torch.no_grad()
def pack(weight: Tensor, kind: Kind) -> Packed:
    """Store a matrix [rows, columns] of any floating type.

    `BF16` of a bfloat16 matrix whose rows are whole blocks keeps its memory, and so it is with `F16` and
    `F32`. 4 and 8 bits are rounded to the nearest, some rows at a time: beside a large matrix there is no
    copy in float32.
    """
    rows, columns = weight.shape
    if kind in _TYPES:
        return Packed(kind, columns, _filled(weight.to(_TYPES[kind])).contiguous().view(torch.uint8))
    data = torch.empty(rows, -(-columns // BLOCK) * kind.block_bytes, dtype=torch.uint8)
    scales = torch.empty(rows) if kind is Kind.INT8 else None
    step = max(1, _PIECE // columns)
    for first in range(0, rows, step):
        piece = slice(first, first + step)
        values = _filled(weight[piece].float())
        if scales is not None:
            scales[piece] = _or_one(values.abs().amax(1) / 127)
            numbers = (values / scales[piece, None]).round_().to(torch.int8)
            data[piece] = numbers.view(torch.uint8)
        else:
            blocks = values.view(values.shape[0], -1, BLOCK)
            data[piece] = _PACK[kind](blocks).flatten(1)
    return Packed(kind, columns, data, scales)


@torch.no_grad()
def unpack(packed: Packed) -> Tensor:
    """The matrix as float32 [rows, columns]: the reference."""
    data, rows = packed.data, packed.rows
    if packed.kind in _TYPES:
        weight = data.view(_TYPES[packed.kind]).float()
    elif packed.scales is not None:
        weight = data.view(torch.int8).float() * packed.scales[:, None]
    else:
        blocks = data.view(rows, -1, packed.kind.block_bytes)
        weight = _UNPACK[packed.kind](blocks).reshape(rows, -1)
    return weight[:, : packed.columns]


def _filled(weight: Tensor) -> Tensor:
    """With columns of zeros up to a whole block."""
    missing = -weight.shape[1] % BLOCK
    return F.pad(weight, (0, missing)) if missing else weight


def _or_one(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 1.0, scales)


def _bytes(halves: Tensor) -> Tensor:
    """float16 [...] as uint8 [..., 2]."""
    return halves.half()[..., None].view(torch.uint8)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte of every block, as float32 [..., 1]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(numbers: Tensor) -> Tensor:
    """[..., 32] whole numbers from 0 to 15 as 16 bytes."""
    numbers = numbers.to(torch.uint8)
    return numbers[..., :16] | (numbers[..., 16:] << 4)


def _numbers(nibbles: Tensor) -> Tensor:
    return torch.cat([nibbles & 15, nibbles >> 4], dim=-1).float()


def _q8_0(blocks: Tensor) -> Tensor:
    d = (blocks.abs().amax(-1) / 127).half()
    numbers = (blocks / _or_one(d.float())[..., None]).round_().clamp_(-127, 127).to(torch.int8)
    return torch.cat([_bytes(d), numbers.view(torch.uint8)], dim=-1)


def _q4_0(blocks: Tensor) -> Tensor:
    # The value furthest from zero becomes -8, whatever its sign: there are levels from -8 to 7.
    furthest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))[..., 0]
    d = (furthest / -8).half()
    numbers = (blocks / _or_one(d.float())[..., None]).round_().add_(8).clamp_(0, 15)
    return torch.cat([_bytes(d), _nibbles(numbers)], dim=-1)


def _q4_1(blocks: Tensor) -> Tensor:
    least, most = blocks.aminmax(dim=-1)
    m, d = least.half(), ((most - least) / 15).half()
    numbers = ((blocks - m.float()[..., None]) / _or_one(d.float())[..., None]).round_().clamp_(0, 15)
    return torch.cat([_bytes(d), _bytes(m), _nibbles(numbers)], dim=-1)


_PACK: dict[Kind, Callable[[Tensor], Tensor]] = {Kind.Q8_0: _q8_0, Kind.Q4_0: _q4_0, Kind.Q4_1: _q4_1}
_UNPACK: dict[Kind, Callable[[Tensor], Tensor]] = {
    Kind.Q8_0: lambda b: _half(b, 0) * b[..., 2:].view(torch.int8).float(),
    Kind.Q4_0: lambda b: _half(b, 0) * (_numbers(b[..., 2:]) - 8),
    Kind.Q4_1: lambda b: _half(b, 0) * _numbers(b[..., 4:]) + _half(b, 2),
}
