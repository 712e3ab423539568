"""How a model of transformers reads and writes the paged cache: through an attention function of ours."""

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from loramux.kernels.paged_attention import Rows, Scores, choose_form, prompt_attention, store_

#: Its name in a model's config. Transformers makes no mask for a name that it has no mask function for.
PAGED = "loramux_paged"
#: Under which name a module of a model finds the cache. Not every model passes on what its forward is given.
_ATTACHED = "_loramux_paged"
#: Bytes of a cache line, at which the cache on a CPU begins.
_LINE = 64


@dataclass(frozen=True, eq=False, slots=True)
class Piece:
    """Tokens of one prompt in a packed batch.

    Attributes:
        tokens: their places in the batch.
        start: how many tokens of the sequence came before them.
        pages: of the whole sequence, as far as it is computed after this step.
    """

    tokens: slice
    start: int
    pages: Items[int]

    @property
    def end(self) -> int:
        return int(self.start + self.tokens.stop - self.tokens.start)


class PagedAttention:
    """The cache's tensors, and what the current step needs to find its way in them.

    Each layer's keys and values are [pages, page size, kv heads, dim], made when the layer first attends. One
    page more than `pages` belongs to nobody: rows of padding are written there.
    """

    def __init__(self, pages: int, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.pages = pages
        self.page_size = page_size
        self._dtype = dtype
        self._device = device
        self.form = choose_form(device, dtype)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._scores: dict[int, Scores] = {}
        self._rows: Rows | None = None
        self._count = 0
        self._slots: Tensor | None = None
        self._pieces: Items[Piece] = ()
        self._places: dict[tuple[int, int | None], slice | Tensor] = {}

    def attach(self, model: nn.Module) -> None:
        """Let every layer of the model find this cache."""
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, _ATTACHED, self)

    @staticmethod
    def detach(model: nn.Module) -> None:
        """Let no layer of the model find a cache."""
        for module in model.modules():
            if hasattr(module, _ATTACHED):
                delattr(module, _ATTACHED)

    @property
    def padding_slot(self) -> int:
        """Where rows of padding are written."""
        return self.pages * self.page_size

    @property
    def layers(self) -> int:
        """Layers that have attended so far."""
        return len(self._layers)

    def plan(self, rows: Rows | None, slots: Tensor | None = None, pieces: Items[Piece] = ()) -> None:
        """The next step: single tokens first, then pieces of prompts, which go to `slots`."""
        self._rows, self._slots, self._pieces = rows, slots, pieces
        self._places.clear()
        self._count = 0 if rows is None else rows.lengths.shape[0]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Query [T, heads, dim], key and value [T, kv heads, dim] of all tokens of the step; the result is
        [T, heads, value dim]."""
        keys, values = self._layers.get(layer) or self._make(layer, key, value)
        count = self._count
        if not self._pieces:
            assert self._rows is not None  # a step has tokens
            return self.form.attend(query, key, value, keys, values, self._rows, scores)
        assert self._slots is not None  # given with the pieces
        out = query.new_empty(*query.shape[:2], value.shape[-1])
        if self._rows is not None:
            mine = (query[:count], key[:count], value[:count])
            out[:count] = self.form.attend(*mine, keys, values, self._rows, scores)
        store_(keys, values, key[count:], value[count:], self._slots)
        for number, piece in enumerate(self._pieces):
            at = piece.tokens
            if piece.start:
                sides = self._taken(number, keys, scores.window), self._taken(number, values, scores.window)
            else:  # a prompt from its first token on needs nothing from the cache
                sides = key[at], value[at]
            out[at] = prompt_attention(query[at], *sides, scores)
        return out

    def scores_of(self, layer: int, module: nn.Module, scale: float, options: dict[str, Any]) -> Scores:
        """How a layer makes weights, which it says anew in each step and never changes."""
        found = self._scores.get(layer)
        if found is None:
            sinks = options.get("s_aux")
            sinks = getattr(module, "sinks", None) if sinks is None else sinks
            sinks = None if sinks is None else sinks.float()
            found = Scores(scale, options.get("sliding_window"), options.get("softcap"), sinks)
            self._scores[layer] = found
        return found

    def side(self, layer: int) -> tuple[Tensor, Tensor, Scores] | None:
        """Keys and values of a layer, and how it makes weights; `None` before it first attends."""
        found, scores = self._layers.get(layer), self._scores.get(layer)
        return None if found is None or scores is None else (*found, scores)

    def _make(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if key.dtype != self._dtype:
            raise ValueError(f"layer {layer} has {key.dtype} keys, the cache was planned for {self._dtype}")
        shape = (self.pages + 1, self.page_size)
        made = tuple(_zeros((*shape, *part.shape[1:]), self._dtype, self._device) for part in (key, value))
        self._layers[layer] = pair = (made[0], made[1])
        return pair

    def _taken(self, number: int, cache: Tensor, window: int | None) -> Tensor:
        """All of a sequence's tokens that a piece may see, [n, kv heads, dim]; a view where its pages are
        neighbours."""
        piece = self._pieces[number]
        first = self._first_page(piece, window)
        count = piece.end - first * self.page_size
        place = self._places.get((number, window))
        if place is None:  # the same in every layer of this window
            place = self._places[number, window] = self._place(piece, first)
        return cache[place].flatten(0, 1)[:count]

    def _first_page(self, piece: Piece, window: int | None) -> int:
        return 0 if window is None else max(0, piece.start - window) // self.page_size

    def _place(self, piece: Piece, first: int) -> slice | Tensor:
        """Where a sequence's pages lie, from its page `first` on."""
        pages = piece.pages[first : -(-piece.end // self.page_size)]
        if all(after - before == 1 for before, after in pairwise(pages)):
            return slice(pages[0], pages[-1] + 1)
        return torch.tensor(pages, device=self._device)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - the interface passes it; here every sequence is causal
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as `AttentionInterface` has it: query [1, heads, T, dim], key and value [1, kv heads, T,
    dim], packed over the batch's sequences; the result is [1, T, heads, dim].

    Raises:
        ValueError: nobody attached a cache to the module.
    """
    paged = getattr(module, _ATTACHED, None)
    if not isinstance(paged, PagedAttention):
        raise ValueError(f"{type(module).__name__} was attached to no paged cache")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    scores = paged.scores_of(layer, module, scale, options)
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    return paged.attend(layer, query, key, value, scores).unsqueeze(0), None


AttentionInterface.register(PAGED, paged_attention)


def _zeros(shape: Items[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU memory that the system has not given yet: a page of it comes with the first token
    written there, so that a cache for long contexts costs neither time nor memory before it is used."""
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    flat = torch.from_numpy(np.zeros(size + _LINE, np.uint8))
    start = -flat.data_ptr() % _LINE
    return flat[start : start + size].view(dtype).view(*shape)
