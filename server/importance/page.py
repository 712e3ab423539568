"""An analysis as one HTML page that needs nothing else."""

from __future__ import annotations

from html import escape

from loramux.adapters.importance.statistics import top_overlap
from loramux.server.evaluation.plots import bar_plot
from loramux.server.importance.plots import heat_map, sorted_plot
from loramux.server.importance.result import Analysis, System, off_diagonal

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#1d2129}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.4rem}h3{font-size:1rem}
table{border-collapse:collapse;display:block;overflow-x:auto}
td,th{padding:.2rem .55rem;text-align:right;border-bottom:1px solid #e3e5e8;white-space:nowrap}
td:first-child,th:first-child{text-align:left}
svg text{font:11px system-ui,sans-serif;fill:#444}.row{display:flex;flex-wrap:wrap;gap:1.2rem}
.wide{overflow-x:auto}.legend span{margin-right:1rem}
.legend i{display:inline-block;width:.8em;height:.8em;margin-right:.35em}
"""


def page(analysis: Analysis) -> str:
    """The page's HTML."""
    rows = sum(analysis.about.get("rows", {}).values())
    how = "of every row, averaged" if analysis.about.get("each_row") else "of the task's mean loss"
    parts = [
        f"<h1>Importance of ranks: {escape(analysis.pool)}</h1>",
        f"<p>|∂L/∂θ · θ| {how}; {rows} rows of {len(analysis.tasks)} tasks on {escape(analysis.base)}.</p>",
        "<h2>Variance along the ranks and along the features</h2>",
        "<p>Mean variance divided by the squared mean importance of the module.</p>",
        *(_variances(system) for system in analysis.systems),
        "<h2>Correlation of tasks</h2><p>Of single parameters, inside a module, mean over the layers.</p>",
        *(_tasks(system) for system in analysis.systems),
        "<h2>Correlation of ranks over the tasks</h2><p>Modules of the middle layer.</p>",
        *(_ranks(system) for system in analysis.systems),
        "<h2>Sorted importance</h2><p>Share of a rank, 1 being that of the mean rank.</p>",
        _sorted(analysis),
        _concentrations(analysis),
    ]
    title = f"Importance of ranks: {escape(analysis.pool)}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _variances(system: System) -> str:
    found = system.variances()
    series = [
        ("along the ranks", [one.rank for one in found.values()]),
        ("along the features", [one.features for one in found.values()]),
    ]
    return f"<h3>{_title(system)}</h3>{bar_plot(list(found), series)}"


def _tasks(system: System) -> str:
    maps = (heat_map(matrix, list(system.tasks), kind) for kind, matrix in system.between_tasks().items())
    return f'<h3>{_title(system)}</h3><div class="row">{"".join(maps)}</div>'


def _ranks(system: System) -> str:
    found = system.between_ranks()
    maps = "".join(heat_map(found[path], [], path) for path in system.middle)
    pairs = [off_diagonal(matrix) for matrix in found.values() if len(matrix) > 1]
    negative = sum(float((one < 0).double().mean()) for one in pairs) / max(1, len(pairs))
    return f'<h3>{_title(system)}: {negative:.0%} of the pairs are negative</h3><div class="row">{maps}</div>'


def _sorted(analysis: Analysis) -> str:
    plots = (
        sorted_plot([(system.name, system.shares()[task]) for system in analysis.systems], task)
        for task in analysis.tasks
    )
    return f'<div class="row">{"".join(plots)}</div>'


def _concentrations(analysis: Analysis) -> str:
    rows = []
    for system in analysis.systems:
        overlap = top_overlap(system.shares())
        for task, one in system.concentrations().items():
            cells = (one.effective, one.half, one.most)
            rows.append(
                f"<tr><td>{escape(system.name)}</td><td>{escape(task)}</td>"
                f"<td>{system.tasks[task].loss:.3f}</td>"
                + "".join(f"<td>{value:.1%}</td>" for value in cells)
                + f"<td>{'-' if overlap is None else f'{overlap:.2f}'}</td></tr>"
            )
    heads = (
        "system", "task", "loss", "effective ranks", "hold half", "hold 90 %", "overlap of the top tenth",
    )  # fmt: skip
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _title(system: System) -> str:
    return f"{escape(system.name)} ({escape(system.kind)}, {system.numbers:,} parameters)"
