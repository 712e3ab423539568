"""Who answers an item: the mixture of every cell for every test item, from the pool's own router."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from benchmarks.quality.setting import ROUTED, Cell, Model, Setting
from benchmarks.quality.training import Trained
from loramux.adapters.blend import DEFAULT_GRID, EXACT_GRID, Blend
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.sparse.token_mixtures import TEMPERATURE, TokenMethod, TokenMixture
from loramux.adapters.training.rows import read_rows, user_text
from loramux.router.classifier import TransformerClassifier
from loramux.router.decision import RoutingOptions
from loramux.router.encoder import Encoder
from loramux.router.encoder_place import EncoderPlace
from loramux.router.fit.clusters import centroids, pair_vectors
from loramux.router.fit.transformer import TransformerFitOptions, fit_transformer
from loramux.router.router import Router
from loramux.router.store import load_router
from loramux.server.evaluation.items import AnswerItem, Item
from loramux.server.leases import Mixture, SparseChoice
from loramux.server.pool.manifest import read_pool

_HELD = 0.2


@dataclass(frozen=True)
class Chosen:
    """The mixture that answers an item, the weights in it by expert, and the expert that came first."""

    mixture: Mixture
    total: float = 0.0
    first: str | None = None


class Gate:
    """The router of a trained pool, with the plain and the fine-tuned classifier, over fixed items."""

    def __init__(
        self, setting: Setting, model: Model, trained: Trained, seed: int, experts: Mapping[str, LoraAdapter]
    ) -> None:
        """`experts`: those that are served, by id."""
        self._setting, self._model, self._trained, self._seed = setting, model, trained, seed
        self._experts = experts
        self.ids = [entry.id for entry in read_pool(trained.pool).manifest.experts]

    @cached_property
    def router(self) -> Router:
        """With the linear head of the build."""
        return load_router(read_pool(self._trained.pool).router_dir)

    @cached_property
    def fine_tuned(self) -> Router:
        """With a transformer that was fine-tuned on the cluster labels of the training rows."""
        folder = self._trained.pool.with_name(f"{self._trained.pool.name}.transformer")
        prefix = self.router.encoder.spec.prefix
        if not (folder / "config.json").is_file():
            assert self._setting.transformer is not None
            texts, labels = [user_text(row) for row in self._rows], self._labels
            options = TransformerFitOptions(epochs=self._setting.transformer_epochs, seed=self._seed)
            place = EncoderPlace.find(self._setting.transformer).folder
            partial = folder.with_name(f"{folder.name}.partial")
            fit_transformer(
                place, texts, labels, held_rows(labels, self._seed), self.ids, partial, options, prefix=prefix
            )
            partial.replace(folder)
        classifier = TransformerClassifier.load(folder, self.ids, prefix=prefix, max_tokens=128)
        return Router(self.router.state, self.router.encoder, classifier)

    def chosen(self, cell: Cell, items: Sequence[Item]) -> dict[str, list[Chosen | None]]:
        """Of one cell, what answers each item, by system: one system, or one for each expert (`each`).

        None where the cell has no answer: an oracle needs the row's own answer to know its cluster.
        """
        if cell.gating == "each":
            return {f"{cell.name}/{id}": [self._of([(id, 1.0)], cell)] * len(items) for id in self.ids}
        return {cell.name: self._one(cell, items)}

    def _one(self, cell: Cell, items: Sequence[Item]) -> list[Chosen | None]:
        match cell.gating:
            case "base":
                return [Chosen(Blend.bare())] * len(items)
            case "single":
                return [self._of([(self.ids[0], 1.0)], cell)] * len(items)
            case "average":
                return [self._of([(id, 1 / len(self.ids)) for id in self.ids], cell)] * len(items)
            case "random":
                return [
                    self._of([(self.ids[_number(item.id, self._seed) % len(self.ids)], 1.0)], cell)
                    for item in items
                ]
            case "oracle":
                own = self.own(items)
                return [None if one is None else self._of([(one, 1.0)], cell) for one in own]
            case "sparse":
                assert self._trained.sparse is not None
                return [Chosen(SparseChoice(self._trained.sparse))] * len(items)
            case "arrow" | "spectr":
                experts = [self._experts[id] for id in self.ids]
                mixture = TokenMixture.of(
                    TokenMethod(cell.gating), experts, top_k=cell.top_m, temperature=TEMPERATURE
                )
                return [Chosen(mixture)] * len(items)
            case "served":
                return self._routed(cell, items, self.router, RoutingOptions())
        strategy, tuned = ROUTED[cell.gating]
        options = RoutingOptions(
            strategy=strategy,
            top_m=cell.top_m,
            policy=cell.policy,
            threshold=-1.0,  # type: ignore[arg-type]
        )
        return self._routed(cell, items, self.fine_tuned if tuned else self.router, options)

    def _routed(
        self, cell: Cell, items: Sequence[Item], router: Router, options: RoutingOptions
    ) -> list[Chosen | None]:
        decisions = router.decide([item.text for item in items], options)
        return [self._of([(one.id, one.weight) for one in decision.experts], cell) for decision in decisions]

    def _of(self, weighted: Sequence[tuple[str, float]], cell: Cell) -> Chosen:
        model = self._model
        setting = self._setting
        trained_alpha = model.alpha or setting.alpha * (model.rank or setting.rank) / setting.rank
        scale = 1.0 if cell.alpha is None else cell.alpha / trained_alpha
        parts = [(id, self._experts[id].content_hash, weight * scale) for id, weight in weighted]
        # Small alphas would vanish on the grid that serving rounds to.
        grid = DEFAULT_GRID if cell.alpha is None else EXACT_GRID
        blend = Blend.of(parts, method=cell.merge, grid=grid)
        return Chosen(blend, sum(part.weight for part in blend.parts), weighted[0][0] if weighted else None)

    def own(self, items: Sequence[Item]) -> list[str | None]:
        """The expert of the cluster that an item would be in, by text and answer; None of questions."""
        rows = [item for item in items if isinstance(item, AnswerItem)]
        if len(self.ids) == 1 or not rows:
            return [self.ids[0] if isinstance(item, AnswerItem) else None for item in items]
        encoder = self.router.encoder
        centres = centroids(_pairs(encoder, self._rows), self._labels, len(self.ids))
        nearest = iter((_pairs(encoder, [item.row for item in rows]) @ centres.T).argmax(axis=1))
        return [self.ids[int(next(nearest))] if isinstance(item, AnswerItem) else None for item in items]

    @cached_property
    def _rows(self) -> list[Any]:
        return read_rows([self._trained.rows])

    @cached_property
    def _labels(self) -> npt.NDArray[np.int64]:
        """Cluster numbers of the training rows, as the build left them."""
        work = self._trained.pool.with_name(f"{self._trained.pool.name}.work")
        return load_file(work / "clusters.safetensors")["labels"].astype(np.int64)


def held_rows(labels: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """A fifth of every cluster's rows that has five or more, which a fine-tuned classifier does not see."""
    draw = np.random.default_rng(seed)
    held = [
        draw.permutation(np.flatnonzero(labels == n))[: int(_HELD * (labels == n).sum())]
        for n in range(int(labels.max()) + 1)
    ]
    return np.sort(np.concatenate(held))


def _pairs(encoder: Encoder, rows: Sequence[Any]) -> npt.NDArray[np.float32]:
    texts = encoder.encode([user_text(row) for row in rows]).vectors
    return pair_vectors(texts, encoder.encode([row.output for row in rows]).vectors)


def _number(text: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {text}".encode()).digest()[:4], "big")
