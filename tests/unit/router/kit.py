"""Small encoders, routers and texts for the router's tests, all made here."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from loramux.router.backends import Flags, Vectors
from loramux.router.classifier import Classifier, LinearClassifier
from loramux.router.decision import STRATEGIES, RoutingOptions
from loramux.router.encoder import Encoder, EncoderSpec, normalize_rows
from loramux.router.fit.embedder import train_tokenizer
from loramux.router.router import DEFAULTS, Router
from loramux.router.state import Calibration, RouterState

_WORDS = """
kitchen oven flour butter recipe simmer garlic onion roast skillet pastry broth whisk
harbour anchor mast sailor tide rudder keel vessel dock cargo lighthouse deck hull
garden soil seedling prune blossom compost trellis mulch weed orchard hedge rake petal
orchestra violin conductor tempo cello chord sonata oboe rehearsal melody drum score encore
"""
TOPICS = {words.split()[0]: words.split()[1:] for words in _WORDS.strip().splitlines()}
FILLERS = ("please", "explain", "how", "the", "best", "way", "to", "use", "this", "with", "a", "new")


def topic_pairs(count: int, seed: int) -> tuple[list[tuple[str, str]], npt.NDArray[np.int64]]:
    """Rows of (text, output) about one topic each, and the topics' numbers."""
    generator = np.random.default_rng(seed)
    pairs, labels = [], []
    for number in range(count):
        label = number % len(TOPICS)
        words = list(TOPICS.values())[label]
        text = [*generator.choice(words, 3, replace=False), *generator.choice(FILLERS, 3)]
        generator.shuffle(text)
        output = [*generator.choice(words, 4, replace=False), str(number)]
        pairs.append((" ".join(text), " ".join(output)))
        labels.append(label)
    return pairs, np.array(labels)


def write_static_encoder(
    folder: Path, texts: Sequence[str], *, dimension: int = 24, seed: int = 0, dtype: type = np.float32
) -> Path:
    """A StaticEmbedding directory in the layout of sentence-transformers, with random vectors."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(texts, 600)
    tokenizer.enable_truncation(512)
    tokenizer.save(str(folder / "tokenizer.json"))
    table = np.random.default_rng(seed).normal(size=(tokenizer.get_vocab_size(), dimension)).astype(dtype)
    save_file({"embedding.weight": table}, folder / "model.safetensors")
    write_json(
        folder / "modules.json",
        [
            module(
                0, "", "sentence_transformers.sentence_transformer.modules.static_embedding.StaticEmbedding"
            ),
            module(1, "1_Normalize", "sentence_transformers.base.modules.normalize.Normalize"),
        ],
    )
    (folder / "1_Normalize").mkdir(exist_ok=True)
    write_json(folder / "1_Normalize" / "config.json", {})
    return folder


def module(number: int, path: str, kind: str) -> dict[str, Any]:
    return {"idx": number, "name": str(number), "path": path, "type": kind}


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def edit_json(file: Path, change: Callable[[Any], Any]) -> None:
    """Apply a change to a JSON file; the change may work in place or return the new content."""
    content = json.loads(file.read_text(encoding="utf-8"))
    changed = change(content)
    write_json(file, content if changed is None else changed)


class HashBackend:
    """Each text becomes a random direction of its own; records what it was asked, fails where told."""

    def __init__(self, dimension: int = 8, limit: int = 512) -> None:
        self.dimension = dimension
        self.max_tokens = limit
        self.batches: list[list[str]] = []
        self.before: Callable[[Sequence[str]], None] = lambda texts: None
        self.fixed: dict[str, Vectors] = {}

    def embed(self, texts: Sequence[str]) -> tuple[Vectors, Flags]:
        self.batches.append(list(texts))
        self.before(texts)
        rows = [self._one(text) for text in texts]
        cut = np.array([len(text.split()) > self.max_tokens for text in texts], np.bool_)
        return np.array(rows, np.float32).reshape(len(texts), self.dimension), cut

    def count(self, texts: Sequence[str]) -> list[int]:
        return [min(len(text.split()), self.max_tokens) for text in texts]

    def _one(self, text: str) -> Vectors:
        if text in self.fixed:
            return self.fixed[text]
        seed = int.from_bytes(text.encode("utf-8"), "little") % 2**63
        return np.random.default_rng(seed).normal(size=self.dimension).astype(np.float32)


def hash_encoder(backend: HashBackend, prefix: str = "") -> Encoder:
    spec = EncoderSpec("test", prefix, "mean", True, backend.dimension, backend.max_tokens)
    return Encoder(spec, backend)


def make_router(
    backend: HashBackend,
    centroids: Vectors,
    classifier: LinearClassifier | None = None,
    *,
    override: Classifier | None = None,
    threshold: float = -1.0,
    temperature: float = 1.0,
    hybrid_weight: float = 0.5,
    corpus_mean: Vectors | None = None,
    defaults: RoutingOptions = DEFAULTS,
) -> Router:
    """A router over given centroids, whose encoder is `backend`."""
    encoder = hash_encoder(backend)
    mean = np.zeros(backend.dimension, np.float32) if corpus_mean is None else corpus_mean
    state = RouterState(
        experts=tuple(f"e{number}" for number in range(len(centroids))),
        encoder=encoder.spec,
        centroids=normalize_rows(np.asarray(centroids, np.float32)),
        corpus_mean=mean,
        classifier=classifier,
        calibration={strategy: Calibration(temperature, threshold) for strategy in STRATEGIES},
        hybrid_weight=hybrid_weight,
        centring=corpus_mean is not None,
    )
    return Router(state, encoder, override, defaults)


def constant_classifier(probabilities: Sequence[float], dimension: int) -> LinearClassifier:
    """A head that gives these probabilities to every text."""
    weight = np.zeros((len(probabilities), dimension), np.float32)
    return LinearClassifier(weight, np.log(np.array(probabilities)).astype(np.float32))
