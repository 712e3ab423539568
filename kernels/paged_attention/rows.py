"""What the layers of a step share: which pages each row has, and how its scores become weights."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Rows:
    """The rows of a decode step, one new token each.

    Attributes:
        tables: int32 [R, pages], the pages of each row in order; entries beyond its length are not read.
        lengths: int32 [R], tokens in the cache once the new one is stored; at least 1.
        slots: int64 [R], where the new token goes: page * page size + offset. No two are equal, but for rows
            of padding, which all may have a page of their own.
    """

    tables: Tensor
    lengths: Tensor
    slots: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Scores:
    """How a layer makes weights: softmax of `softcap · tanh(scale · q·k / softcap)` over the last `window`
    tokens.

    Attributes:
        sinks: float32 [heads], a score of each head that takes its share of the softmax and has no value
            (gpt-oss).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def store_(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Write the keys and values [T, kv heads, dim] of new tokens to their slots [T] of a paged cache
    [pages, page size, kv heads, dim]."""
    keys.view(-1, *keys.shape[2:]).index_copy_(0, slots, key)
    values.view(-1, *values.shape[2:]).index_copy_(0, slots, value)
