"""Text or vector to a probability per expert: a linear head on the embedding, or a fine-tuned classifier."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from .encoder_files import read_json
from .errors import RouterError, RouterFileError
from .products import FEW, products

Vectors = npt.NDArray[np.float32]
#: A logit so much below the largest is that of a probability below 1e-13.
_NEGLIGIBLE = 30.0


class Classifier(Protocol):
    """Probabilities over the experts, in the router's order."""

    @property
    def kind(self) -> Literal["linear", "transformer"]: ...

    def probabilities(self, texts: Sequence[str], vectors: Vectors) -> Vectors:
        """[n] routing texts and their unit vectors [n, d] -> rows [n, k] that sum to 1, float32."""
        ...


class LinearClassifier:
    """softmax(W x + b) on the unit vector, weight [k, d], bias [k]; float64 inside."""

    kind: Literal["linear"] = "linear"

    def __init__(self, weight: Vectors, bias: Vectors) -> None:
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise RouterError(f"classifier weight {weight.shape} and bias {bias.shape} do not fit together")
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise RouterError("classifier weight or bias holds NaN or infinity")
        self.weight = weight.astype(np.float32)
        self.bias = bias.astype(np.float32)

    def probabilities(self, texts: Sequence[str], vectors: Vectors) -> Vectors:
        if len(texts) != len(vectors):
            raise RouterError(f"{len(texts)} texts, but {len(vectors)} vectors")
        if len(self.weight) <= FEW:
            return softmax(vectors.astype(np.float64) @ self.weight.T.astype(np.float64) + self.bias)
        return softmax(self._many_logits(vectors))

    def _many_logits(self, vectors: Vectors) -> npt.NDArray[np.float64]:
        """As with few experts, but for those whose probability rounds to nothing: their float32 logits do."""
        logits = products(self.weight, vectors.astype(np.float32)).astype(np.float64) + self.bias
        for row, found in zip(vectors.astype(np.float64), logits, strict=True):
            near = np.flatnonzero(found >= found.max() - _NEGLIGIBLE)
            found[near] = self.weight[near].astype(np.float64) @ row + self.bias[near]
        return logits

    def cooled(self, temperature: float) -> "LinearClassifier":
        """The same head with its logits divided by `temperature` (> 0), so that it is calibrated."""
        if not temperature > 0:
            raise RouterError(f"temperature must be positive, got {temperature}")
        scale = np.float32(1 / temperature)
        return LinearClassifier(self.weight * scale, self.bias * scale)


class TransformerClassifier:
    """A Hugging Face sequence classifier fine-tuned on cluster labels (the report's "learned routing", §3.2).

    Reads the text itself, with the encoder's prefix. Columns are put into the router's expert order.
    """

    kind: Literal["transformer"] = "transformer"

    def __init__(self, model: Any, tokenizer: Any, columns: list[int], prefix: str, max_tokens: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._columns = columns
        self._prefix = prefix
        self._max_tokens = max_tokens

    @classmethod
    def load(
        cls,
        folder: Path,
        expert_ids: Sequence[str],
        *,
        prefix: str = "",
        max_tokens: int = 512,
    ) -> "TransformerClassifier":
        """Load a local directory, safetensors only, no code of its own.

        Raises RouterFileError when `id2label` does not name exactly the experts, or a file is wrong.
        """
        config_file = folder / "config.json"
        config = read_json(config_file)
        columns = _columns(config_file, config, expert_ids)
        if not any(folder.glob("*.safetensors")):
            raise RouterFileError(folder, "", "no safetensors weights (pickled .bin files are not loaded)")
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            model = AutoModelForSequenceClassification.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype="float32"
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise RouterFileError(folder, "", f"transformers cannot load it: {error}") from None
        limit = min(max_tokens, int(getattr(model.config, "max_position_embeddings", max_tokens)))
        return cls(model.eval(), tokenizer, columns, prefix, limit)

    def probabilities(self, texts: Sequence[str], vectors: Vectors) -> Vectors:  # noqa: ARG002
        import torch

        if not texts:
            return np.zeros((0, len(self._columns)), np.float32)
        batch = self._tokenizer(
            [self._prefix + text for text in texts],
            padding=True,
            truncation=True,
            max_length=self._max_tokens,
            return_tensors="pt",
        )
        with torch.inference_mode():
            logits = self._model(**batch).logits.double().numpy()
        if not np.isfinite(logits).all():
            raise RouterError("the transformer classifier gave NaN or infinity")
        return softmax(logits)[:, self._columns]


def softmax(logits: npt.NDArray[np.floating[Any]]) -> Vectors:
    """Row-wise softmax [n, k] in float64, returned as float32."""
    wide = logits.astype(np.float64)
    if wide.size:
        wide -= wide.max(axis=1, keepdims=True)
        np.exp(wide, out=wide)
    result: Vectors = (wide / wide.sum(axis=1, keepdims=True)).astype(np.float32)
    return result


def _columns(config_file: Path, config: Any, expert_ids: Sequence[str]) -> list[int]:
    if not isinstance(config, dict) or "auto_map" in config:
        raise RouterFileError(config_file, "auto_map", "not a plain Hugging Face configuration; refused")
    labels = config.get("id2label")
    if not isinstance(labels, dict):
        raise RouterFileError(config_file, "id2label", "missing; it must name one expert per class")
    try:
        by_name = {str(name): int(number) for number, name in labels.items()}
    except ValueError:
        raise RouterFileError(config_file, "id2label", "keys must be class numbers") from None
    if sorted(by_name.values()) != list(range(len(labels))) or set(by_name) != set(expert_ids):
        missing, extra = sorted(set(expert_ids) - set(by_name)), sorted(set(by_name) - set(expert_ids))
        problem = f"must name each expert once; missing {missing}, unknown {extra}, {len(labels)} classes"
        raise RouterFileError(config_file, "id2label", problem)
    return [by_name[expert] for expert in expert_ids]
