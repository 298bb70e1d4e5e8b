"""The charts of the page that come from the figures: latency over throughput, the comparison, its rounds."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal

from llmopt.bench.report import svg
from llmopt.bench.report.words import Report, change, figure, found_by, level_of, levels, metric, number, percent

_HEIGHT = 290
_FOUND: tuple[Literal["knee", "best"], ...] = ("knee", "best")  # by a sweep
_MARKS = {"pass": "✓", "fail": "✗", "inconclusive": "?"}


@dataclass(frozen=True, slots=True)
class _Point:
    level: str
    rate: float
    low: float
    high: float

    def told(self) -> str:
        times = f"p50 {number(self.low)} ms, p99 {number(self.high)} ms"
        return f"{self.level}: {number(self.rate)} tokens/s, {times}"


def curves(report: Report) -> list[str]:
    """What a load costs in latency: time to first token and time per token, each over tokens/s."""
    scheduled = any(figure(summary, "ttft_scheduled_ms_p50") for _, _, summary in levels(report))
    first, title = ("ttft_scheduled_ms", ", from its schedule,") if scheduled else ("ttft_ms", "")
    wanted = ((first, f"Time to first token{title}"), ("tpot_ms", "Time per output token"))
    return [chart for name, title in wanted if (chart := _curve(report, name, title))]


def _curve(report: Report, name: str, title: str) -> str | None:
    series = {subject: _points(report, subject, name) for subject in report["subjects"]}
    series = {subject: points for subject, points in series.items() if points}
    if not series:
        return None
    every = [point for points in series.values() for point in points]
    limits = _limits(report, name)
    x = svg.linear([point.rate for point in every], svg.LEFT, svg.WIDTH - svg.RIGHT)
    values = [value for point in every for value in (point.low, point.high)]
    y = svg.logarithmic(
        [*values, 0.7 * min(values), *(1.2 * limit for limit, _ in limits)], _HEIGHT - svg.BOTTOM, svg.TOP
    )
    parts = [*svg.grid(x, y, "output tokens/s", "ms, p50 and up to p99"), *_limit_lines(limits, x, y)]
    labels, names = _Labels(), list[str]()
    marked = {which: found_by(report.get("sweep"), which) for which in _FOUND}
    for style, points in enumerate(series.values()):
        parts.append(svg.line([(x.at(point.rate), y.at(point.low)) for point in points], style))
        for point in points:
            found = ", ".join(which for which in _FOUND if marked[which] == point.level and style == 0)
            parts += _whisker(point, x, y, style, ringed=bool(found))
            if style == 0:
                names.append(labels.label(x.at(point.rate), y.at(point.low), f"{point.level} {found}".strip()))
    parts += names  # above all lines
    if len(series) > 1:
        parts += svg.legend(list(series), svg.WIDTH - svg.RIGHT, svg.TOP - 12)
    told = "; ".join(f"{subject} at {point.told()}" for subject, points in series.items() for point in points)
    return svg.figure(f"{title} over throughput", told, parts, height=_HEIGHT)


@dataclass(slots=True)
class _Labels:
    """Puts a name beside its point where no other is; where all places are taken, its tooltip has to do."""

    taken: list[tuple[float, float, float]] = field(default_factory=list)

    def label(self, x: float, y: float, text: str) -> str:
        width = 7.0 * len(text)
        for left, below in ((x + 8, y + 16), (x - 8 - width, y - 8), (x - 8 - width, y + 16)):
            free = all(left > a + w or left + width < a or abs(below - b) > 13 for a, b, w in self.taken)
            if free and left + width < svg.WIDTH:
                self.taken.append((left, below, width))
                end = left < x
                side = f'text-anchor="end" x="{x - 8:.1f}"' if end else f'x="{left:.1f}"'
                return f'<text class="label" {side} y="{below:.1f}">{escape(text)}</text>'
        return ""


def _whisker(point: _Point, x: svg.Axis, y: svg.Axis, style: int, *, ringed: bool) -> Iterator[str]:
    at, low, high = x.at(point.rate), y.at(point.low), y.at(point.high)
    yield f'<path class="line thin s{style}" d="M{at:.1f} {low:.1f}V{high:.1f}m-4 0h8"/>'
    yield svg.mark(at, low, style, point.told())
    if ringed:
        yield f'<circle class="ring" cx="{at:.1f}" cy="{low:.1f}" r="9"/>'


def _points(report: Report, subject: str, name: str) -> list[_Point]:
    """Of every level, and of the loads of a sweep that are not among them; by their load."""
    found = dict(report["results"].get(subject) or {})
    if subject == next(iter(report["subjects"])):
        sweep = report.get("sweep") or {}
        found = {level_of(sweep, point["load"]): point for point in sweep.get("points") or ()} | found
    points = []
    for level, summary in found.items():
        rate, low, high = (figure(summary, key) for key in ("tokens_per_s", f"{name}_p50", f"{name}_p99"))
        if all(isinstance(value, int | float) and value > 0 for value in (rate, low, high)):
            points.append(_Point(level, rate, low, high))
    return sorted(points, key=lambda point: load_order(point.level))


def load_order(level: str) -> tuple[str, float]:
    """`c4` before `c16`."""
    try:
        return level[:1], float(level[1:])
    except ValueError:
        return level, 0.0


def _limits(report: Report, name: str) -> list[tuple[float, str]]:
    """The objectives on any percentile of a metric."""
    found: dict[float, str] = {}
    for slo in (report.get("gate") or {}).get("slo") or ():
        if form := re.fullmatch(rf"{name}_p[\d.]+<=?([\d.e+]+)", str(slo["slo"])):
            found[float(form[1])] = form[0]
    return list(found.items())


def _limit_lines(limits: Sequence[tuple[float, str]], x: svg.Axis, y: svg.Axis) -> Iterator[str]:
    for limit, text in limits:
        at = y.at(limit)
        yield f'<path class="limit" d="M{x.start:.1f} {at:.1f}H{x.end:.1f}"/>'
        yield f'<text class="limit-text" x="{x.start + 4:.1f}" y="{at - 4:.1f}">{escape(text)}</text>'


def forest(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """Each comparison as the interval of its ratio, turned so that to the right is always worse."""
    rows = [_turned(found) for found in comparisons]
    margin = max(found["margin"] for found in comparisons)
    reach = _reach(rows, margin)
    start, end, step = 10.0, svg.WIDTH - 10.0, 50
    axis = svg.Axis(low=math.exp(-reach), high=math.exp(reach), start=start, end=end, scale="log")
    bottom = 14.0 + step * len(rows)
    parts = [
        f'<text class="tick" x="{start}" y="{bottom + 10:.1f}">← better</text>',
        f'<text class="tick" text-anchor="middle" x="{axis.at(1):.1f}" y="{bottom + 10:.1f}">equal</text>',
        f'<text class="tick" text-anchor="end" x="{end}" y="{bottom + 10:.1f}">worse than the margin →</text>',
    ]
    for place, (found, row) in enumerate(zip(comparisons, rows, strict=True)):
        parts += _forest_row(found, row, axis, 14.0 + step * place)
    told = "; ".join(f"{metric(c['metric'])} at {c['level']}: {change(c)}: {c['verdict']}" for c in comparisons)
    return svg.figure("Candidate against baseline", told, parts, height=bottom + 18)


def _reach(rows: Sequence[tuple[float, float, float]], margin: float) -> float:
    """As far as the intervals, but not so far for one that is wide that the margin and the others cannot be seen."""
    widest = sorted(max(abs(math.log(value)) for value in row) for row in rows if all(0 < v < math.inf for v in row))
    enough = 1.6 * math.log(1 + margin)
    return 1.05 * max(enough, min(widest[-1], max(2 * widest[len(widest) // 2], 4 * enough)) if widest else 0.0)


def _turned(found: Mapping[str, Any]) -> tuple[float, float, float]:
    ratio, low, high = (math.nan if found[key] is None else float(found[key]) for key in ("ratio", "low", "high"))
    if found["better"] == "lower":
        return ratio, low, high
    return tuple(1 / value if value else math.nan for value in (ratio, high, low))  # type: ignore[return-value]


def _forest_row(found: Mapping[str, Any], row: tuple[float, float, float], axis: svg.Axis, top: float) -> Iterator[str]:
    verdict, y, beyond = found["verdict"], top + 29, axis.at(1 + found["margin"])
    said = f"{percent(found['ratio'])} [{percent(found['low'])}, {percent(found['high'])}]"
    name = f"{_MARKS[verdict]} {metric(found['metric'])}, {found['level']}"
    yield f'<text class="label" x="{axis.start}" y="{top + 12:.1f}">{escape(name)}</text>'
    yield f'<text class="tick" text-anchor="end" x="{axis.end}" y="{top + 12:.1f}">{escape(said)}</text>'
    yield f'<rect class="bad" x="{beyond:.1f}" y="{y - 11:.1f}" width="{axis.end - beyond:.1f}" height="22"/>'
    yield f'<path class="grid" d="M{axis.start} {y:.1f}H{axis.end}"/>'
    yield f'<path class="axis" d="M{axis.at(1):.1f} {y - 11:.1f}v22"/>'
    yield f'<path class="limit" d="M{beyond:.1f} {y - 11:.1f}v22"/>'
    if all(math.isfinite(value) for value in row):
        ratio, low, high = (axis.at(value) for value in row)
        ends = (
            "m6 -5l-6 5l6 5m-6 -5" if row[1] < axis.low else "m0 -5v10m0 -5",
            "m-6 -5l6 5l-6 5" if row[2] > axis.high else "m0 -5v10",
        )
        yield f'<path class="interval v-{verdict}" d="M{low:.1f} {y:.1f}{ends[0]}H{high:.1f}{ends[1]}"/>'
        yield f'<circle class="v-{verdict} solid" cx="{ratio:.1f}" cy="{y:.1f}" r="5"/>'


def rounds(report: Report, comparisons: Sequence[Mapping[str, Any]], most: int = 8) -> list[str]:
    """What each round measured, for what is compared: the noise that the verdict had to see through."""
    wanted = [(c["level"], c["metric"]) for c in comparisons]
    return [chart for level, name in wanted[:most] if (chart := _rounds_of(report, level, name))]


def _rounds_of(report: Report, level: str, name: str) -> str | None:
    series: dict[str, list[tuple[float, float]]] = {}
    for subject in report["subjects"]:
        of = (report["results"].get(subject) or {}).get(level) or {}
        points = [(found["round"] + 1, found.get(name)) for found in of.get("rounds") or ()]
        series[subject] = [(at, float(value)) for at, value in points if isinstance(value, int | float)]
    series = {subject: points for subject, points in series.items() if len(points) > 1}
    if not series:
        return None
    height, width = 150, 230
    every = [point for points in series.values() for point in points]
    last = max(at for at, _ in every)
    x = svg.Axis(low=0.6, high=last + 0.4, start=44, end=width - 8, ticks=((1, "1"), (last, f"{last:g}")))
    y = svg.linear([value for _, value in every], height - 34, 24, zero=False)
    y = svg.Axis(low=y.low, high=y.high, start=y.start, end=y.end, ticks=(y.ticks[0], y.ticks[-1]))
    parts = [*svg.grid(x, y, "round", "")]
    for style, points in enumerate(series.values()):
        parts.append(svg.line([(x.at(at), y.at(value)) for at, value in points], style, thin=True))
        for at, value in points:
            parts.append(svg.mark(x.at(at), y.at(value), style, f"round {at:g}: {number(value)}", size=2.8))
    told = "; ".join(f"{name}: {', '.join(number(value) for _, value in points)}" for name, points in series.items())
    unit = " ms" if "_ms" in name else ""
    return svg.figure(f"{metric(name)}{unit} at {level}", told, parts, height=height, width=width)
