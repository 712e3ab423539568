"""Products of a few rows with a large matrix, whose bits do not depend on what else is in the batch."""

from typing import Any

import numpy as np
import numpy.typing as npt

#: Up to this many experts one product of all rows is as good as any.
FEW = 256
#: Bytes of the matrix that are multiplied with every row while a core's cache holds them.
_BLOCK_BYTES = 1 << 19


def products(matrix: npt.NDArray[Any], rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Inner products [n, k] of rows [n, d] with every row of `matrix` [k, d], both of one type.

    BLAS adds in another order when it multiplies several vectors at once, so each row has products of its
    own; block by block, the matrix still comes from memory only once.
    """
    count, dimension = matrix.shape
    result = np.empty((len(rows), count), matrix.dtype)
    height = max(1, _BLOCK_BYTES // max(1, dimension * matrix.itemsize))
    for start in range(0, count, height):
        block = matrix[start : start + height]
        for row, found in zip(rows, result[:, start : start + height], strict=True):
            np.dot(block, row, out=found)
    return result
