"""What every form of the operator offers."""

from typing import Protocol

from torch import Tensor

from loramux.kernels.paged_attention.rows import Rows, Scores


class Form(Protocol):
    """One way to compute a decode step's attention over a paged cache."""

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
        """Store the new token of each row, then attend to all tokens of the row.

        Args:
            query: [R, heads, dim]; key and value: [R, kv heads, dim], of the new tokens.
            keys, values: the layer's cache, [pages, page size, kv heads, dim], written to.

        Returns:
            [R, heads, value dim].
        """
        ...
