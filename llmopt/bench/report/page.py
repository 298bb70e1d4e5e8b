"""report.html: the whole report as one page that needs nothing else, neither a network nor a script.

Its style follows the reader's system, light or dark. Everything that comes from a report is escaped, and the page's own
policy forbids it to load anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

import numpy as np

from llmopt.bench.report import charts, traces
from llmopt.bench.report.lineage import lineage
from llmopt.bench.report.rows import Rows, grouped
from llmopt.bench.report.words import (
    Report,
    figure,
    found_by,
    interval,
    levels,
    machine,
    metric,
    model,
    number,
    percent,
    told,
    verdict,
)

_SIGNS = {"passed": "✓", "failed": "✗", "inconclusive": "?", "invalid": "!", None: "·"}
_TILES = (
    ("ttft_ms_p50", "TTFT p50", "ms"), ("ttft_ms_p99", "TTFT p99", "ms"),
    ("ttft_scheduled_ms_p99", "scheduled TTFT p99", "ms"), ("itl_ms_p50", "ITL p50", "ms"),
    ("itl_ms_p99", "ITL p99", "ms"), ("tokens_per_s", "output tokens/s", ""), ("requests_per_s", "requests/s", ""),
    ("goodput_share", "goodput", "share"), ("errors", "errors", ""),
)  # fmt: skip
_COLUMNS = (
    "requests", "errors", "tokens_per_s", "requests_per_s", "goodput_share", "ttft_ms_p50", "ttft_ms_p99",
    "ttft_scheduled_ms_p99", "itl_ms_p50", "itl_ms_p99", "tpot_ms_p50", "e2e_ms_p50", "e2e_ms_p99",
)  # fmt: skip
_DETAILED = 6  # levels whose distributions and timelines are drawn
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(report: Report, measured: Sequence[Rows]) -> str:
    found = verdict(report)
    title = f"Load test: {found.title.lower()}"
    style = resources.files("llmopt.bench.report").joinpath("page.css").read_text(encoding="utf-8")
    body = [
        *_header(report),
        *_section("Key figures", _tiles(report)),
        *_section("Objectives and comparison", _gate(report)),
        *_section("What the load costs", _grid(charts.curves(report)), _sweep(report), _table(report)),
        *_section("Requests", _requests(report, measured)),
        *_section("Quality and size", lineage(report)),
        *_section("Notes", _list(report["notes"])),
        *_section("How it was measured", _facts(report)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title>\n<style>{style}</style></head>\n"
        f'<body class="v-{found.outcome or "none"}"><main>{"".join(body)}</main></body></html>\n'
    )


def _header(report: Report) -> Iterator[str]:
    found = verdict(report)
    names = " against ".join(
        f"<b>{escape(name)}</b>" + (f" ({escape(model(of))})" if model(of) else "")
        for name, of in report["subjects"].items()
    )
    started = str(report["environment"].get("started", "")).replace("T", " ")
    yield f'<header><p class="badge"><span aria-hidden="true">{_SIGNS[found.outcome]}</span> {escape(found.title)}</p>'
    yield f"<h1>Load test of {names}</h1>"
    yield from (f'<p class="reason">{_code(sentence)}</p>' for sentence in found.sentences)
    yield f'<p class="dim">{escape(started)} · {escape(machine(report["environment"]))}</p></header>'


def _section(title: str, *parts: Iterable[str]) -> Iterator[str]:
    """Nothing where there is nothing in it."""
    inside = "".join(piece for part in parts for piece in part)
    if inside:
        yield f"<section><h2>{escape(title)}</h2>{inside}</section>"


def _grid(figures: Sequence[str], kind: str = "pair") -> Iterator[str]:
    if figures:
        yield f'<div class="{kind}">{"".join(figures)}</div>'


def _tiles(report: Report) -> Iterator[str]:
    """Of the first subject at the load that a sweep found best, else at the last one; beside it the baseline's."""
    rows = levels(report)
    if not rows:
        return
    subject = rows[0][0]
    own = {level: summary for name, level, summary in rows if name == subject}
    best = found_by(report.get("sweep"), "best")
    level = best if best is not None and best in own else next(reversed(own))
    other = next((summary for name, at, summary in rows if name != subject and at == level), {})
    caveat = "" if report["valid"] else ", in a measurement that is not valid"
    yield f'<p class="dim">{escape(subject)} at {escape(level)}{caveat}</p><dl class="tiles">'
    for name, label, unit in _TILES:
        value, base = figure(own[level], name), figure(other, name)
        if value is not None:
            shown = f"{100 * value:.1f}" if unit == "share" else number(value)
            small = f"<small> {'%' if unit == 'share' else unit}</small>"
            yield f"<div><dt>{label}</dt><dd>{shown}{small}{_beside(value, base, unit)}</dd></div>"
    yield "</dl>"


def _beside(value: float, base: Any, unit: str) -> str:
    if not isinstance(base, int | float) or not base or unit == "share":
        return ""
    change = f", {percent(value / base)}" if isinstance(value, float) else ""
    return f'<span class="dim">baseline {number(base)}{change}</span>'


def _gate(report: Report) -> Iterator[str]:
    gate = report.get("gate") or {}
    comparisons = gate.get("comparisons") or ()
    if gate.get("slo"):
        head = ("", "objective", "subject", "level", "measured")
        rows = ([_met(slo["met"]), slo["slo"], slo["subject"], slo["level"], number(slo.get("value"))]
                for slo in gate["slo"])  # fmt: skip
        yield from _rows(head, rows, words=(0, 1, 2, 3))
    if comparisons:
        inner = [charts.forest(comparisons)]
        yield f'<div class="pair">{"".join(inner)}<div>{"".join(_verdicts(comparisons))}</div></div>'
        several = charts.rounds(report, comparisons)
        if several:
            yield "<h3>Round by round</h3>" + "".join(_grid(several, "small"))
    yield from _list(gate.get("notes") or ())


def _met(met: bool) -> str:
    return "✓ met" if met else "✗ broken"


def _verdicts(comparisons: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield '<ul class="verdicts">'
    for found in comparisons:
        name = f"{metric(found['metric'])}, {found['level']}"
        sign = {"pass": "✓", "fail": "✗", "inconclusive": "?"}[found["verdict"]]
        p = "" if found.get("p_adjusted") is None else f"p = {number(found['p_adjusted'])} over all figures, "
        yield (
            f'<li class="v-{found["verdict"]}"><b>{sign} {escape(name)}: {found["verdict"]}</b><br>'
            f'{escape(str(found.get("reason") or ""))}<br><span class="dim">{p}{found["rounds"]} rounds</span></li>'
        )
    yield "</ul>"


def _sweep(report: Report) -> Iterator[str]:
    sweep = report.get("sweep")
    if sweep:
        unit = "requests/s" if sweep["kind"] == "rate" else "streams"
        knee, best = (f"{sweep[key]:g} {unit}" if sweep[key] is not None else "none" for key in ("knee", "best"))
        more = "; a larger load may do as well" if sweep.get("at_limit") else ""
        stopped = f"; the search ended: {sweep['stopped']}" if sweep.get("stopped") else ""
        yield f"<p>Knee: {knee}. Best: {best}{escape(more + stopped)}.</p>"


def _table(report: Report) -> Iterator[str]:
    rows = levels(report)
    columns = [name for name in _COLUMNS if any(figure(row[2], name) is not None for row in rows)]
    head = ("subject", "level", *(metric(name) + (" ms" if "_ms" in name else "") for name in columns))
    cells = ([subject, level, *(_with_interval(of, name) for name in columns)] for subject, level, of in rows)
    yield from _rows(head, cells)
    yield '<p class="dim">Under a figure its 95 % interval, where there are requests enough for one.</p>'


def _with_interval(summary: Mapping[str, Any], name: str) -> str:
    known = interval(summary, name)
    text = told(name, figure(summary, name))
    return f"{text}\n{number(known[0])} to {number(known[1])}" if known else text


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = (0, 1)) -> Iterator[str]:
    """A table that scrolls by itself where it is wider than the screen. A cell's second line is smaller."""
    kinds = ['class="word"' if place in words else "" for place in range(len(head))]
    yield '<div class="scroll" tabindex="0"><table><thead><tr>'
    yield from (f"<th {kind} scope=col>{escape(cell)}</th>" for kind, cell in zip(kinds, head, strict=True))
    yield "</tr></thead><tbody>"
    for row in rows:
        yield "<tr>"
        for kind, cell in zip(kinds, row, strict=True):
            first, _, second = cell.partition("\n")
            small = f"<small>{escape(second)}</small>" if second else ""
            yield f"<td {kind}>{escape(first)}{small}</td>"
        yield "</tr>"
    yield "</tbody></table></div>"


def _requests(report: Report, measured: Sequence[Rows]) -> Iterator[str]:
    """A part to unfold for each level, the most loaded one open."""
    groups = dict(grouped(measured))
    order = sorted({level for _, level in groups}, key=charts.load_order)
    drawn = order[-_DETAILED:]
    for level in drawn:
        of = {subject: groups[subject, level] for subject in report["subjects"] if (subject, level) in groups}
        if of:
            opened = " open" if level == drawn[-1] else ""
            timed = [rounds[0] for rounds in of.values() if not np.isnan(rounds[0].sent_s).any()]
            pairs = traces.timelines(timed)
            drawings = [*pairs[0]] if len(pairs) == 1 else [f"<div>{''.join(pair)}</div>" for pair in pairs]
            inside = "".join([*_grid(traces.distributions(of)), *([_KEY] if timed else ()), *_grid(drawings)])
            count = sum(len(rounds) for rounds in of.values())
            about = f"{level}: {sum(len(s.sent_s) for rounds in of.values() for s in rounds)} requests"
            about += f" in {count} loads" if count > 1 else ""
            yield f"<details{opened}><summary>{escape(about)}</summary>{inside}</details>"
    if len(order) > len(drawn):
        yield f'<p class="dim">The {len(drawn)} most loaded of {len(order)} levels are drawn.</p>'


_KEY = (
    '<p class="key dim"><i class="k-queued"></i>due, not yet sent <i class="k-first"></i>until the first token '
    '<i class="k-decode"></i>decoding <i class="k-failed"></i>failed</p>'
)


def _facts(report: Report) -> Iterator[str]:
    parts = {"Settings": report["settings"], "Machine and versions": report["environment"]}
    for name, of in report["subjects"].items():
        parts[f"Subject {name}"] = {k: v for k, v in of.items() if k != "lineage" and v is not None}
    parts["How each figure is defined"] = report["conventions"]
    for title, values in parts.items():
        if values:
            pairs = "".join(_pairs(values))
            yield f"<details><summary>{escape(title)}</summary><dl class=facts>{pairs}</dl></details>"
    yield '<p class="dim">All figures are in report.json, all stamps in requests.parquet.</p>'


def _pairs(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _pairs(value, f"{prefix}{key}.")
        else:
            yield f"<dt>{escape(prefix + str(key))}</dt><dd>{escape(_plain(value))}</dd>"


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not known" if value is None else str(value)


def _list(lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield "<ul>" + "".join(f"<li>{_code(line)}</li>" for line in lines) + "</ul>"


def _code(text: str) -> str:
    """What is between backticks as code; an odd one is left as it is."""
    parts = escape(text).split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    return "".join(f"<code>{part}</code>" if place % 2 else part for place, part in enumerate(parts))
