"""An evaluation as one HTML page that needs nothing else: tables, and plots as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from loramux.server.evaluation.plots import bar_plot, reliability_plot, roc_plot
from loramux.server.evaluation.result import Evaluation, Measure
from loramux.server.evaluation.systems import BASE
from loramux.server.evaluation.table import TITLES, columns, number, served

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#1d2129}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}
table{border-collapse:collapse;display:block;overflow-x:auto}
td,th{padding:.2rem .55rem;text-align:right;border-bottom:1px solid #e3e5e8;white-space:nowrap}
td:first-child,th:first-child{text-align:left}.best{font-weight:600}
svg text{font:11px system-ui,sans-serif;fill:#444}.row{display:flex;flex-wrap:wrap;gap:2rem}
.wide{overflow-x:auto}.legend span{margin-right:1rem}
.legend i{display:inline-block;width:.8em;height:.8em;margin-right:.35em}
figure{margin:0}figcaption{max-width:300px;color:#555;font-size:.85rem}
"""


def page(evaluation: Evaluation) -> str:
    """The page's HTML."""
    parts = [
        f"<h1>Pool {escape(evaluation.pool)}</h1>",
        _about(evaluation),
        "<h2>Where the router sends the texts</h2>",
        _confusion(evaluation),
        _strategies(evaluation),
        _curves(evaluation),
    ]
    for measure in evaluation.measured:
        parts += [
            f"<h2>{escape(TITLES[measure])}</h2>",
            _bars(evaluation, measure),
            _scores(evaluation, measure),
        ]
    if "loss" in evaluation.measured:
        parts += ["<h2>Share of the best single experts' gain</h2>", _gains(evaluation)]
    title = f"loramux evaluation of {escape(evaluation.pool)}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _about(evaluation: Evaluation) -> str:
    about = evaluation.about
    rows = sum(about.get("items", {}).values())
    return (
        f"<p>{rows} items of {len(evaluation.domains)} domains (at most {about.get('limit') or 'all'} of "
        f"each, seed {about.get('seed')}); shares stand with one standard error.</p>"
    )


def _confusion(evaluation: Evaluation) -> str:
    table = served(evaluation)
    names = columns(evaluation)
    rows = []
    for domain, counts in table.counts.items():
        whole = max(1, sum(counts.values()))
        cells = "".join(
            f'<td style="background:rgba(47,111,222,{0.55 * counts.get(name, 0) / whole:.2f})">'
            f"{counts.get(name, 0) or '·'}</td>"
            for name in names
        )
        rows.append(f"<tr><td>{escape(domain)}</td>{cells}<td>{table.accuracy(domain):.1%}</td></tr>")
    return _table([f"{table.strategy}: text of", *names, "right"], rows)


def _strategies(evaluation: Evaluation) -> str:
    rows = []
    for name, table in evaluation.routing.items():
        ece = "-" if table.reliability is None else f"{table.reliability.ece:.3f}"
        roc = table.roc
        fallback = ["-"] * 3 if roc is None else [f"{roc.auc:.3f}", f"{roc.caught:.1%}", f"{roc.lost:.1%}"]
        cells = "".join(f"<td>{value}</td>" for value in (f"{table.accuracy():.1%}", ece, *fallback))
        rows.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    heads = [
        "strategy",
        "right domain first",
        "calibration error",
        "foreign: AUC",
        "fall back",
        "own that do",
    ]
    return "<p></p>" + _table(heads, rows)


def _curves(evaluation: Evaluation) -> str:
    figures = []
    for name, table in evaluation.routing.items():
        if table.reliability is not None:
            figures.append(
                f"<figure>{reliability_plot(table.reliability)}<figcaption>{escape(name)}: the first "
                "expert's probability against how often it is right</figcaption></figure>"
            )
        if table.roc is not None:
            figures.append(
                f"<figure>{roc_plot(table.roc)}<figcaption>{escape(name)}: the fallback; the disc is the "
                "threshold that is served</figcaption></figure>"
            )
    return f'<div class="row">{"".join(figures)}</div>'


def _bars(evaluation: Evaluation, measure: Measure) -> str:
    domains = [domain for domain in evaluation.domains if _any(evaluation, domain, measure)]
    routed = [system.name for system in evaluation.systems if system.mixes]
    series: list[tuple[str, list[float | None]]] = []
    if any(system.name == BASE for system in evaluation.systems):
        series.append((BASE, [evaluation.value(BASE, domain, measure) for domain in domains]))
    best = [evaluation.oracle(domain, measure) for domain in domains]
    if any(best):
        series.append(("best expert", [None if one is None else one[1] for one in best]))
    series += [(name, [evaluation.value(name, domain, measure) for domain in domains]) for name in routed]
    return bar_plot(domains, series)


def _any(evaluation: Evaluation, domain: str, measure: Measure) -> bool:
    return any(evaluation.value(one.name, domain, measure) is not None for one in evaluation.systems)


def _scores(evaluation: Evaluation, measure: Measure) -> str:
    """Every system, the single experts too; the best of a row in bold."""
    rows = []
    for domain in evaluation.domains:
        if not _any(evaluation, domain, measure):
            continue
        values = [evaluation.value(system.name, domain, measure) for system in evaluation.systems]
        known = [value for value in values if value is not None]
        best = min(known) if measure == "loss" else max(known)
        score = next(row[domain] for row in evaluation.scores.values() if domain in row)
        count = score.exact_rows if measure == "exact" else score.rows
        cells = "".join(
            f"<td{' class=best' if value == best else ''}>{number(value, measure, count)}</td>"
            for value in values
        )
        rows.append(f"<tr><td>{escape(domain)}</td><td>{count}</td>{cells}</tr>")
    return _table(["domain", "rows", *(system.name for system in evaluation.systems)], rows)


def _gains(evaluation: Evaluation) -> str:
    rows = []
    for system in evaluation.systems:
        if system.mixes:
            whole = evaluation.gain_share(system.name)
            each = [evaluation.gain_share(system.name, [domain]) for domain in evaluation.domains]
            cells = "".join(
                f"<td>{'-' if share is None else f'{share:.1%}'}</td>" for share in (whole, *each)
            )
            rows.append(f"<tr><td>{escape(system.name)}</td>{cells}</tr>")
    return _table(["system", "all", *evaluation.domains], rows)


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
