"""Layers whose weights stay as they are stored: a step reads two to seven times fewer bytes than in
float32."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loramux.kernels.packed_linear.kinds import Kind, Packed, unpack
from loramux.kernels.packed_linear.native import Instructions, NativeMatrix, library
from loramux.kernels.packed_linear.onednn import multiply

#: For more tokens than this, rows are widened once and multiplied by oneDNN; not where there is AMX, nor
#: where rows have to be computed alike.
FEW = 64
#: Values that are widened at a time then: they stay in a cache that threads share.
_PIECE = 2**20


class StoredLinear(nn.Linear):
    """`y = x Wᵀ + b` in float32 with W as it is stored; y has the type of x. Frozen, and without a gradient
    for x. Its weight tells its shape and has no elements.

    Without the compiled library, weights are widened by torch in every call.

    Args:
        invariant: a row of y depends on its row of x alone, to the last bit; without it, many rows are left
            to oneDNN, which is faster and adds up in an order that depends on their number. Needs the
            library.
    """

    def __init__(
        self,
        packed: Packed,
        bias: Tensor | None = None,
        *,
        invariant: bool = False,
        instructions: Instructions = Instructions.BEST,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = packed.columns, packed.rows
        self.packed = packed
        self.weight = torch.empty(packed.rows, packed.columns, device="meta")
        kept = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)
        self.register_parameter("bias", kept)
        _hold(self, packed)
        self.native = None if library() is None else NativeMatrix(packed, self.bias, instructions)
        self._all_alike = invariant or (self.native is not None and self.native.takes_many)
        self._plain = unpack(packed) if packed.kind is Kind.F32 else None

    def forward(self, x: Tensor) -> Tensor:
        native = self.native
        if native is None:
            return F.linear(x.float(), unpack(self.packed), self.bias).to(x.dtype)
        tokens = x.numel() // self.in_features
        y = native.multiply(x) if tokens <= FEW or self._all_alike else self._many(native, x)
        return y if x.dtype == torch.float32 else y.to(x.dtype)

    def _many(self, native: NativeMatrix, x: Tensor) -> Tensor:
        """For the many tokens of a prompt, large products are faster."""
        flat = x.reshape(-1, self.in_features).float()
        rows = max(1, _PIECE // self.in_features)
        if self._plain is not None or rows >= self.out_features:
            weight = native.widen(0, self.out_features) if self._plain is None else self._plain
            y = multiply(flat, weight, self.bias)
        else:
            y = flat.new_empty(flat.shape[0], self.out_features)
            for first in range(0, self.out_features, rows):
                piece = slice(first, min(first + rows, self.out_features))
                bias = None if self.bias is None else self.bias[piece]
                y[:, piece] = multiply(flat, native.widen(first, piece.stop - first), bias)
        return y.view(*x.shape[:-1], self.out_features)


class StoredEmbedding(nn.Embedding):
    """Rows of a stored matrix in float32, times `scale` (Gemma's embeddings have one)."""

    def __init__(self, packed: Packed, scale: float = 1.0) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = packed.rows, packed.columns
        self.packed = packed
        self.scale = scale
        self.weight = torch.empty(packed.rows, packed.columns, device="meta")
        _hold(self, packed)
        self._native = None if library() is None else NativeMatrix(packed)

    def forward(self, ids: Tensor) -> Tensor:
        """
        Raises:
            IndexError: there is no such row.
        """
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_embeddings:
            raise IndexError(f"an embedding of {self.num_embeddings} rows was asked for another")
        if self._native is None:
            scales = None if self.packed.scales is None else self.packed.scales[ids.flatten()]
            some = Packed(self.packed.kind, self.packed.columns, self.packed.data[ids.flatten()], scales)
            rows = unpack(some).view(*ids.shape, -1)
        else:
            rows = self._native.take(ids)
        return rows if self.scale == 1.0 else rows * self.scale


def _hold(module: nn.Module, packed: Packed) -> None:
    """Make the tensors known as the module's; bytes, which no change of dtype touches."""
    module.register_buffer("data", packed.data)
    if packed.scales is not None:
        module.register_buffer("row_scales", packed.scales)
