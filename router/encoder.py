"""Text to unit vectors, with the conventions of E5: a prefix, mean pooling, L2 norm, 512 tokens.

Source: the intfloat/e5 model cards ("query: " in front of every text for symmetric tasks and features).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from .backends import Backend, Flags, SentenceTransformerBackend, StaticBackend, Vectors
from .encoder_files import fingerprint, inspect_encoder, read_json
from .encoder_place import EncoderPlace
from .errors import RouterError, RouterFileError
from .reading import Reading
from .transformer_backend import Prepare, TransformerBackend, is_plain

E5_PREFIX = "query: "
E5_MAX_TOKENS = 512
# A text is cut to this many characters per allowed token before it is tokenized, so that a request of many
# megabytes cannot hold the encoder. Such a text is always reported as truncated.
_CHARS_PER_TOKEN = 64


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """What must be equal for two sets of vectors to live in one space; stored beside the centroids."""

    id: str
    prefix: str
    pooling: str
    normalize: bool
    dimension: int
    max_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Vectors [n, d] float32 with unit rows (zero for a text that cannot be read), and which were cut [n]."""

    vectors: Vectors
    truncated: Flags


class Encoder:
    """A loaded embedding model and its `spec`. Safe to call from one thread at a time."""

    def __init__(self, spec: EncoderSpec, backend: Backend, reading: Reading | None = None) -> None:
        """`reading` tells which texts the backend cannot read; None lets all pass."""
        self.spec = spec
        self._reading = reading
        self._backend = backend
        self._max_chars = spec.max_tokens * _CHARS_PER_TOKEN

    @classmethod
    def load(
        cls,
        location: str | Path,
        *,
        id: str | None = None,
        prefix: str | None = None,
        max_tokens: int = E5_MAX_TOKENS,
        device: str = "cpu",
        cache_dir: Path | None = None,
        prepare: Prepare | None = None,
    ) -> Self:
        """Load a directory, an installed package's model, or a hub id that is in the local cache.

        Nothing is downloaded, no code is run. The id is `id` when given, else the hub id, else a fingerprint
        of the directory's content.
        `prefix` None takes the model's own (`own_prefix`); `max_tokens` is lowered to the model's own limit.
        `prepare` is called with a transformer that computes on a CPU.
        Raises RouterFileError naming what is wrong.
        """
        if max_tokens < 1:
            raise RouterError(f"max_tokens must be at least 1, got {max_tokens}")
        place = EncoderPlace.find(location, cache_dir)
        root = place.folder
        files = inspect_encoder(root)
        backend: Backend
        if files.kind == "static":
            backend = StaticBackend(files.weights_dir, max_tokens)
        elif is_plain(files):
            backend = TransformerBackend(files, max_tokens, device, prepare)
        else:
            backend = SentenceTransformerBackend(files, max_tokens, device)
        spec = EncoderSpec(
            id=id or place.hub_id or fingerprint(files),
            prefix=own_prefix(place) if prefix is None else prefix,
            pooling=files.pooling,
            normalize=True,
            dimension=backend.dimension,
            max_tokens=backend.max_tokens,
        )
        encoder = cls(spec, backend, Reading.load(root, files.weights_dir))
        probe = encoder.encode(["probe"]).vectors
        if probe.shape != (1, spec.dimension):
            raise RouterFileError(
                root, "", f"gives vectors of shape {probe.shape}, not (1, {spec.dimension})"
            )
        return encoder

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Embed [n] texts (the prefix is added here). Raises RouterError when a vector is not finite."""
        if isinstance(texts, str):
            raise RouterError("encode takes a sequence of texts, not one string")
        cut = [len(text) > self._max_chars for text in texts]
        clean = [_clean(text[: self._max_chars]) for text in texts]
        vectors, truncated = self._backend.embed([self.spec.prefix + text for text in clean])
        # Else the prefix alone, or a heap of single letters, would choose an expert.
        vectors[[is_blank(text) or not self._reads(text) for text in clean]] = 0.0
        if not np.isfinite(vectors).all():
            raise RouterError(f"encoder {self.spec.id} gave a vector with NaN or infinity")
        return Encoded(normalize_rows(vectors), truncated | np.array(cut, np.bool_))

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens that `encode` reads of each of [n] texts, prefix and the model's own marks included."""
        return self._backend.count([self.spec.prefix + _clean(text[: self._max_chars]) for text in texts])

    def _reads(self, text: str) -> bool:
        return self._reading is None or self._reading.reads(text)


def own_prefix(place: EncoderPlace) -> str:
    """What a model wants in front of a query: its own "query" prompt, or E5's prefix for an E5.

    A sentence-transformers model that declares no prompt and is not called E5 gets none: with "query: " in
    front all-MiniLM-L6-v2 finds every short text close to texts about databases. A folder without that file
    is taken for an E5.
    """
    file = place.folder / "config_sentence_transformers.json"
    if not file.is_file():
        return E5_PREFIX
    config = read_json(file)
    prompts = config.get("prompts") if isinstance(config, dict) else None
    if isinstance(prompts, dict) and isinstance(prompts.get("query"), str):
        return str(prompts["query"])
    names = place.name.lower().split("/")
    return E5_PREFIX if any("e5" in re.split(r"[^a-z0-9]+", name) for name in names) else ""


def is_blank(text: str) -> bool:
    """Whether a text has nothing to route by: no letter and no digit of any script."""
    return not any(map(str.isalnum, text))


def normalize_rows(vectors: Vectors) -> Vectors:
    """Rows of [n, d] scaled to length 1 in float64; zero rows stay zero."""
    wide = vectors.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    unit: Vectors = (wide / np.where(norms > 0, norms, 1.0)).astype(np.float32)
    return unit


def _clean(text: str) -> str:
    # JSON may carry lone surrogates, which no tokenizer accepts.
    return text.encode("utf-8", "replace").decode("utf-8")
