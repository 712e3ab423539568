"""The losses of a setting as bars with the whiskers of their differences from the base: one SVG."""

from html import escape

from benchmarks.plot import BAR, FAINT, INK, MET, MISSED, PLAIN, STEP, TOP
from benchmarks.quality.intervals import Interval, Results
from benchmarks.quality.report import BASES
from benchmarks.quality.setting import Setting

WIDTH, LEFT, RIGHT = 860, 260, 90


def losses_plot(setting: Setting, results: Results) -> str:
    """Differences from the untrained base, in nats per answer token: to the left is better."""
    rows: list[tuple[str, Interval]] = []
    for cell in setting.cells:
        base = BASES[setting.model(cell.model).base]
        if cell.gating == "each" or cell.name == base:
            continue
        if (found := results.difference(cell.name, base)) is not None:
            rows.append((cell.name, found))
    least = min([0.0, *(one.low for _, one in rows)])
    most = max([0.0, *(one.high for _, one in rows)])
    span = max(most - least, 1e-6)
    height = TOP + STEP * len(rows) + 40

    def x(value: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (value - least) / span, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="13" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        '<text x="20" y="30" font-size="17" font-weight="600">Held-out loss less that of the base</text>',
        f'<text x="20" y="52" fill="#52606d">{escape(setting.about)}; {setting.tokens:,} tokens of training '
        "each; nats per answer token, 95 % intervals over rows and seeds</text>",
        f'<line x1="{x(0)}" y1="{TOP - 6}" x2="{x(0)}" y2="{height - 34}" stroke="{FAINT}"/>',
    ]
    for number, (name, one) in enumerate(rows):
        y = TOP + STEP * number
        middle = y + BAR / 2
        colour = PLAIN if not one.decides else MET if one.value < 0 else MISSED
        left, right = sorted((x(0), x(one.value)))
        parts += [
            f'<text x="{LEFT - 12}" y="{middle + 4.5}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{left}" y="{y}" width="{right - left:.1f}" height="{BAR}" fill="{colour}"/>',
            f'<line x1="{x(one.low)}" y1="{middle}" x2="{x(one.high)}" y2="{middle}" stroke="{INK}"/>',
            f'<text x="{WIDTH - RIGHT + 12}" y="{middle + 4.5}">{one.value:+.3f}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])
