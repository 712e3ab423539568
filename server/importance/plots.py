"""Plots of an analysis as SVG elements, without scripts and without files of others."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from torch import Tensor

from loramux.server.evaluation.plots import COLOURS

_CELL, _LEFT = 16, 96


def heat_map(matrix: Tensor, names: Sequence[str], title: str) -> str:
    """A correlation matrix: blue for positive, red for negative, white for none."""
    count = len(matrix)
    cell = _CELL if count <= 24 else max(3, 24 * _CELL // count)
    named = bool(names) and cell == _CELL
    left = _LEFT if named else 12
    parts = []
    for row, values in enumerate(matrix.tolist()):
        for column, value in enumerate(values):
            label = f"{_name(names, row)}, {_name(names, column)}: {value:.2f}"
            parts.append(
                f'<rect x="{left + column * cell}" y="{24 + row * cell}" width="{cell}" height="{cell}" '
                f'fill="{_colour(value)}"><title>{escape(label)}</title></rect>'
            )
        if named:
            parts.append(
                f'<text x="{left - 5}" y="{24 + row * cell + 12}" text-anchor="end">'
                f"{escape(names[row])}</text>"
            )
    size = left + count * cell + 8
    head = f'<text x="{left}" y="14">{escape(title)}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{max(size, 150)}" '
        f'height="{24 + count * cell + 8}">{head}{"".join(parts)}</svg>'
    )


def sorted_plot(curves: Sequence[tuple[str, Tensor]], title: str) -> str:
    """Shares of the importance, the largest rank first; both axes as parts: of all ranks, and of the share
    that each would have if all had the same. The upper axis is logarithmic."""
    width, height, left, bottom = 330, 240, 44, 40
    most, least = 2.0, -2.0  # powers of ten
    lines = []
    for number, (name, shares) in enumerate(curves):
        values = (shares.sort(descending=True).values * len(shares)).clamp_min(1e-9).log10().tolist()
        step = max(1, len(values) // 200)
        points = " ".join(
            f"{left + (width - left) * (place + 0.5) / len(values):.1f},"
            f"{_level(value, most, least, height - bottom):.1f}"
            for place, value in list(enumerate(values))[::step]
        )
        colour = COLOURS[number % len(COLOURS)]
        lines.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2">'
            f"<title>{escape(name)}</title></polyline>"
            f'<text x="{width - 8}" y="{32 + 15 * number}" text-anchor="end" fill="{colour}">'
            f"{escape(name)}</text>"
        )
    ticks = "".join(
        f'<text x="{left - 5}" y="{_level(power, most, least, height - bottom) + 4:.0f}" text-anchor="end">'
        f"{10.0**power:g}</text>"
        f'<line x1="{left}" x2="{width}" y1="{_level(power, most, least, height - bottom):.0f}" '
        f'y2="{_level(power, most, least, height - bottom):.0f}" stroke="#ddd"/>'
        for power in (-2, -1, 0, 1, 2)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width}" height="{height}">'
        f'<text x="{left}" y="12">{escape(title)}</text>{ticks}{"".join(lines)}'
        f'<text x="{(left + width) / 2}" y="{height - 10}" text-anchor="middle">ranks, the most important '
        "first</text></svg>"
    )


def _level(power: float, most: float, least: float, height: float) -> float:
    return 20 + (height - 20) * (most - min(max(power, least), most)) / (most - least)


def _name(names: Sequence[str], place: int) -> str:
    return names[place] if names else f"rank {place}"


def _colour(value: float) -> str:
    weak = round(255 - 200 * min(abs(value), 1.0))
    return f"rgb({weak},{weak},255)" if value >= 0 else f"rgb(255,{weak},{weak})"
