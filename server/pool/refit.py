"""Fitting a pool's router again, from labelled rows or from rows that it labels itself; experts stay."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from loramux.adapters.training.rows import Row, find_data_files, read_rows, user_text
from loramux.router.classifier import TransformerClassifier
from loramux.router.encoder import Encoder
from loramux.router.encoder_place import EncoderPlace
from loramux.router.fit.general_texts import general_vectors
from loramux.router.fit.heads import HEADS, Head
from loramux.router.fit.router import Fit, Outside, RouterFitOptions, fit_with_figures
from loramux.router.fit.transformer import TransformerFitOptions, fit_transformer
from loramux.router.header import read_header
from loramux.router.router import Router, blank_rows
from loramux.router.state import RouterState
from loramux.router.store import ROUTER_FILE, load_router
from loramux.server.pool.change import put_manifest, sound_pool, write_router
from loramux.server.pool.manifest import PoolError

Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Choice = Literal["best", "discriminant", "ridge", "logistic", "transformer"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
LabelSource = Literal["domain", "routed"]
#: Called with what is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]
_HELD_OUT = 0.2


@dataclass(frozen=True, slots=True)
class RefitOptions:
    """How a router is fitted again.

    classifier: the head, or the linear one with the least held-out loss (`best`). encoder: what is fine-tuned
    for `transformer`. labels: a row belongs to the expert that its domain (or its file) is called, or that
    `experts` maps it to; or to the one that the router as it is puts first (`routed`).
    fit: folds, rejected share, rate of false routing, hybrid weight and the like.
    """

    classifier: Choice = "best"
    encoder: str | None = None
    labels: LabelSource = "domain"
    experts: Mapping[str, str] = field(default_factory=dict)
    fit: RouterFitOptions = field(default_factory=RouterFitOptions)
    transformer: TransformerFitOptions = field(default_factory=TransformerFitOptions)


@dataclass(frozen=True, slots=True)
class RefitReport:
    """rows: by expert. skipped: rows that no expert is for, or that the encoder cannot read. classifier: the
    one that was taken. candidates: held-out figures of each that was tried, by strategy, as JSON types.
    hybrid_weight: the cosine's share."""

    rows: Mapping[str, int]
    skipped: int
    foreign: int
    classifier: str
    hybrid_weight: float
    candidates: Mapping[str, list[dict[str, Any]]]


def refit(
    root: Path,
    data: Sequence[Path],
    options: RefitOptions,
    foreign: Sequence[Path] = (),
    progress: Progress = lambda *_: None,
) -> RefitReport:
    """Fit centroids, classifier, hybrid weight, temperatures and thresholds of a pool again.

    The pool changes in one move, when its new `pool.json` replaces the old one.

    Args:
        root: the pool.
        data: rows of what users ask its experts.
        options: what is fitted.
        foreign: rows that no expert is for; the rate of false routing is measured on them.
        progress: called now and then.

    Raises:
        PoolError: the pool is damaged, or the rows do not cover its experts.
        RouterError: the encoder cannot be loaded, or the fit is impossible.
    """
    pool = sound_pool(root)
    experts = [entry.id for entry in pool.manifest.experts]
    progress("reading", 0, 0)
    router = load_router(pool.router_dir, experts=experts)
    rows, wanted, skipped = _labelled(data, experts, options)
    progress("embedding", 0, 0)
    texts, vectors, readable = _embedded(router.encoder, rows)
    skipped += len(rows) - len(texts)
    labels = wanted[readable] if options.labels == "domain" else _routed(router, texts, experts)
    if (alien := labels < 0).any():
        skipped += int(alien.sum())
        vectors, labels = vectors[~alien], labels[~alien]
        texts = [text for text, out in zip(texts, alien, strict=True) if not out]
    _check_counts(labels, experts)
    strangers = _embedded(router.encoder, read_rows(foreign))[:2] if foreign else ([], None)
    general = general_vectors(router.encoder)

    def fitted(head: Head, outside: Outside | None = None) -> Fit:
        chosen = replace(options.fit, classifier=head)
        return fit_with_figures(
            vectors, labels, experts, router.encoder.spec, chosen, general,
            outside=outside, foreign=strangers[1],
        )  # fmt: skip

    candidates: dict[str, Fit] = {}
    if options.classifier != "transformer":
        for head in HEADS if options.classifier == "best" else (options.classifier,):
            progress(f"fitting {head}", 0, 0)
            candidates[head] = fitted(head)
        name = min(candidates, key=lambda one: candidates[one].figures["classifier"].nll)
        _put(root, candidates[name].state, None)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            name, folder = "transformer", Path(scratch) / "classifier"
            outside = _fine_tuned(
                router.encoder, texts, labels, experts, strangers[0], folder, options, progress
            )
            candidates[name] = fitted("discriminant", outside)
            _put(root, candidates[name].state, folder)
    counts = np.bincount(labels, minlength=len(experts)).tolist()
    return RefitReport(
        dict(zip(experts, counts, strict=True)),
        skipped,
        len(strangers[0]),
        name,
        candidates[name].state.hybrid_weight,
        {key: [asdict(line) for line in fit.figures.values()] for key, fit in candidates.items()},
    )


def _labelled(
    data: Sequence[Path], experts: Sequence[str], options: RefitOptions
) -> tuple[list[Row], Labels, int]:
    """The rows with their experts' numbers, -1 where nobody says, and how many are for no expert."""
    rows: list[Row] = []
    wanted: list[int] = []
    skipped = 0
    for file in find_data_files(data):
        for row in read_rows([file]):
            domain = row.domain or file.name.split(".")[0]
            expert = options.experts.get(domain, domain)
            if options.labels == "domain":
                place = _place(expert, experts)
                if place is None:
                    skipped += 1
                    continue
                wanted.append(place)
            rows.append(row)
    if not rows:
        raise PoolError(
            f"no row belongs to an expert; they are called {', '.join(experts)}: name domains so, map them "
            "with --expert-of, or let the router label the rows (--labels routed)"
        )
    return rows, np.array(wanted or [-1] * len(rows), np.int64), skipped


def _place(name: str, experts: Sequence[str]) -> int | None:
    """A domain is an expert's whether it is written with `_` or with `-`."""
    slug = name.replace("_", "-")
    return next((number for number, id in enumerate(experts) if id in (name, slug)), None)


def _embedded(encoder: Encoder, rows: Sequence[Row]) -> tuple[list[str], Vectors, npt.NDArray[np.bool_]]:
    """Texts and vectors of the rows that the encoder can read, and which they are."""
    texts = [user_text(row) for row in rows]
    vectors = encoder.encode(texts).vectors
    readable = ~blank_rows(vectors)
    return [text for text, good in zip(texts, readable, strict=True) if good], vectors[readable], readable


def _routed(router: Router, texts: Sequence[str], experts: Sequence[str]) -> Labels:
    """The expert that the router as it is puts first [n]; -1 of a text that it sends to the base.

    The rows are not clustered anew: experts keep what they were trained on, and clusters would drift from it.
    """
    return np.array(
        [-1 if one.fallback else experts.index(one.experts[0].id) for one in router.decide(texts)], np.int64
    )


def _check_counts(labels: Labels, experts: Sequence[str]) -> None:
    counts = np.bincount(labels, minlength=len(experts))
    if few := [expert for expert, count in zip(experts, counts, strict=True) if count < 2]:
        raise PoolError(
            f"{', '.join(few)}: fewer than 2 rows, too few to route by; give rows for every expert, or take "
            "the expert out of the pool"
        )


def _fine_tuned(
    encoder: Encoder,
    texts: Sequence[str],
    labels: Labels,
    experts: Sequence[str],
    foreign: Sequence[str],
    folder: Path,
    options: RefitOptions,
    progress: Progress,
) -> Outside:
    """The report's third gating: an encoder with a head, held out on a fifth of each expert's rows."""
    if options.encoder is None:
        raise PoolError("--classifier transformer needs --transformer, the encoder to fine-tune")
    held = held_fifth(labels, options.transformer.seed)
    logits = fit_transformer(
        EncoderPlace.find(options.encoder).folder,
        texts,
        labels,
        held,
        experts,
        folder,
        options.transformer,
        prefix=encoder.spec.prefix,
        progress=lambda step, steps, _: progress("fine-tuning", step, steps),
    )
    strangers = None
    if foreign:
        tuned = TransformerClassifier.load(folder, experts, prefix=encoder.spec.prefix)
        found = tuned.probabilities(foreign, np.zeros((len(foreign), 1), np.float32))
        strangers = np.log(np.maximum(found.astype(np.float64), 1e-30))
    return Outside(held, logits, strangers)


def held_fifth(labels: Labels, seed: int) -> Labels:
    """Numbers of a fifth of each class's rows, at least one, and never all."""
    draw = np.random.default_rng(seed)
    parts = []
    for label in np.unique(labels):
        rows = draw.permutation(np.flatnonzero(labels == label))
        parts.append(rows[: max(1, int(_HELD_OUT * len(rows)))])
    return np.sort(np.concatenate(parts))


def _put(root: Path, state: RouterState, classifier: Path | None) -> None:
    """The new router into the pool."""
    pool = sound_pool(root)
    header = read_header(pool.router_dir / ROUTER_FILE)
    put_manifest(pool, pool.manifest, write_router(pool, header, state, classifier))
