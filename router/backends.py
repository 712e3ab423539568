"""Two ways to turn tokens into one vector per text: a static embedding in numpy, or sentence-transformers.

Importing sentence-transformers costs several seconds (it pulls in scikit-learn, scipy and the training
stack), so a StaticEmbedding is read straight from its two files. A test holds both to the same vectors.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from .encoder_files import EncoderFiles, read_tokenizer
from .errors import RouterFileError

if TYPE_CHECKING:
    from tokenizers import Encoding

Vectors = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]


class Backend(Protocol):
    """Embeds texts that already carry the prefix."""

    @property
    def dimension(self) -> int: ...

    @property
    def max_tokens(self) -> int: ...

    def embed(self, texts: Sequence[str]) -> tuple[Vectors, Flags]:
        """[n] texts -> pooled vectors [n, dimension] (not normalised) and whether each text was cut [n]."""
        ...

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens that `embed` reads of each text."""
        ...


# tokenizers hands a batch to a pool of threads. For a few short texts waking it costs more than the work, and
# on a busy machine as much as a time slice; a batch of one text stays in the calling thread.
_ALONE = 16


class StaticBackend:
    """Mean of one learned vector per token (sentence-transformers `StaticEmbedding`), without torch."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        tokenizer_file = folder / "tokenizer.json"
        self._table = _static_table(folder / "model.safetensors")
        self._tokenizer = read_tokenizer(tokenizer_file)
        rows = self._table.shape[0]
        if self._tokenizer.get_vocab_size() > rows:
            problem = f"{self._tokenizer.get_vocab_size()} tokens, but embedding.weight has {rows} rows"
            raise RouterFileError(tokenizer_file, "vocab", problem)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens)
        self._max_tokens = max_tokens

    @property
    def dimension(self) -> int:
        return int(self._table.shape[1])

    @property
    def max_tokens(self) -> int:
        return self._max_tokens

    def embed(self, texts: Sequence[str]) -> tuple[Vectors, Flags]:
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        truncated = np.zeros(len(texts), np.bool_)
        for row, encoding in enumerate(self._encodings(texts)):
            truncated[row] = bool(encoding.overflowing)
            if ids := encoding.ids:  # a new list at every reading
                rows = self._table.take(ids, axis=0)
                vectors[row] = np.add.reduce(rows, axis=0, dtype=np.float64) / len(ids)
        return vectors, truncated

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(encoding.ids) for encoding in self._encodings(texts)]

    def _encodings(self, texts: Sequence[str]) -> "list[Encoding]":
        if len(texts) > _ALONE:
            return self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0] for text in texts]


class SentenceTransformerBackend:
    """Any Transformer + Pooling layout that `TransformerBackend` does not know, through
    sentence-transformers."""

    def __init__(self, files: EncoderFiles, max_tokens: int, device: str) -> None:
        from sentence_transformers import SentenceTransformer

        try:
            self._model = SentenceTransformer(
                str(files.root),
                device=device,
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True, "dtype": "float32"},
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise RouterFileError(files.root, "", f"sentence-transformers cannot load it: {error}") from None
        own_limit = self._model.max_seq_length
        self._max_tokens = min(max_tokens, int(own_limit)) if own_limit else max_tokens
        self._model.max_seq_length = self._max_tokens
        self._model.eval()

    @property
    def dimension(self) -> int:
        return int(self._model.get_embedding_dimension())

    @property
    def max_tokens(self) -> int:
        return self._max_tokens

    def embed(self, texts: Sequence[str]) -> tuple[Vectors, Flags]:
        if not texts:
            return np.zeros((0, self.dimension), np.float32), np.zeros(0, np.bool_)
        whole = self._model.tokenizer(list(texts), truncation=False, padding=False, verbose=False)
        truncated = np.array([len(ids) > self._max_tokens for ids in whole["input_ids"]], np.bool_)
        vectors = self._model.encode(
            list(texts), prompt="", convert_to_numpy=True, show_progress_bar=False, batch_size=32
        )
        return np.asarray(vectors, np.float32), truncated

    def count(self, texts: Sequence[str]) -> list[int]:
        if not texts:
            return []
        whole = self._model.tokenizer(list(texts), truncation=False, padding=False, verbose=False)
        return [min(len(ids), self._max_tokens) for ids in whole["input_ids"]]


def _static_table(file: Path) -> Vectors:
    """The vector of every token id, [vocabulary, d] float32.

    sentence-transformers writes `embedding.weight`. model2vec writes `embeddings`, and for a vocabulary that
    shares rows `mapping` [vocabulary] and `weights` [vocabulary], which are folded in here.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise RouterFileError(file, "", f"not readable as safetensors: {error}") from None
    name = "embedding.weight" if "embedding.weight" in tensors else "embeddings"
    table = tensors.get(name)
    if table is None or table.ndim != 2 or table.dtype.kind != "f":
        raise RouterFileError(file, "embedding.weight", "missing, or not a matrix of floating point numbers")
    rows: Vectors = table.astype(np.float32)
    if name == "embeddings" and "mapping" in tensors:
        mapping = tensors["mapping"]
        if (
            mapping.ndim != 1
            or mapping.dtype.kind not in "iu"
            or not ((mapping >= 0) & (mapping < len(rows))).all()
        ):
            raise RouterFileError(file, "mapping", f"must be a list of row numbers below {len(rows)}")
        rows = rows[mapping]
    if name == "embeddings" and "weights" in tensors:
        weights = tensors["weights"]
        if weights.shape != (len(rows),) or weights.dtype.kind != "f":
            raise RouterFileError(file, "weights", f"must be {len(rows)} floating point numbers")
        rows = rows * weights.astype(np.float32)[:, None]
    if not np.isfinite(rows).all():
        raise RouterFileError(file, name, "holds NaN or infinity")
    return rows
