"""The operator as torch offers it: every row gathers its pages. Works on every device, in every shape."""

from torch import Tensor

from loramux.kernels.paged_attention.prompt import prompt_attention
from loramux.kernels.paged_attention.rows import Rows, Scores, store_


class GatheredForm:
    """Row by row; the form of last resort."""

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
        store_(keys, values, key, value, rows.slots)
        page = keys.shape[1]
        out = query.new_empty(*query.shape[:2], value.shape[-1])
        for row, length in enumerate(rows.lengths.tolist()):
            first = 0 if scores.window is None else max(0, length - scores.window) // page
            pages = rows.tables[row, first : -(-length // page)].long()
            used = slice(0, length - first * page)
            out[row] = prompt_attention(
                query[row : row + 1],
                keys[pages].flatten(0, 1)[used],
                values[pages].flatten(0, 1)[used],
                scores,
            )[0]
        return out
