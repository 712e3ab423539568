"""The blocks of a base, as containers that number layers name them: layer, self_attn or mlp, projection."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import BaseMismatchError, UnsupportedAdapterError

ATTENTION, FFN = "self_attn", "mlp"
FFN_FORMS = (("gate_proj", "up_proj", "down_proj"), ("fc1", "fc2"), ("gate_up_proj", "down_proj"))
"""Linears of a feed-forward block; the first one reads the block's input."""

_LINEAR = re.compile(r"((?:.+\.)?layers)\.(\d+)\.(self_attn|mlp)\.(\w+)")


class Place(NamedTuple):
    """One linear module by its place."""

    layer: int
    block: str
    name: str


def place_of(path: str) -> Place | None:
    """The place of a module path such as `model.layers.3.mlp.up_proj`; None if it has no such place."""
    match = _LINEAR.fullmatch(path)
    return None if match is None else Place(int(match[2]), match[3], match[4])


@dataclass(frozen=True)
class Blocks:
    """A base's linear modules by place.

    Attributes:
        base: whose they are.
        stem: what comes before the layer's number, e.g. `model.layers`.
        shapes: place -> (out_features, in_features), in the order of the base.
    """

    base: BaseShapes
    stem: str
    shapes: dict[Place, tuple[int, int]]

    @classmethod
    def of(cls, base: BaseShapes) -> Blocks:
        """Find the numbered layers of a base.

        Raises:
            BaseMismatchError: it has none, or several stacks of them.
        """
        stems: dict[str, dict[Place, tuple[int, int]]] = {}
        for path, shape in base.modules.items():
            match = _LINEAR.fullmatch(path)
            if match is not None:
                place = Place(int(match[2]), match[3], match[4])
                stems.setdefault(match[1], {})[place] = shape
        if len(stems) != 1:
            found = "none" if not stems else f"{len(stems)}: {', '.join(sorted(stems))}"
            raise BaseMismatchError(
                f"base {base.id!r}: a checkpoint that numbers its layers needs one stack of "
                f"layers.N.self_attn and layers.N.mlp, but there is {found}"
            )
        ((stem, shapes),) = stems.items()
        return cls(base, stem, shapes)

    @property
    def layers(self) -> list[int]:
        """Layer numbers, in order."""
        return sorted({place.layer for place in self.shapes})

    def path(self, place: Place) -> str:
        """Module path of a place."""
        return f"{self.stem}.{place.layer}.{place.block}.{place.name}"

    def ffn_path(self, layer: int) -> str:
        """Module path of the feed-forward block of a layer."""
        return f"{self.stem}.{layer}.{FFN}"

    def hidden(self, layer: int) -> int:
        """Features that go into the feed-forward block of a layer.

        Raises:
            UnsupportedAdapterError: its linears are not those of a known form.
        """
        names = {place.name for place in self.shapes if place.layer == layer and place.block == FFN}
        for form in FFN_FORMS:
            if names == set(form):
                return self.shapes[Place(layer, FFN, form[0])][1]
        known = "; ".join(", ".join(form) for form in FFN_FORMS)
        raise UnsupportedAdapterError(
            f"base {self.base.id!r}: {self.ffn_path(layer)} has the linear modules "
            f"{', '.join(sorted(names)) or 'none'}; a mixture of feed-forward blocks is served for {known}"
        )

    def targeted(self, names: tuple[str, ...]) -> Iterator[tuple[Place, tuple[int, int]]]:
        """Places whose projection is named, with shapes, in the order of the base."""
        wanted = set(names)
        return ((place, shape) for place, shape in self.shapes.items() if place.name in wanted)
