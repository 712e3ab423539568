"""The container of MoE-PEFT and its ancestor mLoRA: `<prefix>.layers.<L>.<block>.<projection>...`.

Experts are `.experts.<E>.lora_A.weight`; a projection that is not routed has `.lora_A.weight` of its own. The
gate is one per feed-forward block (`.mlp.moe_gate.weight`) or one per projection.
MixLoRA, LoRAMoE and MoLA differ in the prefix, in the place of the gate, and in which blocks are routed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import (
    AdapterError,
    AdapterFormatError,
    BaseMismatchError,
    UnsupportedAdapterError,
)
from loramux.adapters.lora import LoraPair
from loramux.adapters.sparse.blocks import FFN, Blocks, Place
from loramux.adapters.sparse.fields import MAX_ALPHA, MAX_EXPERTS, MAX_RANK, Fields
from loramux.adapters.sparse.model import ExpertFactors
from loramux.adapters.sparse.tensor_file import TensorFile, Wanted

_KEY = re.compile(
    r"(?P<prefix>\w+)\.layers\.(?P<layer>\d+)\.(?P<block>self_attn|mlp)\."
    r"(?:(?P<name>\w+)\.)?(?:experts\.(?P<expert>\d+)\.)?(?:lora_[AB]|moe_gate)\.weight"
)


@dataclass(frozen=True)
class LoraShape:
    """Rank of a family of factors, and the factor on their product."""

    rank: int
    scale: float

    @classmethod
    def take(cls, fields: Fields) -> LoraShape:
        """From `r`, `lora_alpha` and `use_rslora` (alpha / sqrt(r); Kalajdzievski 2023).

        Raises:
            AdapterFormatError: one of them is missing or out of bounds.
        """
        rank = fields.whole("r", high=MAX_RANK)
        alpha = fields.number("lora_alpha", low=0.0, high=MAX_ALPHA, above=True)
        return cls(rank, alpha / (math.sqrt(rank) if fields.flag("use_rslora") else rank))


def refuse_lost_dora(fields: Fields, *, allowed: bool) -> bool:
    """Whether the config asks for DoRA, whose magnitudes no MoE-PEFT checkpoint holds.

    Raises:
        UnsupportedAdapterError: it does, and nobody allowed to serve it without.
    """
    asked = fields.flag("use_dora")
    if asked and not allowed:
        raise UnsupportedAdapterError(
            f"{fields.path}: use_dora is set, but the magnitudes were never saved: the program that wrote "
            "this kept only A and B and starts from fresh magnitudes when it loads them, so what was trained "
            "cannot be served; --allow-missing-dora (allow_missing_dora) serves the factors without DoRA"
        )
    return asked


@dataclass(frozen=True)
class MoePeft:
    """One checkpoint of the container as its config describes it.

    Attributes:
        prefix: first word of every key.
        blocks: of the base.
        targets: names of adapted projections.
        experts: how many each routed projection has.
        outer: of projections that are not routed.
        expert: of every expert.
        routed: blocks with experts, `mlp` and perhaps `self_attn`.
        gate_per_block: one gate for a feed-forward block instead of one per projection.
    """

    prefix: str
    blocks: Blocks
    targets: tuple[str, ...]
    experts: int
    outer: LoraShape
    expert: LoraShape
    routed: frozenset[str] = field(default_factory=lambda: frozenset({FFN}))
    gate_per_block: bool = False

    @classmethod
    def take(
        cls,
        fields: Fields,
        base: BaseShapes,
        prefix: str,
        *,
        expert: Callable[[LoraShape], LoraShape] = lambda outer: outer,
        routed: Iterable[str] = (FFN,),
        gate_per_block: bool = False,
        rename: Mapping[str, str] | None = None,
    ) -> MoePeft:
        """From a config.

        Args:
            expert: rank and scale of the experts, from those of the rest.
            rename: other names of projections.

        Raises:
            AdapterError: a field is not acceptable, or no projection of the base is routed.
        """
        chosen = fields.targets()
        if isinstance(chosen, str):
            raise fields.bad("target_modules", "must be names, not an expression", chosen)
        outer = LoraShape.take(fields)
        container = cls(
            prefix=prefix,
            blocks=Blocks.of(base),
            targets=tuple(dict.fromkeys((rename or {}).get(name, name) for name in chosen)),
            experts=fields.whole("num_experts", high=MAX_EXPERTS),
            outer=outer,
            expert=expert(outer),
            routed=frozenset(routed),
            gate_per_block=gate_per_block,
        )
        if not any(place.block in container.routed for place, _ in container.places()):
            raise BaseMismatchError(
                f"{fields.path}: target_modules {sorted(container.targets)} name no projection of base "
                f"{base.id!r} that could have experts"
            )
        return container

    def places(self) -> Iterator[tuple[Place, tuple[int, int]]]:
        """Adapted places with their shapes."""
        return self.blocks.targeted(self.targets)

    def wanted(self) -> dict[str, Wanted]:
        """Every tensor there must be."""
        wanted: dict[str, Wanted] = {}
        if self.gate_per_block:
            for layer in self.blocks.layers:
                wanted[self.block_gate(layer)] = Wanted.gate(self.experts, self.blocks.hidden(layer))
        for place, (n_out, n_in) in self.places():
            if place.block not in self.routed:
                wanted[self._key(place, "lora_A")] = Wanted.a(self.outer.rank, n_in)
                wanted[self._key(place, "lora_B")] = Wanted.b(n_out, self.outer.rank)
                continue
            if not self.gate_per_block:
                wanted[self.gate(place)] = Wanted.gate(self.experts, n_in)
            for a_key, b_key in zip(
                self._experts(place, "lora_A"), self._experts(place, "lora_B"), strict=True
            ):
                wanted[a_key] = Wanted.a(self.expert.rank, n_in)
                wanted[b_key] = Wanted.b(n_out, self.expert.rank)
        return wanted

    def block_gate(self, layer: int) -> str:
        """Name of the gate of a feed-forward block."""
        return f"{self.prefix}.layers.{layer}.{FFN}.moe_gate.weight"

    def gate(self, place: Place) -> str:
        """Name of the gate of a projection."""
        return self._key(place, "moe_gate")

    def plain(self, file: TensorFile) -> dict[str, LoraPair]:
        """Module path -> its ordinary LoRA, where nothing is routed."""
        return {
            self.blocks.path(place): LoraPair(
                file.factor(self._key(place, "lora_A")),
                file.factor(self._key(place, "lora_B")),
                self.outer.scale,
            )
            for place, _ in self.places()
            if place.block not in self.routed
        }

    def factors(self, file: TensorFile, place: Place) -> ExpertFactors:
        """The experts of one projection."""
        return ExpertFactors(
            a=file.factors(self._experts(place, "lora_A")),
            b=file.factors(self._experts(place, "lora_B")),
            scale=self.expert.scale,
        )

    def stranger(self, path: Path) -> Callable[[str], AdapterError]:
        """Explains a key that has no business in the file."""

        def explain(key: str) -> AdapterError:
            match = _KEY.fullmatch(key)
            if match is None or match["prefix"] != self.prefix:
                return UnsupportedAdapterError(
                    f"{path}: tensor {key} is not served: no {self.prefix} checkpoint has such a tensor"
                )
            place = Place(int(match["layer"]), match["block"], match["name"] or "")
            if match["name"] and place not in self.blocks.shapes:
                return BaseMismatchError(
                    f"{path}: tensor {key}: base {self.blocks.base.id!r} has no linear module "
                    f"{self.blocks.path(place)}"
                )
            if match["name"] and match["name"] not in self.targets:
                return AdapterFormatError(f"{path}: tensor {key}: its config does not target {match['name']}")
            if match["expert"] and int(match["expert"]) >= self.experts and place.block in self.routed:
                return AdapterFormatError(
                    f"{path}: tensor {key} is of expert {match['expert']}, but its gate and its config know "
                    f"{self.experts} experts, 0 to {self.experts - 1}"
                )
            return AdapterFormatError(
                f"{path}: tensor {key} has no place in it: this method has no such tensor at {place.block}"
            )

        return explain

    def summary(self) -> dict[str, object]:
        """What a person may want to see."""
        return {
            "experts": self.experts,
            "rank": self.expert.rank,
            "targets": sorted({place.name for place, _ in self.places()}),
        }

    def meaning(self) -> dict[str, object]:
        """What decides the deltas beside the tensors."""
        return {"scale": self.outer.scale, "expert_scale": self.expert.scale}

    def _experts(self, place: Place, part: str) -> list[str]:
        return [self._key(place, f"experts.{expert}.{part}") for expert in range(self.experts)]

    def _key(self, place: Place, part: str) -> str:
        return f"{self.prefix}.layers.{place.layer}.{place.block}.{place.name}.{part}.weight"
