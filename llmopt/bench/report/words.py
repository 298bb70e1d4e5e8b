"""What a report says in words: its verdict, and a sentence for each thing that was checked. All its forms use these."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from llmopt.bench.gate.names import GATED
from llmopt.bench.gate.slo import parse_all

Report: TypeAlias = Mapping[str, Any]  # of the schema `llmopt.report/2`
Outcome = Literal["passed", "failed", "inconclusive", "invalid"]

_REASONS = 3  # in a verdict; the checks have all

#: How a figure is called, and its unit.
NAMES: Mapping[str, tuple[str, str]] = {
    "ttft_ms": ("TTFT", "ms"),
    "ttft_scheduled_ms": ("scheduled TTFT", "ms"),
    "e2e_scheduled_ms": ("scheduled E2E", "ms"),
    "answer_ms": ("first answer token", "ms"),
    "itl_ms": ("ITL", "ms"),
    "itl_request_mean_ms": ("ITL, mean of a request", "ms"),
    "tpot_ms": ("TPOT", "ms"),
    "e2e_ms": ("E2E", "ms"),
    "tokens_per_s": ("tokens/s", ""),
    "total_tokens_per_s": ("tokens/s with prompts", ""),
    "steady_tokens_per_s": ("steady tokens/s", ""),
    "peak_tokens_per_s": ("peak tokens/s", ""),
    "joules_per_token": ("J/token", ""),
    "requests_per_s": ("requests/s", ""),
    "goodput_per_s": ("goodput", "requests/s"),
    "goodput_share": ("goodput", "share"),
    "error_share": ("errors", "share"),
    "errors": ("errors", ""),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that was looked at. `name` is unique within its report; without `decides` it is only told."""

    group: Literal["validity", "slo", "gate"]
    name: str
    outcome: Outcome
    sentence: str
    decides: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """`outcome` is None where nothing was asked but to measure."""

    outcome: Outcome | None
    title: str
    sentences: tuple[str, ...]


def checks(report: Report) -> list[Check]:
    """Validity first, then the objectives, then the comparisons."""
    valid = bool(report["valid"])
    said = "the load was held as asked" if valid else str(report["invalid_because"])
    found = [
        Check(
            group="validity",
            name="the measurement is valid",
            outcome="passed" if valid else "invalid",
            sentence=said,
        )
    ]
    gate = report.get("gate") or {}
    limits = _request_limits(report)
    found += [_objective(slo, limits) for slo in gate.get("slo") or ()]
    enforced = bool(gate.get("enforced", True))
    found += [_comparison(comparison, enforced) for comparison in gate.get("comparisons") or ()]
    return found


def verdict(report: Report) -> Verdict:
    found = checks(report)
    if found[0].outcome == "invalid":
        return Verdict(outcome="invalid", title="Not valid", sentences=(found[0].sentence,))
    said = (report.get("gate") or {}).get("verdict")
    if said is None:
        compared = tuple(check.sentence for check in found[1:]) or tuple(_ratios(report))
        return Verdict(
            outcome=None, title="Measured", sentences=compared or ("no threshold and no comparison was asked for",)
        )
    outcomes: Mapping[str, tuple[Outcome, str]] = {
        "pass": ("passed", "Passed"),
        "fail": ("failed", "Failed"),
        "inconclusive": ("inconclusive", "Inconclusive"),
    }
    outcome, title = outcomes[said]
    reasons = [check.sentence for check in found if check.decides and check.outcome == outcome != "passed"]
    if outcome == "failed" and report.get("sweep") and report["sweep"]["best"] is None:
        reasons.insert(0, "no load of the sweep meets the objectives")
    more = [f"and {len(reasons) - _REASONS} more"] if len(reasons) > _REASONS else []
    return Verdict(outcome=outcome, title=title, sentences=(*reasons[:_REASONS], *more, _counted(found)))


def _counted(found: Sequence[Check]) -> str:
    """`1 of 2 objectives and 3 of 5 comparisons passed`."""
    counts = []
    for group, name in (("slo", "objective"), ("gate", "comparison")):
        part = [check for check in found if check.group == group]
        if part:
            passed = sum(check.outcome == "passed" for check in part)
            more = "" if part[0].decides else " (which decide nothing without `--gate`)"
            counts.append(f"{passed} of {len(part)} {name}{'s' if len(part) > 1 else ''}{more}")
    return f"{' and '.join(counts)} passed"


def _ratios(report: Report) -> Iterator[str]:
    """Candidate against baseline at each level, where nothing has been made of it."""
    for level, ratio in (report.get("ratio") or {}).items():
        rounds = len(report["results"]["candidate"][level].get("rounds") or (1,))
        changes = ", ".join(f"{metric(name)} {percent(ratio[name])}" for name in GATED if name in ratio)
        if changes:
            yield f"{level}: {changes} in {rounds} round{'' if rounds == 1 else 's'}, which may be noise"


def notes(report: Report) -> list[str]:
    """What bears on the verdict, then what bears on the figures."""
    return [*((report.get("gate") or {}).get("notes") or ()), *report["notes"]]


def _request_limits(report: Report) -> str:
    """What a request has to keep to count as goodput."""
    slos = parse_all(report.get("settings", {}).get("slo") or ())
    return ", ".join(str(slo) for slo in slos if slo.of_each_request)


def _objective(slo: Report, limits: str) -> Check:
    value, met = slo.get("value"), bool(slo["met"])
    of = f" of requests with {limits}" if limits and str(slo["slo"]).startswith("goodput") else ""
    where = f"`{slo['subject']}` at {slo['level']}"
    was = "was not measured" if value is None else f"was {told(str(slo['slo']).partition('>')[0], value)}"
    was += " since requests were due" if "_scheduled_" in str(slo.get("figure", "")) else ""
    return Check(
        group="slo",
        name=f"{slo['slo']} ({slo['subject']} at {slo['level']})",
        outcome="passed" if met else "failed",
        sentence=f"{slo['slo']}{of} {'is met' if met else 'is broken'} by {where}: it {was}",
    )


def _comparison(comparison: Report, enforced: bool) -> Check:
    outcomes: Mapping[str, Outcome] = {"pass": "passed", "fail": "failed", "inconclusive": "inconclusive"}
    outcome = outcomes[comparison["verdict"]]
    name = f"{metric(comparison['metric'])} at {comparison['level']}"
    sentence = f"{name}: {comparison.get('reason') or change(comparison)}"
    name = f"{name} against the baseline"
    return Check(group="gate", name=name, outcome=outcome, sentence=sentence, decides=enforced)


def change(comparison: Report) -> str:
    """`+3.1 % [+0.4 %, +6.0 %] against a margin of 5 %, higher is worse`."""
    interval = f"[{percent(comparison['low'])}, {percent(comparison['high'])}]"
    worse = "higher" if comparison["better"] == "lower" else "lower"
    margin = f"{100 * comparison['margin']:.3g} %"
    return f"{percent(comparison['ratio'])} {interval} against a margin of {margin}, {worse} is worse"


def percent(ratio: float | None) -> str:
    return "unknown" if ratio is None else f"{100 * (ratio - 1):+.1f} %"


def metric(name: str) -> str:
    """`ttft_ms_p99` as `TTFT p99`."""
    base, _, statistic = name.rpartition("_") if name.rpartition("_")[0] in NAMES else (name, "", "")
    said = NAMES.get(base, (base, ""))[0]
    return f"{said} {statistic}".strip()


def number(value: Any) -> str:
    """Four digits that count, without an exponent."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ") if abs(value) >= 10_000 else str(value)
    size = abs(value)
    digits = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 3
    return f"{value:.{digits}f}"


def told(name: str, value: Any) -> str:
    """A figure as a table shows it: shares in percent."""
    return f"{100 * value:.1f} %" if name.endswith("_share") and isinstance(value, int | float) else number(value)


def figure(summary: Mapping[str, Any], name: str) -> Any:
    """A figure of a summary by its compact name, as `ttft_ms_p99` or `tokens_per_s`; None where there is none."""
    base, _, statistic = name.rpartition("_")
    spread = summary.get(base)
    if isinstance(spread, Mapping):
        return spread.get(statistic)
    value = summary.get(name)
    return sum(value.values()) if isinstance(value, Mapping) and name == "errors" else value


def interval(summary: Mapping[str, Any], name: str) -> Sequence[float] | None:
    """The confidence interval of a figure; None where the report has none."""
    base, _, statistic = name.rpartition("_")
    spread = summary.get(base)
    known = spread.get("ci95") if isinstance(spread, Mapping) else None
    found: Sequence[float] | None = known.get(statistic) if isinstance(known, Mapping) else None
    return found


def found_by(sweep: Mapping[str, Any] | None, which: Literal["knee", "best"]) -> str | None:
    """The level that a sweep found, as `c16` or `r2.5`; None without one."""
    load = (sweep or {}).get(which)
    return None if load is None else level_of(sweep or {}, load)


def level_of(sweep: Mapping[str, Any], load: float) -> str:
    return f"{'c' if sweep['kind'] == 'streams' else 'r'}{load:g}"


def levels(report: Report) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(subject, level, summary), as measured."""
    return [(subject, level, found) for subject, at in report["results"].items() for level, found in at.items()]


def model(subject: Mapping[str, Any]) -> str:
    """What it serves, for a title: of a name that is a digest the beginning."""
    name = str(subject.get("model") or "")
    return name[:12] if re.fullmatch(r"[0-9a-f]{64}", name) else name


def machine(environment: Mapping[str, Any]) -> str:
    """One line on where the load came from."""
    limits = environment.get("limits") or {}
    cpus = f", limited to {limits['cpus']:g} CPUs" if limits.get("cpus") else ""
    return f"{environment.get('cpu')}, {environment.get('cores')} cores{cpus}, {environment.get('system')}"
