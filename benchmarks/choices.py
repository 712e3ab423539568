"""How well a router knows what is foreign to its pool: every choice of some domains of a corpus as the pool,
against the domains left.

    python benchmarks/choices.py --data DIR --encoder DIR

`DIR` of the data holds `<domain>.train.jsonl` and `<domain>.test.jsonl`. Every text is embedded once.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from loramux.adapters.training.rows import read_rows, user_text
from loramux.router.encoder import Encoded, Encoder
from loramux.router.fit.general_texts import general_vectors
from loramux.router.fit.router import RouterFitOptions, fit_router
from loramux.router.router import Router, hybrid_scores

Vectors = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

#: Held-out texts of a domain of the pool, and of each other domain.
OWN, FOREIGN = 150, 100
BINS = 15


class Figures(NamedTuple):
    """Of one pool: area under the ROC curve of the best hybrid score (own texts against foreign ones), share
    of own texts and of foreign ones below the threshold, calibration error of the best probability over own
    texts."""

    auc: float
    lost: float
    caught: float
    ece: float


@dataclass(frozen=True)
class Corpus:
    """Unit vectors of every domain's texts, in the order of the files."""

    encoder: Encoder
    general: Vectors
    train: Mapping[str, Vectors]
    test: Mapping[str, Vectors]

    @classmethod
    def read(cls, data: Path, encoder: Encoder) -> "Corpus":
        """Embed a folder."""
        parts: dict[str, dict[str, Vectors]] = {}
        for part in ("train", "test"):
            files = {file.name.split(".")[0]: file for file in sorted(data.glob(f"*.{part}.jsonl"))}
            parts[part] = {name: embedded(encoder, file) for name, file in files.items()}
        return cls(encoder, general_vectors(encoder), **parts)


def embedded(encoder: Encoder, file: Path, limit: int = 5000) -> Vectors:
    """Vectors of up to `limit` rows of a file, drawn without order."""
    rows = read_rows([file])
    picked = np.random.default_rng(0).permutation(len(rows))[:limit]
    return encoder.encode([user_text(rows[number]) for number in picked]).vectors


def measure(corpus: Corpus, pool: Sequence[str], rows: int, seed: int, options: RouterFitOptions) -> Figures:
    """Fit a router on `rows` texts of each domain of the pool, and try it on held-out texts of all
    domains."""
    draw = np.random.default_rng([seed, rows])

    def some(vectors: Vectors, count: int) -> Vectors:
        drawn: Vectors = vectors[draw.permutation(len(vectors))[:count]]
        return drawn

    vectors = np.concatenate([some(corpus.train[name], rows) for name in pool])
    labels = np.repeat(np.arange(len(pool)), rows)
    state = fit_router(vectors, labels, pool, corpus.encoder.spec, options, corpus.general)
    router = Router(state, corpus.encoder)
    own = [some(corpus.test[name], OWN) for name in pool]
    own_labels = np.repeat(np.arange(len(pool)), [len(each) for each in own])
    best, probability = scored(router, np.concatenate(own))
    others = [some(vectors, FOREIGN) for name, vectors in corpus.test.items() if name not in pool]
    foreign, _ = scored(router, np.concatenate(others))
    threshold = router.state.calibration["hybrid"].threshold
    right = probability.argmax(axis=1) == own_labels
    return Figures(
        auc(best, foreign),
        float((best < threshold).mean()),
        float((foreign < threshold).mean()),
        calibration_error(probability.max(axis=1), right),
    )


def scored(router: Router, vectors: Vectors) -> tuple[Scores, Scores]:
    """Best hybrid score [n], and probabilities [n, k]."""
    encoded = Encoded(vectors, np.zeros(len(vectors), np.bool_))
    table = router.score([""] * len(vectors), encoded)  # a linear head reads vectors, not texts
    assert table.probability is not None
    probability = table.probability.astype(np.float64)
    hybrid = hybrid_scores(table.ranked.astype(np.float64), probability, router.state.hybrid_weight)
    return hybrid.max(axis=1), probability


def auc(own: Scores, foreign: Scores) -> float:
    """The share of pairs in which the own text has the higher score; a tie is half a pair."""
    ordered = np.sort(foreign)
    below = np.searchsorted(ordered, own, "left") + np.searchsorted(ordered, own, "right")
    return float(below.mean() / 2 / len(foreign))


def calibration_error(probability: Scores, right: Flags) -> float:
    """Expected calibration error in bins of equal width (Naeini et al. 2015)."""
    bins = np.minimum((probability * BINS).astype(int), BINS - 1)
    gaps = [abs(float((right[bins == b] - probability[bins == b]).sum())) for b in np.unique(bins)]
    return sum(gaps) / len(right)


@dataclass
class Table:
    """Figures of many choices, and what is asked of them."""

    bars: Figures
    found: list[Figures] = field(default_factory=list)

    def line(self) -> str:
        """Mean, the worst, and the share of choices that meet the bar, of each figure."""
        parts = []
        for name, worst in (("auc", min), ("lost", max), ("caught", min), ("ece", max)):
            values, bar = [getattr(one, name) for one in self.found], getattr(self.bars, name)
            met = np.mean([value >= bar if worst is min else value <= bar for value in values])
            parts.append(f"{name} {np.mean(values):.4f} (worst {worst(values):.4f}, {met:.0%} meet {bar:g})")
        return "; ".join(parts)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--domains", type=int, default=3, help="of a pool; default 3")
    parser.add_argument("--rows", type=int, nargs="+", default=[10, 50, 250], help="of a domain of the pool")
    parser.add_argument("--auc", type=float, default=0.93, help="the bar for the area; default 0.93")
    parser.add_argument("--every", type=int, default=1, help="take every so manyth choice; default 1")
    arguments = parser.parse_args()
    encoder = Encoder.load(arguments.encoder)
    corpus = Corpus.read(arguments.data, encoder)
    choices = list(combinations(corpus.test, arguments.domains))[:: arguments.every]
    print(f"{encoder.spec.id}: {len(choices)} choices of {arguments.domains} of {len(corpus.test)} domains")
    for rows in arguments.rows:
        table = Table(Figures(auc=arguments.auc, lost=0.05, caught=0.5, ece=0.05))
        for number, pool in enumerate(choices):
            table.found.append(measure(corpus, pool, rows, number, RouterFitOptions()))
        print(f"{rows} rows: {table.line()}", flush=True)


if __name__ == "__main__":
    main()
