"""Fine-tune a small encoder with a head to say which expert a text is for (QLoRA-MoE report §3.2, "learned
routing": a BERT fine-tuned on the clusters as labels).

What is saved is a plain sequence classifier in safetensors, which `TransformerClassifier` serves. Its head is
divided by the temperature that fits the rows it was not trained on, so that its probabilities are calibrated.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..encoder_files import inspect_encoder
from ..errors import RouterError, RouterFileError
from .calibrate import fit_temperature, platt_smoothing

Labels = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float64]
#: Called with steps done and steps in all, and the loss in nats.
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True, slots=True)
class TransformerFitOptions:
    """How long and how fast it learns. `rate` is the encoder's; the fresh head has ten times as much."""

    epochs: float = 4.0
    rate: float = 5e-5
    batch: int = 16
    max_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.epochs > 0 or not self.rate > 0 or self.batch < 1 or self.max_tokens < 4:
            raise RouterError("epochs, rate and batch must be positive, and max_tokens at least 4")


def fit_transformer(
    encoder: Path,
    texts: Sequence[str],
    labels: Labels,
    held: Labels,
    experts: Sequence[str],
    out: Path,
    options: TransformerFitOptions | None = None,
    *,
    prefix: str = "",
    progress: Progress = lambda *_: None,
) -> Scores:
    """Fine-tune the encoder in a folder on some rows and write a classifier to `out`.

    Args:
        encoder: a Hugging Face encoder, or a sentence-transformers directory around one.
        texts: routing texts [n].
        labels: their experts' numbers [n].
        held: numbers of the rows that are not trained on; the temperature is fitted on them.
        experts: ids in the router's order.
        out: the folder to write.
        options: length and rate.
        prefix: put in front of every text, as the router will.
        progress: called after every step.

    Returns:
        Calibrated log-probabilities [len(held), k] of the held-out rows.

    Raises:
        RouterError: too few rows, or the training diverged. RouterFileError: the encoder cannot be loaded.
    """
    import torch

    options = options or TransformerFitOptions()
    known = np.setdiff1d(np.arange(len(texts)), held)
    if len(labels) != len(texts) or not len(held) or np.unique(labels[known]).size != len(experts):
        raise RouterError("the transformer classifier needs training rows of every expert and held-out rows")
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(options.seed)
        model, tokenizer = _load(encoder, experts)
        read = _Reader(tokenizer, prefix, options.max_tokens)
        _train(model, read, [texts[n] for n in known], labels[known], options, progress)
        logits = _logits(model, read, [texts[n] for n in held])
    if not np.isfinite(logits).all():
        raise RouterError("the transformer classifier diverged; lower its rate")
    temperature = fit_temperature(logits, labels[held], platt_smoothing(len(held)))
    _cool(model, len(experts), temperature)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    cooled: Scores = logits / temperature
    top = cooled.max(axis=1, keepdims=True)
    result: Scores = cooled - top - np.log(np.exp(cooled - top).sum(axis=1, keepdims=True))
    return result


@dataclass(frozen=True, slots=True)
class _Reader:
    tokenizer: Any
    prefix: str
    max_tokens: int

    def __call__(self, texts: Sequence[str]) -> Any:
        return self.tokenizer(
            [self.prefix + text for text in texts],
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )


def _load(encoder: Path, experts: Sequence[str]) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    files = inspect_encoder(encoder)
    if files.kind != "transformer":
        raise RouterFileError(encoder, "", "a static embedder has nothing to fine-tune; name a transformer")
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # that the head is new is the point
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            files.weights_dir,
            num_labels=len(experts),
            id2label=dict(enumerate(experts)),
            label2id={expert: number for number, expert in enumerate(experts)},
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype="float32",
        )
        tokenizer = AutoTokenizer.from_pretrained(
            files.weights_dir, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise RouterFileError(encoder, "", f"transformers cannot load it: {error}") from None
    finally:
        logging.set_verbosity(level)
    return model, tokenizer


def _train(
    model: Any,
    read: _Reader,
    texts: Sequence[str],
    labels: Labels,
    options: TransformerFitOptions,
    progress: Progress,
) -> None:
    """AdamW; the rate rises over the first tenth and falls to zero. Texts of like length go together."""
    import torch

    head = [p for name, p in model.named_parameters() if name.startswith("classifier")]
    rest = [p for name, p in model.named_parameters() if not name.startswith("classifier")]
    optimiser = torch.optim.AdamW(
        [{"params": rest, "lr": options.rate}, {"params": head, "lr": 10 * options.rate}], weight_decay=0.01
    )
    peaks = [float(group["lr"]) for group in optimiser.param_groups]
    batches = max(1, round(len(texts) / options.batch))
    steps = max(1, round(options.epochs * batches))
    draw = np.random.default_rng(options.seed)
    queue: list[Labels] = []
    model.train()
    for step in range(steps):
        if not queue:
            mixed = draw.permutation(len(texts))
            lengths = np.array([len(texts[n]) for n in mixed])
            parts = np.array_split(mixed[np.argsort(lengths, kind="stable")], batches)
            queue = [parts[n] for n in draw.permutation(batches)]
        rows = queue.pop()
        share = (step + 1) / steps
        for group, peak in zip(optimiser.param_groups, peaks, strict=True):
            group["lr"] = peak * min(share / 0.1, (1 - step / steps) / 0.9, 1.0)
        logits = model(**read([texts[n] for n in rows])).logits
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[rows]))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        progress(step + 1, steps, float(loss.detach()))
    model.eval()


def _logits(model: Any, read: _Reader, texts: Sequence[str], batch: int = 32) -> Scores:
    import torch

    with torch.inference_mode():
        found = [
            model(**read(texts[start : start + batch])).logits.double().numpy()
            for start in range(0, len(texts), batch)
        ]
    result: Scores = np.concatenate(found)
    return result


def _cool(model: Any, k: int, temperature: float) -> None:
    """Divide the logits of the last linear module, the head, by a temperature."""
    import torch

    heads = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == k]
    with torch.no_grad():
        heads[-1].weight.div_(temperature)
        if heads[-1].bias is not None:
            heads[-1].bias.div_(temperature)
