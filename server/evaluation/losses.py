"""What answers cost under the base, under each expert, and under the routed blend."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from loramux.adapters.arena import Arena
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.blend import Blend
from loramux.adapters.layers import AdapterLayers
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.training.batches import IGNORED, by_length, collate
from loramux.adapters.training.chat import EncodedRow
from loramux.adapters.training.loop import token_losses
from loramux.kernels.gated_lora import GateSlot, plan_step


@dataclass(frozen=True)
class DomainLoss:
    """Nats per answer token over the rows of one domain; `best` is the single expert with the lowest."""

    rows: int
    tokens: int
    base: float
    blend: float
    best: float
    best_expert: str

    @property
    def excess(self) -> float:
        """How much more than the best single expert the blend costs, as a share of it."""
        return self.blend / self.best - 1


class Losses:
    """Measures with the layers that serve: every row of a batch uses its own blend."""

    def __init__(self, model: PreTrainedModel, experts: Mapping[str, LoraAdapter], pad_id: int) -> None:
        shapes = BaseShapes.from_model(model, "measured")
        rows = sum(expert.max_rank for expert in experts.values())
        arena = Arena(shapes, max(1, rows), dtype=model.dtype, device=model.device)
        self._model = model
        self._pad_id = pad_id
        self._layers = AdapterLayers(model, arena)
        self._slots: dict[str, GateSlot] = {}
        for name, expert in experts.items():
            extents = arena.allocate(expert.max_rank)
            arena.write(expert, extents)
            self._slots[name] = GateSlot(extents, torch.ones(expert.max_rank), frozenset(expert.pairs))

    def slot(self, blend: Blend) -> GateSlot | None:
        """The gate of an exact blend of the experts given."""
        if blend.is_bare:
            return None
        parts = [(self._slots[part.expert_id], part.weight) for part in blend.parts]
        return GateSlot(
            tuple(extent for slot, _ in parts for extent in slot.extents),
            torch.cat([slot.gate * weight for slot, weight in parts]),
            frozenset(module for slot, _ in parts for module in slot.modules),
        )

    def total(self, rows: Sequence[EncodedRow], slots: Sequence[GateSlot | None]) -> tuple[float, int]:
        """Summed loss in nats over all answer tokens, and how many there are; `slots[i]` answers
        `rows[i]`."""
        slot_of = {id(row): slot for row, slot in zip(rows, slots, strict=True)}
        loss, tokens = 0.0, 0
        for part in by_length(rows, 4096):
            batch = collate(part, self._pad_id, answers_only=True)
            if not bool((batch.targets != IGNORED).any()):
                continue
            width = batch.ids.shape[1]
            plan = plan_step([(slot_of[id(row)], width) for row in part])
            with torch.inference_mode(), self._layers.running(plan):
                loss += float(token_losses(self._model, batch).double().sum())
            tokens += batch.count
        return loss, tokens

    def domain(self, rows: Sequence[EncodedRow], blends: Sequence[Blend]) -> DomainLoss:
        """Base, routed blends and every single expert on the rows of one domain."""
        base, tokens = self.total(rows, [None] * len(rows))
        blend, _ = self.total(rows, [self.slot(blend) for blend in blends])
        singles = {name: self.total(rows, [slot] * len(rows))[0] for name, slot in self._slots.items()}
        best = min(singles, key=singles.__getitem__)
        return DomainLoss(len(rows), tokens, base / tokens, blend / tokens, singles[best] / tokens, best)
