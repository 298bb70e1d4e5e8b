"""The charts of the page that come from the requests: distributions, and what was in flight when."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from heapq import heappop, heappush

import numpy as np

from llmopt.bench.report import svg
from llmopt.bench.report.rows import Floats, Rows
from llmopt.bench.report.words import number

_HEIGHT = 280
_LANES = 40  # streams drawn
_BARS = 300  # requests drawn
_BINS, _BIN_S = 80, 0.05  # of time, for rates: at most so many, at least so long


def distributions(rounds: Mapping[str, Sequence[Rows]]) -> list[str]:
    """TTFT and ITL of one level, all rounds of a subject together, as the share of requests that took no longer."""
    times = {subject: [rows.times_ms() for rows in of] for subject, of in rounds.items()}
    scheduled = all("ttft_scheduled_ms" in found for of in times.values() for found in of)
    first, title = ("ttft_scheduled_ms", ", from its schedule") if scheduled else ("ttft_ms", "")
    charts = [
        _distribution(title, {subject: np.concatenate([found[name] for found in of]) for subject, of in times.items()})
        for name, title in ((first, f"Time to first token{title}"), ("itl_ms", "Gaps between chunks (ITL)"))
    ]
    return [chart for chart in charts if chart]


def _distribution(title: str, values: Mapping[str, Floats]) -> str | None:
    values = {subject: of for subject, of in values.items() if len(of)}
    if not values:
        return None
    floor = max(0.01, min(float(of[of > 0].min(initial=np.inf)) for of in values.values()))
    floor = floor if np.isfinite(floor) else 0.01
    y = svg.percentiles(max(map(len, values.values())), _HEIGHT - svg.BOTTOM, svg.TOP)
    lines = {subject: svg.quantiles(np.maximum(of, floor), y) for subject, of in values.items()}
    x = svg.logarithmic([value for points in lines.values() for _, value in points], svg.LEFT, svg.WIDTH - svg.RIGHT)
    parts = [*svg.grid(x, y, "ms, logarithmic", "share that took no longer")]
    told = []
    for style, (subject, points) in enumerate(lines.items()):
        parts.append(svg.line([(x.at(value), y.at(share)) for share, value in points], style))
        for mark in (50.0, 99.0):
            if mark <= y.high and len(values[subject]) >= 1 / (1 - mark / 100):
                value = float(np.percentile(values[subject], mark))
                parts += _marked(x.at(value), y.at(mark), style, f"{subject} p{mark:g}: {number(value)} ms", value)
                told.append(f"{subject} p{mark:g} {number(value)} ms")
    if len(lines) > 1:
        parts += svg.legend(list(lines), svg.WIDTH - svg.RIGHT, svg.TOP - 12)
    return svg.figure(title, "; ".join(told), parts, height=_HEIGHT)


def _marked(x: float, y: float, style: int, told: str, value: float) -> Iterator[str]:
    """The first series says its value to the lower right of the mark, the second to the upper left."""
    yield svg.mark(x, y, style, told)
    left = style % 2 == 1 or x > svg.WIDTH - 60
    side = f'text-anchor="end" x="{x - 8:.1f}"' if left else f'x="{x + 8:.1f}"'
    yield f'<text class="label t{style}" {side} y="{y + (-6 if style % 2 else 14):.1f}">{number(value)}</text>'


def timelines(measured: Sequence[Rows]) -> list[tuple[str, str]]:
    """What was in flight when, and the tokens that came of it, of one round of each subject, all over the same time."""
    if not measured:
        return []
    lanes = [_lanes(rows) for rows in measured]
    ends_s = [float((rows.sent_s + rows.end_s).max()) for rows in measured]
    # cut before the first request that is one too many to draw: no row then looks idle that only was not drawn
    cuts_s = [
        float(rows.sent_s[low[_BARS]])
        for rows, lane in zip(measured, lanes, strict=True)
        if len(low := np.flatnonzero(lane < _LANES)) > _BARS
    ]
    until = min(cuts_s, default=max(ends_s))
    x = svg.linear([until], 40, svg.WIDTH - svg.RIGHT)
    ticks = tuple(tick for tick in x.ticks if tick[0] <= until)
    x = svg.Axis(low=0, high=max(until, 1e-6), start=x.start, end=x.end, ticks=ticks)
    rates = [_rates(rows, x.high) for rows in measured]
    y = svg.linear([float(of.max(initial=0)) for of in rates], 80, svg.TOP)
    y = svg.Axis(low=y.low, high=y.high, start=y.start, end=y.end, ticks=(y.ticks[0], y.ticks[-1]))
    return [
        (_timeline(rows, lane, x), _rates_chart(of, x, y, style))
        for style, (rows, lane, of) in enumerate(zip(measured, lanes, rates, strict=True))
    ]


def _timeline(rows: Rows, lanes: np.ndarray, x: svg.Axis) -> str:
    """Each request as a bar: waiting to be sent, waiting for its first token, decoding. A row is a stream."""
    shown = np.flatnonzero((lanes < _LANES) & (rows.sent_s < x.high))
    used = int(lanes[shown].max(initial=0)) + 1
    row = max(3.0, min(12.0, 300 / used))
    bottom = svg.TOP + used * row + 4
    y = svg.Axis(low=0, high=1, start=bottom, end=svg.TOP)
    parts = [*svg.grid(x, y, "seconds since the start", f"{used} of {lanes.max() + 1} at once")]
    parts += _bars(rows, shown, lanes, x, row)
    part = f"{len(shown)} of {len(lanes)} requests drawn" if len(shown) < len(lanes) else f"all {len(lanes)} requests"
    title = f"{rows.subject}, {rows.level}, round {rows.round + 1}: {part}"
    told = f"{int(rows.failed.sum())} of {len(lanes)} failed"
    return svg.figure(title, told, parts, height=bottom + svg.BOTTOM)


def _lanes(rows: Rows) -> np.ndarray:
    """The row of each request: the first that is free when it is due, or else sent."""
    begins_s = rows.sent_s + np.nan_to_num(rows.due_s)
    busy: list[tuple[float, int]] = []
    free: list[int] = []
    lanes = np.zeros(len(rows), int)
    for place in np.argsort(begins_s, kind="stable"):
        while busy and busy[0][0] <= begins_s[place] + 1e-5:
            heappush(free, heappop(busy)[1])
        lanes[place] = heappop(free) if free else len(busy)
        heappush(busy, (rows.sent_s[place] + rows.end_s[place], int(lanes[place])))
    return lanes


def _bars(rows: Rows, shown: np.ndarray, lanes: np.ndarray, x: svg.Axis, row: float) -> Iterator[str]:
    """One path a kind of bar: a tenth of the bytes of a rectangle each."""
    paths: dict[str, list[str]] = {"queued": [], "first": [], "decode": [], "failed": []}
    for place in shown:
        sent_s, y = float(rows.sent_s[place]), svg.TOP + (lanes[place] + 0.5) * row
        first_s = sent_s + float(np.nan_to_num(rows.first_s[place], nan=rows.end_s[place]))
        due_s, end_s = sent_s + float(np.nan_to_num(rows.due_s[place])), sent_s + float(rows.end_s[place])
        kinds = (("queued", due_s, sent_s), ("first", sent_s, first_s), ("decode", first_s, end_s))
        for kind, begin, end in kinds:
            kind = "failed" if rows.failed[place] and kind == "decode" else kind
            if x.at(end) - x.at(begin) > 0.05:
                paths[kind].append(f"M{x.at(begin):.1f} {y:.1f}H{x.at(end):.1f}")
        if rows.failed[place]:
            paths["failed"].append(f"M{x.at(end_s) - 1.5:.1f} {y:.1f}h1.5")
    for kind, path in paths.items():
        if path:
            yield f'<path class="bar b-{kind}" stroke-width="{max(1.5, row - 1.5):.1f}" d="{"".join(path)}"/>'


def _rates(rows: Rows, until_s: float) -> Floats:
    """Output tokens/s in each bin of the time, a chunk counting as its share of its request's tokens."""
    owner = rows.owners()
    weights = (rows.tokens / np.maximum(np.diff(rows.ends, prepend=0), 1))[owner]
    at_s = rows.chunks_s + rows.sent_s[owner]
    bins = int(np.clip(until_s / _BIN_S, 1, _BINS))
    tokens, _ = np.histogram(at_s, bins, (0, until_s), weights=weights)
    found: Floats = tokens * bins / until_s
    return found


def _rates_chart(rates: Floats, x: svg.Axis, y: svg.Axis, style: int) -> str:
    xs = np.linspace(x.start, x.end, len(rates) + 1)
    steps = "".join(f"L{xs[i]:.1f} {y.at(rate):.1f}H{xs[i + 1]:.1f}" for i, rate in enumerate(rates))
    area = f'<path class="area f{style}" d="M{x.start:.1f} {y.start:.1f}{steps}V{y.start:.1f}Z"/>'
    told = f"at most {number(float(rates.max(initial=0)))}"
    parts = [*svg.grid(x, y, "seconds since the start", ""), area]
    return svg.figure(f"Output tokens/s: {told}", told, parts, height=80 + svg.BOTTOM)
