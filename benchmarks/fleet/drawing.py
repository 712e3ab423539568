"""Runs of the simulation as small bars: one row a fleet, one column a measure, one bar a placement."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

INK, FAINT = "#1f2933", "#52606d"
COLOURS = {
    "random": "#b0b7bf",
    "least-loaded": "#6b8cae",
    "session": "#c9a227",
    "hash": "#c2571a",
    "affinity": "#2f7d5b",
}
LEFT, COLUMN, GAP, BAR, STEP, TOP = 110, 200, 60, 13, 16, 92


def fleet(runs: Sequence[Mapping[str, Any]]) -> str:
    """The drawing of the runs of one machine."""
    columns = (
        ("experts found resident, %", lambda one: 100 * one["experts_resident"]),
        ("99th percentile to first token, ms", lambda one: one["first_token"]["p99_ms"]),
        ("experts copied, GiB a second and replica", None),
        ("busiest replica, of the mean", lambda one: one["busiest_over_mean"]),
    )
    block = STEP * len(COLOURS) + 22
    width, height = LEFT + len(columns) * (COLUMN + GAP), TOP + block * len(runs) + 10
    first = runs[0]
    demand = first["demand"]
    about = (
        f"{first['machine']}, {demand['experts']:,} experts, {demand['blends']:,} blends, room for "
        f"{first['room']} experts at a replica, {first['load']:.0%} of what the fleet could serve"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        '<text x="20" y="28" font-size="17" font-weight="600">Where requests go, simulated</text>',
        f'<text x="20" y="48" fill="{FAINT}">{escape(about)}</text>',
    ]
    for number, (title, value) in enumerate(columns):
        x = LEFT + number * (COLUMN + GAP)
        parts.append(f'<text x="{x}" y="{TOP - 14}" font-weight="600">{escape(title)}</text>')
        for row, run in enumerate(runs):
            placed = run["placements"]
            values = {
                name: value(one) if value else one["copied_gib_per_second"] / run["replicas"]
                for name, one in placed.items()
            }
            parts += _bars(values, x, TOP + row * block)
    for row, run in enumerate(runs):
        parts.append(f'<text x="20" y="{TOP + row * block + 12}">{run["replicas"]} replicas</text>')
        for place, name in enumerate(run["placements"]):
            y = TOP + row * block + place * STEP + 11
            if row == 0:
                parts.append(
                    f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end" fill="{FAINT}" '
                    f'font-size="11">{name}</text>'
                )
    return "\n".join([*parts, "</svg>", ""])


def _bars(values: Mapping[str, float], x: int, y: int) -> list[str]:
    most = max(*values.values(), 1e-9)
    parts = []
    for place, (name, value) in enumerate(values.items()):
        top, length = y + place * STEP, max(1.0, COLUMN * value / most)
        parts.append(
            f'<rect x="{x}" y="{top + 14}" width="{length:.1f}" height="{BAR}" fill="{COLOURS[name]}"/>'
        )
        parts.append(f'<text x="{x + length + 5:.1f}" y="{top + 25}" font-size="11">{value:.3g}</text>')
    return parts
