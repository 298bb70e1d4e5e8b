"""A report against one that was stored: not interleaved, so the margin is widened by what the runs vary.

Two runs at different times differ by the machine's mood as well. The rounds inside a run show how large that is: their
whole deviation counts, not that of their mean, for a mood that lasts all run long does not average out. A run without
rounds shows only how well its own percentiles are known, which is less than it varies from run to run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmopt.artifacts.outcome import Json
from llmopt.bench.gate import statistics
from llmopt.bench.gate.names import GATED, better, forms, joined, names, split
from llmopt.bench.gate.verdict import Comparison, Judgement, check, decided, in_words, overall, settled, unknown
from llmopt.errors import LlmoptError, MeasurementInvalidError, nearest

Report = Mapping[str, Any]

_LEAST_ROUNDS = 3  # of two, Student's t widens the margin beyond any use
_MUST_AGREE = {"settings": ("workload", "endpoint", "prompt_tokens", "output_tokens"), "environment": ("cpu", "cores")}
_Z95 = 1.96
_RANKS = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999, "max": 1.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A figure of one stored run: logs of its rounds, or of its one value, and its deviation (None: unknown)."""

    values: tuple[float, ...]
    deviation: float | None
    freedom: float


def against_report(
    candidate: Report,
    baseline: Report,
    *,
    margin: float = 0.05,
    alpha: float = 0.05,
    metrics: Sequence[str] | None = None,
) -> Judgement:
    """Judge the candidate of a report by another report; `metrics` None: those of `GATED` that both have.

    Each comparison's margin is the widened one. A report that is not valid is a `MeasurementInvalidError`.
    """
    check(margin, alpha)
    ours, theirs = _levels(candidate, "candidate"), _levels(baseline, "baseline")
    levels = [level for level in ours if level in theirs]
    if not levels:
        raise LlmoptError(
            f"the reports share no level: {', '.join(ours)} against {', '.join(theirs)}",
            hint="measure at the levels of the baseline",
        )
    found = []
    for level in levels:
        for asked in metrics or GATED:
            both = ((form, figure(theirs[level], form), figure(ours[level], form)) for form in forms(asked))
            there = next((found for found in both if None not in found), None)
            metric, *pair = there or (asked, figure(theirs[level], asked), figure(ours[level], asked))
            if metrics and None in pair:
                which = "baseline" if pair[0] is None else "candidate"
                hint = nearest(metric, [name for name in names() if figure(theirs[level], name) is not None])
                raise LlmoptError(f"the {which} report has no `{metric}` at `{level}`", hint=hint)
            if None not in pair:
                found.append(_compare(level, metric, theirs[level], ours[level], margin=margin, alpha=alpha))
    if not found:
        raise LlmoptError("the reports share no figure", hint="name one that both have")
    comparisons = settled(found, alpha)
    return Judgement(
        verdict=overall(comparisons),
        margin=margin,
        alpha=alpha,
        looks=(),
        comparisons=comparisons,
        notes=(_widening(ours, theirs, levels), *_differences(candidate, baseline)),
    )


def figure(summary: Report, name: str) -> float | None:
    """The figure of a level's summary, or of compact figures; None where it has none."""
    metric, percentile = split(name)
    value = summary.get(joined(metric, percentile))
    if value is None and percentile is not None and isinstance(summary.get(metric), Mapping):
        value = summary[metric].get(percentile)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _levels(report: Report, side: str) -> Mapping[str, Report]:
    """The levels of the subject that counts: the only one, else the one that was the candidate of its day."""
    if report.get("valid") is False:
        why = report.get("invalid_because") or "its measurement is not valid"
        raise MeasurementInvalidError(f"the {side} report cannot be used: {why}", hint="measure it again")
    results = report.get("results")
    if not isinstance(results, Mapping) or not results:
        raise LlmoptError(f"the {side} report has no results", hint="give a report.json of `llmopt bench`")
    if len(results) > 1 and "candidate" not in results:
        raise LlmoptError(f"the {side} report has several subjects: {', '.join(results)}", hint="give one with one")
    levels: Mapping[str, Report] = results["candidate"] if len(results) > 1 else next(iter(results.values()))
    return levels


def _compare(level: str, metric: str, theirs: Report, ours: Report, *, margin: float, alpha: float) -> Comparison:
    base, cand = _run(theirs, metric), _run(ours, metric)
    least = min(len(base.values), len(cand.values))
    nothing = unknown(level, metric, rounds=least, margin=margin)
    if not base.values or not cand.values:
        return replace(nothing, reason="a value is 0, and 0 has no ratio")
    sign = 1 if better(metric) == "lower" else -1
    estimate = sign * float(np.median(np.subtract.outer(cand.values, base.values)))
    if base.deviation is None or cand.deviation is None:
        change = f"{in_words(metric, estimate)}, from one value each"
        return replace(
            nothing, ratio=math.exp(sign * estimate), reason=f"{change}: nothing says how much it varies, run rounds"
        )
    deviation = math.hypot(base.deviation, cand.deviation)
    freedom = _freedom(base, cand)
    spread = statistics.student_quantile(1 - alpha, freedom) * deviation
    widened = math.expm1(math.log1p(margin) + spread)
    p = statistics.student_tail(estimate / deviation, freedom) if deviation else float(estimate <= 0)
    return decided(replace(nothing, margin=widened), estimate, estimate - spread, estimate + spread, p)


def _run(summary: Report, metric: str) -> Run:
    values = [figure(each, metric) for each in summary.get("rounds") or ()]
    positive = [math.log(value) for value in values if value is not None and value > 0]
    if len(positive) >= _LEAST_ROUNDS:
        return Run(values=tuple(positive), deviation=float(np.std(positive, ddof=1)), freedom=len(positive) - 1)
    value = figure(summary, metric)
    if value is None or value <= 0:
        return Run(values=(), deviation=None, freedom=math.inf)
    return Run(values=(math.log(value),), deviation=_within(summary, metric), freedom=1000)


def _within(summary: Report, metric: str) -> float | None:
    """How well the run's own figure is known, as a deviation of its log: from its interval of 95 %, or else from the
    order statistics that its rank may lie between, as far as percentiles were stored; None where there is neither."""
    name, percentile = split(metric)
    spread = summary.get(name)
    if not isinstance(spread, Mapping) or percentile is None:
        return None
    low, high = (spread.get("ci95") or {}).get(percentile) or _around(spread, percentile)
    return float(math.log(high / low) / (2 * _Z95)) if 0 < low <= high else None


def _around(spread: Report, percentile: str) -> tuple[float, float]:
    """The interval of 95 % of a percentile's rank (binomial), read between the percentiles that there are."""
    if percentile not in _RANKS or not spread.get("count"):
        return 0.0, 0.0
    stored = [(rank, float(spread[key])) for key, rank in _RANKS.items() if isinstance(spread.get(key), int | float)]
    ranks, values = zip(*sorted(stored), strict=True)
    half = _Z95 * math.sqrt(_RANKS[percentile] * (1 - _RANKS[percentile]) / spread["count"])
    low, high = np.interp([_RANKS[percentile] - half, _RANKS[percentile] + half], ranks, values)
    return float(low), float(high)


def _widening(ours: Mapping[str, Report], theirs: Mapping[str, Report], levels: Sequence[str]) -> str:
    """What the margins were widened by, and how far that can be trusted."""
    said = "the baseline is a stored report: margins are widened by "
    if all(len(side[level].get("rounds") or ()) >= _LEAST_ROUNDS for side in (ours, theirs) for level in levels):
        return said + "what its rounds and ours vary"
    return said + "what is known of a single run, which varies more from run to run; store reports with rounds"


def _freedom(base: Run, cand: Run) -> float:
    """Degrees of freedom of the sum of two variances (Welch 1947)."""
    parts = [((run.deviation or 0.0) ** 2, run.freedom) for run in (base, cand)]
    whole = sum(variance for variance, _ in parts)
    below = sum(variance**2 / freedom for variance, freedom in parts)
    return whole**2 / below if below else 1000


def _differences(candidate: Report, baseline: Report) -> list[str]:
    """What makes the two runs different measurements."""
    found = []
    for section, keys in _MUST_AGREE.items():
        ours, theirs = candidate.get(section) or {}, baseline.get(section) or {}
        for key in keys:
            if key in ours and key in theirs and ours[key] != theirs[key]:
                found.append(f"the baseline was measured with {key} `{_short(theirs[key])}`, not `{_short(ours[key])}`")
    return found


def _short(value: Json) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
