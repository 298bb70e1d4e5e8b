"""Pieces of inline SVG: axes, frames and marks. Plain text by hand; colours are classes of the page's style sheet.

Every chart is drawn in a viewBox about as wide as a phone, so that its letters stay readable when it shrinks to one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np

from llmopt.bench.report.words import number

WIDTH = 460
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 26, 40  # margins of a plot, for tick labels and titles
_FEW = 6  # tick labels of an axis

Scale = Literal["linear", "log", "percentile"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """From values to pixels. On a `percentile` axis the tail is stretched: from 90 to 99 it is as far as to 99.9."""

    low: float
    high: float
    start: float
    end: float
    scale: Scale = "linear"
    ticks: tuple[tuple[float, str], ...] = ()

    def at(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        low, high, here = (_stretched(x, self.scale) for x in (self.low, self.high, inside))
        share = (here - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)


def _stretched(value: float, scale: Scale) -> float:
    if scale == "log":
        return math.log10(max(value, 1e-12))
    if scale == "percentile":
        return value / 50 if value <= 50 else 1 + math.log10(0.5 / max(1 - value / 100, 1e-9))
    return value


def linear(values: Iterable[float], start: float, end: float, *, zero: bool = True) -> Axis:
    found = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = (0.0 if zero else min(found)), max(found)
    if high <= low:
        low, high = (0.0, high or 1.0) if zero else (low - abs(low or 1.0) * 0.05, high + abs(high or 1.0) * 0.05)
    step = _step((high - low) / (_FEW - 1))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple((place * step, number_short(place * step)) for place in range(first, last + 1))
    return Axis(low=first * step, high=last * step, start=start, end=end, ticks=ticks)


def logarithmic(values: Iterable[float], start: float, end: float) -> Axis:
    found = [value for value in values if math.isfinite(value) and value > 0] or [1.0, 10.0]
    low, high = min(found) * 0.92, max(found) * 1.08
    for parts in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [part * 10.0**power for power in powers for part in parts if low <= part * 10.0**power <= high]
        if len(ticks) <= _FEW:
            break
    if len(ticks) > _FEW:
        ticks = ticks[:: math.ceil(len(ticks) / _FEW)]
    labels = tuple((tick, number_short(tick)) for tick in ticks)
    return Axis(low=low, high=high, start=start, end=end, scale="log", ticks=labels)


def percentiles(count: int, start: float, end: float) -> Axis:
    """From 0 to what `count` values can tell: 99.9 % needs a thousand."""
    marks = [mark for mark in (50.0, 90.0, 99.0, 99.9) if mark <= 90 or count >= 1 / (1 - mark / 100)]
    high = max(marks[-1], 100 * (1 - 1 / max(count, 10)))
    ticks = ((0.0, "min"), *((mark, f"p{mark:g}") for mark in marks))
    return Axis(low=0.0, high=min(high, 99.97), start=start, end=end, scale="percentile", ticks=ticks)


def _step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(part * power for part in (1, 2, 2.5, 5, 10) if part * power >= rough * (1 - 1e-9))


def number_short(value: float) -> str:
    if value and abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.6g}"


def grid(x: Axis, y: Axis, x_title: str, y_title: str) -> Iterator[str]:
    """Lines, tick labels and titles; y's title lies above its axis, where it can be read without turning the head."""
    for value, label in y.ticks:
        at = y.at(value)
        yield f'<path class="grid" d="M{x.start:.1f} {at:.1f}H{x.end:.1f}"/>'
        yield f'<text class="tick" text-anchor="end" x="{x.start - 6:.1f}" y="{at + 4:.1f}">{escape(label)}</text>'
    for value, label in x.ticks:
        at = x.at(value)
        yield f'<path class="grid" d="M{at:.1f} {y.start:.1f}v4"/>'
        yield f'<text class="tick" text-anchor="middle" x="{at:.1f}" y="{y.start + 17:.1f}">{escape(label)}</text>'
    yield f'<path class="axis" d="M{x.start:.1f} {y.start:.1f}H{x.end:.1f}"/>'
    yield f'<text class="tick" text-anchor="end" x="{x.end:.1f}" y="{y.start + 33:.1f}">{escape(x_title)}</text>'
    yield f'<text class="tick" x="2" y="{y.end - 12:.1f}">{escape(y_title)}</text>'


def line(points: Iterable[tuple[float, float]], style: int, *, thin: bool = False) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="line s{style}{" thin" if thin else ""}" points="{path}"/>'


def mark(x: float, y: float, style: int, title: str = "", *, size: float = 4.2) -> str:
    """Each series has a shape of its own, for those who do not tell the colours apart."""
    told = f"<title>{escape(title)}</title>" if title else ""
    if style % 2:
        return (
            f'<rect class="f{style}" x="{x - size * 0.9:.1f}" y="{y - size * 0.9:.1f}" width="{size * 1.8:.1f}" '
            f'height="{size * 1.8:.1f}">{told}</rect>'
        )
    return f'<circle class="f{style}" cx="{x:.1f}" cy="{y:.1f}" r="{size}">{told}</circle>'


def legend(names: Sequence[str], x: float, y: float) -> Iterator[str]:
    """From the right end, in one row."""
    for style in reversed(range(len(names))):
        x -= 7.6 * len(names[style]) + 20
        yield mark(x + 6, y - 4, style)
        yield f'<text class="tick" x="{x + 14:.1f}" y="{y}">{escape(names[style])}</text>'


def figure(title: str, description: str, parts: Iterable[str], *, height: float, width: float = WIDTH) -> str:
    """A chart with its title above it, and in words for those who do not see it."""
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {width:g} {height:g}" role="img">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(parts)}</svg></figure>"
    )


def quantiles(values: np.ndarray, axis: Axis, points: int = 90) -> list[tuple[float, float]]:
    """(percent, value) at places that are even on a percentile axis, as far as so many values tell."""
    places = np.linspace(0, _stretched(axis.high, "percentile"), points)
    shares = np.where(places <= 1, places / 2, 1 - 0.5 * 10.0 ** (1 - places))
    shares = shares[shares <= 1 - 1 / max(len(values), 2)]
    found = np.quantile(values, shares)
    return [(100 * float(share), float(value)) for share, value in zip(shares, found, strict=True)]


def said(value: float, unit: str = "") -> str:
    return f"{number(value)} {unit}".strip()
