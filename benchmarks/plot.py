"""The ratios of a run as bars beside their goals: one SVG, drawn by hand."""

from collections.abc import Mapping
from html import escape
from typing import Any

SCENARIOS = ("decode", "traffic", "prefill", "base_only", "decode_nf4")
WIDTH, LEFT, RIGHT, TOP, STEP, BAR = 860, 300, 70, 84, 30, 16
INK, FAINT, MET, MISSED, PLAIN = "#1f2933", "#d9dee4", "#2f7d5b", "#c2571a", "#6b8cae"


def decode_ratios(found: Mapping[str, Any]) -> str | None:
    """The drawing of a run's JSON; `None` if it holds no such ratio."""
    rows = [
        (what.removesuffix(" of base").removesuffix(":").removesuffix(","), line)
        for scenario in SCENARIOS
        for what, line in found["scenarios"].get(scenario, {"lines": {}})["lines"].items()
        if line["unit"] == "ratio"
    ]
    if not rows:
        return None
    most = max(1.0, *(line.get("high", line["median"]) for _, line in rows))
    top = 1.1 if most <= 1.1 else most * 1.05
    height = TOP + STEP * len(rows) + 40
    machine = f"{found['machine']['processor']}, {found['machine']['cores']} cores"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="13" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        '<text x="20" y="30" font-size="17" font-weight="600">Throughput as a share of the bare base</text>',
        f'<text x="20" y="52" fill="#52606d">{escape(found["shape"])} Llama on {escape(machine)}; medians of '
        "repeats, whiskers from lowest to highest; dashes are goals</text>",
    ]
    bottom = TOP + STEP * len(rows)
    for tick in range(int(top / 0.2) + 1):
        x = _x(tick / 5, top)
        parts.append(f'<line x1="{x}" y1="{TOP - 6}" x2="{x}" y2="{bottom}" stroke="{FAINT}"/>')
        parts.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{tick / 5:.1f}</text>')
    for number, (name, line) in enumerate(rows):
        parts += _bar(name, line, TOP + STEP * number, top)
    return "\n".join([*parts, "</svg>", ""])


def _bar(name: str, line: Mapping[str, Any], y: int, top: float) -> list[str]:
    median = line["median"]
    middle = y + BAR / 2
    colour = PLAIN if "goal" not in line else MET if line["met"] else MISSED
    parts = [
        f'<text x="{LEFT - 12}" y="{middle + 4.5}" text-anchor="end">{escape(name)}</text>',
        f'<rect x="{LEFT}" y="{y}" width="{_x(median, top) - LEFT:.1f}" height="{BAR}" fill="{colour}"/>',
    ]
    end = _x(median, top)
    if "low" in line:
        low, end = _x(line["low"], top), _x(line["high"], top)
        parts.append(f'<line x1="{low}" y1="{middle}" x2="{end}" y2="{middle}" stroke="{INK}"/>')
    if "goal" in line:
        x = _x(float(line["goal"].split()[-1]), top)
        parts.append(
            f'<line x1="{x}" y1="{y - 4}" x2="{x}" y2="{y + BAR + 4}" stroke="{INK}" stroke-width="2" '
            'stroke-dasharray="3 2"/>'
        )
        end = max(end, x)
    parts.append(f'<text x="{max(end, _x(median, top)) + 8}" y="{middle + 4.5}">{median:.2f}</text>')
    return parts


def _x(value: float, top: float) -> float:
    return round(LEFT + (WIDTH - LEFT - RIGHT) * value / top, 1)
