"""`y = x Wᵀ + b` on a CPU for the few tokens of a decode step, which waits for W to come from memory.

Either W is laid out once for the processor in float32 (`pack_linears`), or it stays as it is stored, in 16, 8
or 4 bits, and is widened in registers (`store_weights`).
"""

from loramux.kernels.packed_linear.kinds import BLOCK, Kind, Packed, pack, unpack
from loramux.kernels.packed_linear.measure import Timing, time_product
from loramux.kernels.packed_linear.native import Instructions, instruction_sets, library
from loramux.kernels.packed_linear.onednn import PackedLinear, can_pack, direct_linears, pack_linears
from loramux.kernels.packed_linear.store import Kinds, storable, store_weights
from loramux.kernels.packed_linear.stored import FEW, StoredEmbedding, StoredLinear

__all__ = [
    "BLOCK",
    "FEW",
    "Instructions",
    "Kind",
    "Kinds",
    "Packed",
    "PackedLinear",
    "StoredEmbedding",
    "StoredLinear",
    "Timing",
    "can_pack",
    "direct_linears",
    "instruction_sets",
    "library",
    "pack",
    "pack_linears",
    "storable",
    "store_weights",
    "time_product",
    "unpack",
]
