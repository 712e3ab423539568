"""How well routing agrees with labels that the fit never saw: majority names and a confusion table."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]


def majority(labels: Labels, names: Sequence[str], k: int) -> list[str]:
    """The name that fills each of k clusters, from the rows' cluster numbers and names; "" when empty."""
    kinds = sorted(set(names))
    counts = np.zeros((k, len(kinds)), np.int64)
    np.add.at(counts, (labels, np.array([kinds.index(name) for name in names])), 1)
    return [kinds[row.argmax()] if row.any() else "" for row in counts]


def accuracy(actual: Sequence[str], routed: Sequence[str]) -> float:
    """Share of rows whose routed name is the actual one."""
    return float(np.mean([one == other for one, other in zip(actual, routed, strict=True)]))


def confusion_table(actual: Sequence[str], routed: Sequence[str]) -> str:
    """Plain text: a row per actual name, a column per routed name, then rows and share right."""
    kinds = sorted(set(actual) | set(routed))
    place = {name: number for number, name in enumerate(kinds)}
    counts = np.zeros((len(kinds), len(kinds)), np.int64)
    for one, other in zip(actual, routed, strict=True):
        counts[place[one], place[other]] += 1
    width = max(map(len, kinds))
    columns = [name[:8] for name in kinds]
    lines = [" " * width + "".join(f"{name:>9}" for name in columns) + "     rows   right"]
    for name in sorted(set(actual)):
        row = counts[place[name]]
        cells = "".join(f"{count:>9}" for count in row)
        lines.append(f"{name:<{width}}{cells}{row.sum():>9}{row[place[name]] / row.sum():>8.1%}")
    right = np.trace(counts) / max(counts.sum(), 1)
    lines.append(f"{'all':<{width}}{'':{9 * len(kinds)}}{counts.sum():>9}{right:>8.1%}")
    return "\n".join(lines)
