"""Train a small embedder of our own: a sentence-transformers StaticEmbedding on (user text, output) pairs.

The loss is the multiple-negatives ranking loss (Henderson et al. 2017) in both directions: in a batch, each
text must find its own output among all others, and each output its own text. Rows whose outputs are
equal are never negatives of each other, because a batch holds each output once.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..encoder import E5_MAX_TOKENS, E5_PREFIX
from ..errors import RouterError
from ..reading import Reading

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True, slots=True)
class EmbedderOptions:
    """Training options; the defaults are what the demo pool's embedder was trained with."""

    dimension: int = 192
    vocab_size: int = 12_000
    epochs: float = 3.0
    batch_size: int = 1024
    learning_rate: float = 0.02
    scale: float = 20.0
    warmup: float = 0.1
    half: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("dimension", 1), ("vocab_size", 257), ("batch_size", 2)):
            if getattr(self, name) < least:
                raise RouterError(
                    f"embedder option {name} must be at least {least}, got {getattr(self, name)}"
                )
        for name in ("epochs", "learning_rate", "scale"):
            if not getattr(self, name) > 0:
                raise RouterError(f"embedder option {name} must be positive, got {getattr(self, name)}")


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> "Tokenizer":
    """Byte-level BPE over lower-cased, NFKC-normalised text; any string has tokens, none is unknown."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_embedder(
    pairs: Sequence[tuple[str, str]],
    out: Path,
    options: EmbedderOptions | None = None,
    *,
    tokenizer: "Tokenizer | None" = None,
    progress: Progress | None = None,
) -> float:
    """Train on (user text, output) pairs and write a sentence-transformers directory to `out`.

    `tokenizer` replaces the one trained on the pairs. `progress(step, steps, loss)` is called every step.
    The same pairs, options and thread count give the same weights. Returns the mean loss of the last tenth
    of the steps (nats). Raises RouterError when there are too few pairs.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding

    options = options or EmbedderOptions()
    usable = [(text, output) for text, output in pairs if text.strip() and output.strip()]
    keys = _output_keys(usable)
    if len(usable) < 2 or not keys.any():
        raise RouterError("training an embedder needs at least 2 rows with a text and different outputs")
    if tokenizer is None:
        tokenizer = train_tokenizer([part for pair in usable for part in pair], options.vocab_size)
    tokenizer.no_padding()
    tokenizer.enable_truncation(E5_MAX_TOKENS)
    generator = torch.Generator().manual_seed(options.seed)
    weights = torch.randn(tokenizer.get_vocab_size(), options.dimension, generator=generator)
    static = StaticEmbedding(tokenizer, embedding_weights=weights)
    model = SentenceTransformer(modules=[static, Normalize()], device="cpu", prompts={"query": E5_PREFIX})
    loss_function = MultipleNegativesRankingLoss(
        model,
        scale=options.scale,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    columns = _tokenize(tokenizer, usable)
    losses = _fit(model, loss_function, columns, keys, options, progress)
    if options.half:
        model.half()
    _save(model, Reading.fit(tokenizer, [text for text, _ in usable]), out)
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


Column = list[npt.NDArray[np.int64]]


def _tokenize(tokenizer: "Tokenizer", pairs: Sequence[tuple[str, str]]) -> tuple[Column, Column]:
    """Both sides carry the prefix, so text and output may be compared and averaged at clustering."""
    sides = []
    for side in (0, 1):
        encodings = tokenizer.encode_batch_fast(
            [E5_PREFIX + pair[side] for pair in pairs], add_special_tokens=False
        )
        sides.append([np.asarray(encoding.ids, np.int64) for encoding in encodings])
    return sides[0], sides[1]


def _output_keys(pairs: Sequence[tuple[str, str]]) -> npt.NDArray[np.int64]:
    keys: dict[str, int] = {}
    return np.array([keys.setdefault(" ".join(output.lower().split()), len(keys)) for _, output in pairs])


def _fit(
    model: Any,
    loss_function: Any,
    columns: tuple[Column, Column],
    keys: npt.NDArray[np.int64],
    options: EmbedderOptions,
    progress: Progress | None,
) -> list[float]:
    import torch

    size = min(options.batch_size, len(keys))
    steps = max(1, round(options.epochs * len(keys) / size))
    warmup = max(1, round(options.warmup * steps))
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    labels = torch.empty(0)
    losses: list[float] = []
    for step, batch in zip(range(steps), _batches(keys, size, options.seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min((step + 1) / warmup, 1.0) * (1 - step / steps)
        loss = loss_function([_bag(column, batch) for column in columns], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if progress is not None:
            progress(step + 1, steps, losses[-1])
    return losses


def _batches(keys: npt.NDArray[np.int64], size: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Endless shuffled batches of row numbers, at most `size` long, each output at most once per batch."""
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(len(keys))
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            first = np.unique(keys[rows], return_index=True)[1]
            if len(first) > 1:
                yield rows[np.sort(first)]


def _bag(column: Column, rows: npt.NDArray[np.int64]) -> dict[str, Any]:
    """The features that `StaticEmbedding.forward` reads: flat token ids, and where each text starts."""
    import torch

    chosen = [column[row] for row in rows]
    starts = np.cumsum([0, *(len(ids) for ids in chosen[:-1])])
    return {"input_ids": torch.from_numpy(np.concatenate(chosen)), "offsets": torch.from_numpy(starts)}


def _save(model: Any, reading: Reading | None, out: Path) -> None:
    """Write beside `out` first, so that a kill leaves either the old directory or the new one."""
    scratch = out.with_name(out.name + ".partial")
    if scratch.exists():
        shutil.rmtree(scratch)
    scratch.mkdir(parents=True)
    model.save(str(scratch), create_model_card=False)
    if reading is not None:
        reading.save(scratch)
    if out.exists():
        shutil.rmtree(out)
    os.replace(scratch, out)
