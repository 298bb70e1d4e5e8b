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


def timelines(samples: Sequence[Sample]) -> list[str]:
    """What was in flight when, and the tokens that came of it, of one round of each subject, all over the same time."""
    lanes = [_lanes(sample) for sample in samples]
    ends_s = [float((sample.sent_s + sample.end_s).max()) for sample in samples]
    # cut before the first request that is one too many to draw: no row then looks idle that only was not drawn
    cuts_s = [
        float(sample.sent_s[low[_BARS]])
        for sample, lane in zip(samples, lanes, strict=True)
        if len(low := np.flatnonzero(lane < _LANES)) > _BARS
    ]
    until = min(cuts_s, default=max(ends_s))
    x = svg.linear([until], 40, svg.WIDTH - svg.RIGHT)
    ticks = tuple(tick for tick in x.ticks if tick[0] <= until)
    x = svg.Axis(low=0, high=max(until, 1e-6), start=x.start, end=x.end, ticks=ticks)
    rates = [_rates(sample, x.high) for sample in samples]
    y = svg.linear([float(of.max(initial=0)) for of in rates], 80, svg.TOP)
    y = svg.Axis(low=y.low, high=y.high, start=y.start, end=y.end, ticks=(y.ticks[0], y.ticks[-1]))
    return [
        _timeline(sample, lane, x) + _rates_chart(of, x, y, style)
        for style, (sample, lane, of) in enumerate(zip(samples, lanes, rates, strict=True))
    ]


def _timeline(sample: Sample, lanes: np.ndarray, x: svg.Axis) -> str:
    """Each request as a bar: waiting to be sent, waiting for its first token, decoding. A row is a stream."""
    shown = np.flatnonzero((lanes < _LANES) & (sample.sent_s < x.high))
    rows = int(lanes[shown].max(initial=0)) + 1
    row = max(3.0, min(12.0, 300 / rows))
    bottom = svg.TOP + rows * row + 4
    y = svg.Axis(low=0, high=1, start=bottom, end=svg.TOP)
    parts = [*svg.grid(x, y, "seconds since the start", f"{rows} of {lanes.max() + 1} in flight")]
    parts += _bars(sample, shown, lanes, x, row)
    part = f"{len(shown)} of {len(lanes)} requests drawn" if len(shown) < len(lanes) else f"all {len(lanes)} requests"
    title = f"{sample.subject}, {sample.level}, round {sample.round + 1}: {part}"
    told = f"{int(sample.failed.sum())} of {len(lanes)} failed"
    return svg.figure(title, told, parts, height=bottom + svg.BOTTOM)


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


def _rates(sample: Sample, until_s: float) -> Floats:
    """Output tokens/s in each bin of the time, a chunk counting as its share of its request's tokens."""
    counts = np.diff(sample.ends, prepend=0)
    owner = np.repeat(np.arange(len(counts)), counts)
    weights = (sample.tokens / np.maximum(counts, 1))[owner]
    at_s = sample.chunks_s + sample.sent_s[owner]
    tokens, _ = np.histogram(at_s, _BINS, (0, until_s), weights=weights)
    found: Floats = tokens * _BINS / until_s
    return found


def _rates_chart(rates: Floats, x: svg.Axis, y: svg.Axis, style: int) -> str:
    xs = np.linspace(x.start, x.end, _BINS + 1)
    steps = "".join(f"L{xs[i]:.1f} {y.at(rate):.1f}H{xs[i + 1]:.1f}" for i, rate in enumerate(rates))
    area = f'<path class="area f{style}" d="M{x.start:.1f} {y.start:.1f}{steps}V{y.start:.1f}Z"/>'
    told = f"{number(float(rates.mean()))} in the mean, {number(float(rates.max(initial=0)))} at most"
    parts = [*svg.grid(x, y, "seconds since the start", ""), area]
    return svg.figure(f"Output tokens/s: {told}", told, parts, height=80 + svg.BOTTOM)
