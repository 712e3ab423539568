"""Cosine similarity of routing vectors to the experts' centroids, by FAISS inner product on unit rows."""

import numpy as np
import numpy.typing as npt

from .errors import RouterError
from .products import FEW, products

Vectors = npt.NDArray[np.float32]
# From 20 queries on FAISS switches to BLAS, whose last bits depend on the number of queries.
_SEARCH_ROWS = 16


class CentroidIndex:
    """IndexFlatIP over unit centroids [k, d]; every query gets all k similarities, in centroid order.

    It is exact at every size: a blend's weights, the entropy and `/v1/route` need all similarities, and so
    does the hybrid score, so there is nothing that an approximate index could leave out. With more than a few
    experts they are multiplied out, because FAISS sorts whatever it finds; docs/scale.md has the figures.
    """

    def __init__(self, centroids: Vectors) -> None:
        import faiss

        rows = np.ascontiguousarray(centroids, np.float32)
        if rows.ndim != 2 or not len(rows):
            raise RouterError(f"centroids must be a matrix [experts, dimension], got shape {rows.shape}")
        if not np.isfinite(rows).all():
            raise RouterError("centroids hold NaN or infinity")
        norms = np.linalg.norm(rows.astype(np.float64), axis=1)
        if np.abs(norms - 1).max() > 1e-3:
            worst = int(np.abs(norms - 1).argmax())
            raise RouterError(f"centroid {worst} has length {norms[worst]:.4g}, not 1")
        self._index = faiss.IndexFlatIP(rows.shape[1])
        self._index.add(rows)
        # The index's own memory, seen as an array.
        self._rows = faiss.rev_swig_ptr(self._index.get_xb(), rows.size).reshape(rows.shape)
        self._shape = rows.shape

    @property
    def shape(self) -> tuple[int, int]:
        """(experts, dimension)."""
        return self._shape

    def similarities(self, vectors: Vectors) -> Vectors:
        """[n, d] unit (or zero) rows -> inner products [n, k], the same bits alone and in a batch."""
        rows = np.ascontiguousarray(vectors, np.float32)
        count, dimension = self._shape
        if rows.ndim != 2 or rows.shape[1] != dimension:
            raise RouterError(f"vectors of shape {rows.shape} do not fit centroids of dimension {dimension}")
        if not np.isfinite(rows).all():
            raise RouterError("a routing vector holds NaN or infinity")
        norms = np.linalg.norm(rows.astype(np.float64), axis=1)
        if ((norms > 1e-6) & (np.abs(norms - 1) > 1e-3)).any():
            raise RouterError("a routing vector is not normalised to length 1")
        if count > FEW:
            return products(self._rows, rows)
        result = np.empty((len(rows), count), np.float32)
        for start in range(0, len(rows), _SEARCH_ROWS):
            chunk = rows[start : start + _SEARCH_ROWS]
            values, places = self._index.search(chunk, count)
            np.put_along_axis(result[start : start + len(chunk)], places, values, axis=1)
        return result
