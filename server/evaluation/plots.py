"""Plots of an evaluation as SVG elements, without scripts and without files of others."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from loramux.server.evaluation.calibration import Reliability, Roc

SIZE = 300
_LEFT, _BOTTOM, _PLOT = 44, 36, 250
COLOURS = ("#8a8f98", "#2f6fde", "#d9822b", "#2a9d5c", "#9b51c9", "#c23b4a", "#13899c", "#7a6a2b")


def reliability_plot(reliability: Reliability) -> str:
    """Share right over mean confidence, a disc an interval, its area as the number of texts."""
    most = max((one.count for one in reliability.bins), default=1)
    discs = "".join(
        f'<circle cx="{_x(one.confidence):.1f}" cy="{_y(one.right):.1f}" '
        f'r="{3 + 9 * (one.count / most) ** 0.5:.1f}" fill="{COLOURS[1]}" fill-opacity="0.6">'
        f"<title>{one.count} texts: confidence {one.confidence:.3f}, right {one.right:.3f}</title></circle>"
        for one in reliability.bins
    )
    return _square("confidence", "share right", _diagonal() + discs)


def roc_plot(roc: Roc) -> str:
    """Foreign texts that fall back over own texts that do; the disc is the threshold that is served."""
    path = " ".join(f"{_x(lost):.1f},{_y(caught):.1f}" for lost, caught in roc.points)
    line = f'<polyline points="{path}" fill="none" stroke="{COLOURS[1]}" stroke-width="2"/>'
    disc = (
        f'<circle cx="{_x(roc.lost):.1f}" cy="{_y(roc.caught):.1f}" r="5" fill="{COLOURS[5]}">'
        f"<title>threshold: {roc.lost:.3f} of the own, {roc.caught:.3f} of the foreign</title></circle>"
    )
    return _square("own texts that fall back", "foreign texts that fall back", _diagonal() + line + disc)


def bar_plot(groups: Sequence[str], series: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    """Bars side by side: a group of them for each of `groups`, one in it for each of `series`."""
    highest = (
        max((value for _, values in series for value in values if value is not None), default=0.0) or 1.0
    )
    bar, gap, height = 12, 14, 180
    step = bar * len(series) + gap
    width = max(_LEFT + step * len(groups) + 10, 240)
    parts = []
    for share in (0.0, 0.5, 1.0):
        level = 10 + height - height * share
        parts.append(
            f'<text x="{_LEFT - 6}" y="{level:.0f}" text-anchor="end">{highest * share:.2f}</text>'
            f'<line x1="{_LEFT}" x2="{width}" y1="{level:.0f}" y2="{level:.0f}" stroke="#ddd"/>'
        )
    for place, group in enumerate(groups):
        start = _LEFT + place * step + gap / 2
        for number, (name, values) in enumerate(series):
            if (value := values[place]) is not None:
                tall = max(height * value / highest, 0.5)
                parts.append(
                    f'<rect x="{start + number * bar:.1f}" y="{10 + height - tall:.1f}" width="{bar - 2}" '
                    f'height="{tall:.1f}" fill="{COLOURS[number % len(COLOURS)]}">'
                    f"<title>{escape(group)}, {escape(name)}: {value:.4f}</title></rect>"
                )
        parts.append(
            f'<text transform="translate({start + step / 2:.1f},{height + 20}) rotate(35)">'
            f"{escape(group)}</text>"
        )
    legend = "".join(
        f'<span><i style="background:{COLOURS[number % len(COLOURS)]}"></i>{escape(name)}</span>'
        for number, (name, _) in enumerate(series)
    )
    svg = f'<svg role="img" width="{width:.0f}" height="{height + 110}">{"".join(parts)}</svg>'
    return f'<div class="legend">{legend}</div><div class="wide">{svg}</div>'


def _square(across: str, up: str, content: str) -> str:
    ticks = "".join(
        f'<text x="{_x(value):.0f}" y="{SIZE - 20}" text-anchor="middle">{value:g}</text>'
        f'<text x="{_LEFT - 6}" y="{_y(value) + 4:.0f}" text-anchor="end">{value:g}</text>'
        for value in (0.0, 0.5, 1.0)
    )
    frame = (
        f'<rect x="{_LEFT}" y="{SIZE - _BOTTOM - _PLOT}" width="{_PLOT}" height="{_PLOT}" fill="none" '
        'stroke="#999"/>'
    )
    labels = (
        f'<text x="{_LEFT + _PLOT / 2}" y="{SIZE - 4}" text-anchor="middle">{escape(across)}</text>'
        f'<text transform="translate(12,{SIZE - _BOTTOM - _PLOT / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(up)}</text>"
    )
    return f'<svg role="img" width="{SIZE}" height="{SIZE}">{frame}{ticks}{labels}{content}</svg>'


def _diagonal() -> str:
    return f'<line x1="{_x(0)}" y1="{_y(0)}" x2="{_x(1)}" y2="{_y(1)}" stroke="#bbb" stroke-dasharray="4 4"/>'


def _x(share: float) -> float:
    return _LEFT + _PLOT * share


def _y(share: float) -> float:
    return SIZE - _BOTTOM - _PLOT * share
