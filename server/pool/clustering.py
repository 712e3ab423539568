"""From rows to named clusters: an embedder, vectors, k-means, an id for each cluster."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loramux.adapters.training.progress import Ticker
from loramux.adapters.training.rows import Row, rows_hash, user_text
from loramux.router.encoder import Encoder
from loramux.router.fit.clusters import centroids, kmeans, pair_vectors, top_terms
from loramux.router.fit.embedder import EmbedderOptions, train_embedder
from loramux.server.pool.stages import Stages, fingerprint

Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
_CHUNK = 512
_NAME_TERMS = 2


@dataclass(frozen=True, slots=True, eq=False)
class Embedded:
    """Unit vectors [n, d] of the routing texts and of the outputs of some rows."""

    texts: Vectors
    outputs: Vectors


@dataclass(frozen=True, slots=True, eq=False)
class Clustering:
    """A partition of the rows: cluster number of each kept and each held-out row, ids and terms by number."""

    labels: Labels
    held_labels: Labels
    ids: list[str]
    terms: list[list[str]]
    cohesion: float


def trained_encoder(rows: Sequence[Row], out: Path, options: EmbedderOptions, stages: Stages) -> Path:
    """Train an embedder on the rows, unless `out` holds the one of the same rows and options."""
    inputs = fingerprint("encoder", rows_hash(rows), asdict(options))
    if stages.load("encoder", inputs) is None or not out.is_dir():
        with Ticker("embedder") as ticker:
            train_embedder(
                [(user_text(row), row.output) for row in rows],
                out,
                options,
                progress=lambda step, steps, loss: ticker.update(step / steps, f"loss {loss:.3f}"),
            )
        stages.save("encoder", inputs, {"done": np.ones(1, np.int8)})
    return out


def embed(encoder: Encoder, rows: Sequence[Row], stages: Stages, name: str) -> Embedded:
    """Vectors of the rows' routing texts and outputs; a finished stage is read back."""
    inputs = fingerprint(name, asdict(encoder.spec), rows_hash(rows))
    arrays = stages.load(name, inputs)
    if arrays is None:
        arrays = {}
        with Ticker(name) as ticker:
            for part, texts in enumerate(([user_text(r) for r in rows], [r.output for r in rows])):
                found = np.zeros((len(rows), encoder.spec.dimension), np.float32)
                for start in range(0, len(rows), _CHUNK):
                    found[start : start + _CHUNK] = encoder.encode(texts[start : start + _CHUNK]).vectors
                    ticker.update((part + min(1.0, (start + _CHUNK) / len(rows))) / 2)
                arrays["outputs" if part else "texts"] = found
        stages.save(name, inputs, arrays)
    return Embedded(arrays["texts"], arrays["outputs"])


def cluster(
    rows: Sequence[Row], kept: Embedded, held: Embedded, *, k: int, seed: int, min_rows: int, stages: Stages
) -> Clustering:
    """Partition by spherical k-means on text and output together; held-out rows go to the nearest centre.

    Raises:
        RouterError: fewer rows than clusters need.
    """
    inputs = fingerprint("clusters", rows_hash(rows), _digest(kept), _digest(held), k, seed, min_rows)
    arrays = stages.load("clusters", inputs)
    if arrays is None:
        pairs = pair_vectors(kept.texts, kept.outputs)
        found = kmeans(pairs, k, seed=seed, min_size=min_rows)
        centres = centroids(pairs, found.labels, len(found.sizes))
        held_pairs = pair_vectors(held.texts, held.outputs)
        arrays = {
            "labels": found.labels,
            "held_labels": (held_pairs @ centres.T).argmax(axis=1),
            "cohesion": np.array([found.cohesion]),
            "terms": _terms(rows, found.labels, len(found.sizes)),
        }
        stages.save("clusters", inputs, arrays)
    terms: list[list[str]] = json.loads(arrays["terms"].tobytes())
    labels = arrays["labels"].astype(np.int64)
    return Clustering(
        labels=labels,
        held_labels=arrays["held_labels"].astype(np.int64),
        ids=expert_ids(terms, _domains(rows, labels, len(terms))),
        terms=terms,
        cohesion=float(arrays["cohesion"][0]),
    )


def _terms(rows: Sequence[Row], labels: Labels, k: int) -> npt.NDArray[np.uint8]:
    """Top terms of each cluster as JSON bytes.

    They are kept, because they name the experts of a resumed build, and equal scores may be ordered otherwise
    in another process.
    """
    terms = top_terms([f"{user_text(row)} {row.output}" for row in rows], labels, k)
    return np.frombuffer(json.dumps(terms).encode(), np.uint8)


def _domains(rows: Sequence[Row], labels: Labels, k: int) -> list[str]:
    """The domain that most rows of each cluster belong to, where more than half of them say so."""
    counts = [Counter(rows[int(place)].domain for place in np.flatnonzero(labels == n)) for n in range(k)]
    tops = [count.most_common(1)[0] for count in counts]
    return [top if 2 * n > count.total() else "" for (top, n), count in zip(tops, counts, strict=True)]


def expert_ids(terms: Sequence[Sequence[str]], domains: Sequence[str] = ()) -> list[str]:
    """One slug for each cluster: its domain, else its first terms.

    A domain that has several clusters names none: its terms tell them apart. A number is added where two ids
    would be the same all the same.
    """
    ids: list[str] = []
    slugs = [_slug(domain, "-") for domain in domains] or [""] * len(terms)
    for cluster_terms, domain in zip(terms, slugs, strict=True):
        parts = list(dict.fromkeys(filter(None, (_slug(term, "") for term in cluster_terms))))
        stem = domain if domain and slugs.count(domain) == 1 else "-".join(parts[:_NAME_TERMS])
        stem = stem[:56] or "cluster"
        name, number = stem, 2
        while name in ids:
            name, number = f"{stem}-{number}", number + 1
        ids.append(name)
    return ids


def _slug(text: str, join: str) -> str:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", join, plain).strip("-")


def _digest(embedded: Embedded) -> list[Any]:
    """A cheap stand-in for the vectors' content: shapes and sums in float64."""
    return [
        [list(part.shape), float(part.astype(np.float64).sum()), float(np.abs(part.astype(np.float64)).sum())]
        for part in (embedded.texts, embedded.outputs)
    ]
