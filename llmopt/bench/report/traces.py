"""The charts of the page that come from the requests: distributions, and what was in flight when."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from llmopt.bench.report import svg
from llmopt.bench.report.requests import Floats, Sample
from llmopt.bench.report.words import number

_HEIGHT = 280
_LANES = 40  # streams drawn
_BARS = 500  # requests drawn
_BINS = 80  # of time, for rates


def distributions(rounds: Mapping[str, Sequence[Sample]]) -> list[str]:
    """TTFT and ITL of one level, all rounds of a subject together, as the share of requests that took no longer."""
    ttft = {subject: _joined([sample.answered_ttft_ms() for sample in of]) for subject, of in rounds.items()}
    itl = {subject: _joined([sample.gaps_ms() for sample in of]) for subject, of in rounds.items()}
    found = [_distribution("Time to first token", "ms", ttft), _distribution("Gaps between chunks (ITL)", "ms", itl)]
    return [chart for chart in found if chart]


def _joined(parts: Sequence[Floats]) -> Floats:
    return np.concatenate(parts) if parts else np.empty(0)


def _distribution(title: str, unit: str, values: Mapping[str, Floats]) -> str | None:
    values = {subject: of for subject, of in values.items() if len(of)}
    if not values:
        return None
    floor = max(0.01, min(float(of[of > 0].min(initial=np.inf)) for of in values.values()))
    floor = floor if np.isfinite(floor) else 0.01
    y = svg.percentiles(max(map(len, values.values())), _HEIGHT - svg.BOTTOM, svg.TOP)
    lines = {subject: svg.quantiles(np.maximum(of, floor), y) for subject, of in values.items()}
    x = svg.logarithmic([value for points in lines.values() for _, value in points], svg.LEFT, svg.WIDTH - svg.RIGHT)
    parts = [*svg.grid(x, y, f"{unit}, logarithmic", "share that took no longer")]
    told = []
    for style, (subject, points) in enumerate(lines.items()):
        parts.append(svg.line([(x.at(value), y.at(share)) for share, value in points], style))
        for mark in (50.0, 99.0):
            if mark <= y.high and len(values[subject]) >= 1 / (1 - mark / 100):
                value = float(np.percentile(values[subject], mark))
                parts += _marked(x.at(value), y.at(mark), style, f"{subject} p{mark:g}: {number(value)} {unit}", value)
                told.append(f"{subject} p{mark:g} {number(value)} {unit}")
    if len(lines) > 1:
        parts += svg.legend(list(lines), svg.WIDTH - svg.RIGHT, svg.TOP - 12)
    return svg.figure(title, "; ".join(told), parts, height=_HEIGHT)


def _marked(x: float, y: float, style: int, told: str, value: float) -> Iterator[str]:
    """The first series says its value to the lower right of the mark, the second to the upper left."""
    yield svg.mark(x, y, style, told)
    left = style % 2 == 1 or x > svg.WIDTH - 60
    side = f'text-anchor="end" x="{x - 8:.1f}"' if left else f'x="{x + 8:.1f}"'
    yield f'<text class="label t{style}" {side} y="{y + (-6 if style % 2 else 14):.1f}">{number(value)}</text>'


def timeline(sample: Sample, style: int) -> str:
    """Each request as a bar: waiting to be sent, waiting for its first token, decoding. A row is a stream."""
    lanes = _lanes(sample)
    shown = np.flatnonzero(lanes < _LANES)[:_BARS]
    rows = int(lanes[shown].max(initial=0)) + 1
    ends = sample.sent_s[shown] + sample.end_s[shown]
    # cut where the drawn requests end, so that no row looks idle that only was not drawn
    until = float(sample.sent_s[shown].max()) if len(shown) < (lanes < _LANES).sum() else float(ends.max())
    row = max(3.0, min(12.0, 300 / rows))
    bottom = svg.TOP + rows * row + 4
    x = svg.linear([until], 36, svg.WIDTH - svg.RIGHT)
    ticks = tuple(tick for tick in x.ticks if tick[0] <= until)
    x = svg.Axis(low=0, high=max(until, 1e-6), start=x.start, end=x.end, ticks=ticks)
    y = svg.Axis(low=0, high=1, start=bottom, end=svg.TOP)
    parts = [*svg.grid(x, y, "seconds since the start", f"{rows} streams")]
    parts += _bars(sample, shown, lanes, x, row)
    part = f"{len(shown)} of {len(lanes)} requests drawn" if len(shown) < len(lanes) else f"all {len(lanes)} requests"
    title = f"{sample.subject}, {sample.level}, round {sample.round + 1}: {part}"
    told = f"{int(sample.failed.sum())} of {len(lanes)} failed; the last ended after {number(float(ends.max()))} s"
    return svg.figure(title, told, parts, height=bottom + svg.BOTTOM) + _rates(sample, style, x)


def _lanes(sample: Sample) -> np.ndarray:
    """The row of each request: the first that is free when it is sent, or was due."""
    free_s: list[float] = []
    lanes = np.zeros(len(sample.sent_s), int)
    for place, sent_s in enumerate(sample.sent_s):
        begin_s = sent_s + min(0.0, np.nan_to_num(sample.due_s[place]))
        lane = next((lane for lane, end_s in enumerate(free_s) if end_s <= begin_s + 1e-4), len(free_s))
        if lane == len(free_s):
            free_s.append(0.0)
        free_s[lane] = sent_s + sample.end_s[place]
        lanes[place] = lane
    return lanes


def _bars(sample: Sample, shown: np.ndarray, lanes: np.ndarray, x: svg.Axis, row: float) -> Iterator[str]:
    """One path a kind of bar: a tenth of the bytes of a rectangle each."""
    paths: dict[str, list[str]] = {"queued": [], "first": [], "decode": [], "failed": []}
    for place in shown:
        sent_s, y = float(sample.sent_s[place]), svg.TOP + (lanes[place] + 0.5) * row
        first_s = sent_s + float(np.nan_to_num(sample.ttft_ms[place] / 1e3, nan=sample.end_s[place]))
        due_s, end_s = sent_s + float(np.nan_to_num(sample.due_s[place])), sent_s + float(sample.end_s[place])
        kinds = (("queued", due_s, sent_s), ("first", sent_s, first_s), ("decode", first_s, end_s))
        for kind, begin, end in kinds:
            kind = "failed" if sample.failed[place] and kind == "decode" else kind
            if x.at(end) - x.at(begin) > 0.05:
                paths[kind].append(f"M{x.at(begin):.1f} {y:.1f}H{x.at(end):.1f}")
        if sample.failed[place]:
            paths["failed"].append(f"M{x.at(end_s) - 1.5:.1f} {y:.1f}h1.5")
    for kind, path in paths.items():
        if path:
            yield f'<path class="bar b-{kind}" stroke-width="{max(1.5, row - 1.5):.1f}" d="{"".join(path)}"/>'


def _rates(sample: Sample, style: int, above: svg.Axis) -> str:
    """Output tokens/s over the same time, counting a chunk as its share of the request's tokens."""
    counts = np.diff(sample.ends, prepend=0)
    owner = np.repeat(np.arange(len(counts)), counts)
    weights = (sample.tokens / np.maximum(counts, 1))[owner]
    at_s = sample.chunks_s + sample.sent_s[owner]
    edges = np.linspace(0, above.high, _BINS + 1)
    tokens, _ = np.histogram(at_s, edges, weights=weights)
    rates = tokens / (edges[1] - edges[0])
    height = 120
    y = svg.linear(rates.tolist(), height - svg.BOTTOM, svg.TOP)
    y = svg.Axis(low=y.low, high=y.high, start=y.start, end=y.end, ticks=(y.ticks[0], y.ticks[-1]))
    xs = [above.at(edge) for edge in edges]
    steps = "".join(f"L{xs[i]:.1f} {y.at(rate):.1f}H{xs[i + 1]:.1f}" for i, rate in enumerate(rates))
    area = f'<path class="area f{style}" d="M{above.start:.1f} {y.start:.1f}{steps}V{y.start:.1f}Z"/>'
    parts = [*svg.grid(above, y, "seconds since the start", "output tokens/s"), area]
    told = f"mean {number(float(rates.mean()))} tokens/s, at most {number(float(rates.max(initial=0)))}"
    return svg.figure(f"Output tokens/s: {told}", told, parts, height=height)
