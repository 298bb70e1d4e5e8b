"""Markdown for a pull request and for `$GITHUB_STEP_SUMMARY`, and the annotations of a GitHub job."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmopt.bench.report.words import (
    Check,
    Report,
    checks,
    figure,
    interval,
    levels,
    machine,
    metric,
    model,
    notes,
    number,
    percent,
    told,
    verdict,
)

_SIGNS = {"passed": "✅", "failed": "❌", "inconclusive": "⚠️", "invalid": "⛔", None: "📏"}
_COLUMNS = (
    "ttft_ms_p50", "ttft_ms_p99", "itl_ms_p50", "itl_ms_p99", "tpot_ms_p50", "e2e_ms_p50", "e2e_ms_p99",
    "tokens_per_s", "requests_per_s",
)  # fmt: skip
_OPTIONAL = ("ttft_scheduled_ms_p99", "goodput_share")
_NOTES = 8  # in the summary; the page has all
_ANNOTATIONS = 10  # of a kind: GitHub shows no more from one step


def markdown(report: Report) -> str:
    """The page: verdict, checks, all figures, notes, machine, settings."""
    parts = [*_head(report), *_checks_table(report), *_figures(report), *_notes(notes(report))]
    parts += [f"Machine: {_escape(machine(report['environment']))}", ""]
    parts += _details("Settings", _pairs(report["settings"]))
    parts += _details("Environment", _pairs(report["environment"]))
    parts += _details("How each figure is defined", _pairs(report["conventions"]))
    return "\n".join(parts).rstrip("\n") + "\n"


def summary(report: Report) -> str:
    """A few lines for a job's page: the verdict, what was not met, the figures with what is known of their spread."""
    told = notes(report)
    more = [f"and {len(told) - _NOTES} more in report.md"] if len(told) > _NOTES else []
    parts = [*_head(report), *_comparisons(report), *_figures(report)]
    parts += _details(f"{len(told)} notes" if len(told) != 1 else "1 note", _notes(told[:_NOTES] + more))
    where = _escape(machine(report["environment"]))
    parts += _details("Machine and settings", [where, "", *_pairs(report["settings"])])
    return "\n".join(parts).rstrip("\n") + "\n"


def workflow_commands(report: Report) -> list[str]:
    """Workflow commands for GitHub: an error for what was broken or is not valid, a warning for what is not decided.

    GitHub shows ten of a kind; when there are more, the last one says so.
    """
    found = [check for check in checks(report) if check.decides and check.outcome != "passed"]
    if not report["valid"]:
        found = found[:1]  # what else was found rests on it
    lines = []
    for kind, outcomes in (("error", ("invalid", "failed")), ("warning", ("inconclusive",))):
        part = [check for check in found if check.outcome in outcomes]
        shown = part if len(part) <= _ANNOTATIONS else part[: _ANNOTATIONS - 1]
        lines += [_annotation(kind, _title(check), check.sentence) for check in shown]
        if len(part) > len(shown):
            lines.append(_annotation(kind, "llmopt bench", f"and {len(part) - len(shown)} more; see the report"))
    return lines


def _title(check: Check) -> str:
    named = {"invalid": "measurement not valid", "failed": "objective broken", "inconclusive": "not decided"}
    if check.group == "gate" and check.outcome == "failed":
        return f"llmopt bench: {check.name}: worse"
    return f"llmopt bench: {named[check.outcome]}"


def _annotation(kind: str, title: str, message: str) -> str:
    """`%`, CR and LF are escaped everywhere, `:` and `,` in a property too (as actions/toolkit does)."""
    return f"::{kind} title={_data(title).replace(':', '%3A').replace(',', '%2C')}::{_data(message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _head(report: Report) -> Iterator[str]:
    found = verdict(report)
    names = [f"`{name}`" + (f" ({_escape(model(of))})" if model(of) else "")
             for name, of in report["subjects"].items()]  # fmt: skip
    yield from (f"# {_SIGNS[found.outcome]} Load test: {found.title.lower()}", "", " against ".join(names), "")
    yield from (f"- {_escape(sentence)}" for sentence in found.sentences)
    yield ""


def _checks_table(report: Report) -> Iterator[str]:
    objectives = (report.get("gate") or {}).get("slo") or ()
    if objectives:
        yield from ("| objective | subject | level | measured | |", "|---|---|---|---:|---|")
        for slo in objectives:
            cells = (slo["slo"], slo["subject"], slo["level"], number(slo.get("value")))
            yield _row([*cells, _SIGNS["passed" if slo["met"] else "failed"]])
        yield ""
    yield from _comparisons(report)


def _comparisons(report: Report) -> Iterator[str]:
    gate = report.get("gate") or {}
    if not gate.get("comparisons"):
        return
    yield from ("| candidate against baseline | level | change | 95 % interval | margin | p, adjusted | |",
                "|---|---|---:|---:|---:|---:|---|")  # fmt: skip
    signs = {"pass": _SIGNS["passed"], "fail": _SIGNS["failed"], "inconclusive": _SIGNS["inconclusive"]}
    for found in gate["comparisons"]:
        interval = f"{percent(found['low'])} to {percent(found['high'])}"
        p = found.get("p_adjusted")
        cells = (metric(found["metric"]), found["level"], percent(found["ratio"]), interval)
        yield _row([*cells, f"{100 * found['margin']:.3g} %", number(p), signs[found["verdict"]]])
    yield ""


def _figures(report: Report) -> Iterator[str]:
    rows = levels(report)
    names = [*_COLUMNS, *(name for name in _OPTIONAL if any(figure(row[2], name) is not None for row in rows))]
    titles = [_column(name) for name in names]
    yield _row(["subject", "level", "requests", "errors", *titles])
    yield "|---|---|" + "---:|" * (2 + len(titles))
    for subject, level, found in rows:
        failed = ", ".join(f"{count} {kind}" for kind, count in found["errors"].items()) or "0"
        figures = [_with_interval(found, name) for name in names]
        yield _row([subject, level, number(found["requests"]), failed, *figures])
    yield ""


def _column(name: str) -> str:
    return metric(name) + (" ms" if "_ms" in name else "")


def _with_interval(found: Mapping[str, Any], name: str) -> str:
    """A figure, with its confidence interval where the report has one."""
    known = interval(found, name)
    text = told(name, figure(found, name))
    return f"{text} [{number(known[0])}, {number(known[1])}]" if known else text


def _notes(notes: Sequence[str]) -> Iterator[str]:
    if notes:
        yield from (f"- {_escape(note)}" for note in notes)
        yield ""


def _details(title: str, lines: Iterator[str] | Sequence[str]) -> Iterator[str]:
    inside = list(lines)
    if any(inside):
        yield from (f"<details><summary>{title}</summary>", "", *inside, "", "</details>", "")


def _pairs(values: Mapping[str, Any]) -> Iterator[str]:
    yield from ("| | |", "|---|---|")
    for key, value in values.items():
        yield _row([f"`{key}`", _plain(value)])


def _plain(value: Any) -> str:
    if value in ("", [], ()):
        return "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items() if item not in (None, "", [], ()))
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return {None: "-", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escape(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _escape(text: str) -> str:
    """A `<` outside of code would begin a tag; the rest of a report's words is meant as it is."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
