"""Where a series of stored figures changed for good: for a nightly history, not for a pull request.

Splits as E-divisive does, judged by a t test instead of permutations, so that few points are enough and the same series
gives the same answer (Hunter: Fleming et al., arXiv:2301.03034, section 3; E-divisive: Matteson & James 2014).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmopt.artifacts.outcome import Json
from llmopt.bench.gate.statistics import Floats, student_tail

_WEAK = 10  # a split is first taken at this many times the p asked for, and judged again among its neighbours
_LEAST_SIDE = 2  # values on each side of a change


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangePoint:
    """From the value at `index` on the series lies elsewhere: geometric means up to the changes beside it."""

    index: int
    before: float
    after: float
    change: float  # 0.1: 10 % higher
    p: float

    def to_json(self) -> dict[str, Json]:
        return {"index": self.index, "before": self.before, "after": self.after, "change": self.change, "p": self.p}


def change_points(values: Sequence[float], *, max_p: float = 0.001, least_change: float = 0.0) -> list[ChangePoint]:
    """The changes of `values` (positive, oldest first), oldest first; smaller ones than `least_change` are left out."""
    if any(not 0 < value < math.inf for value in values):
        raise ValueError("a history holds positive values")
    series = np.log(np.asarray(values, float))
    splits = _split(series, 0, len(series), max_p * _WEAK)
    while True:
        found = [_point(series, *ends) for ends in _neighbours(splits, len(series))]
        weak = [point for point in found if point.p > max_p or abs(point.change) < least_change]
        if not weak:
            return found
        splits.remove(max(weak, key=lambda point: (point.p, -abs(point.change))).index)


def _split(series: Floats, start: int, end: int, max_p: float) -> list[int]:
    """Best split of `series[start:end]`, if it is one, and those of its sides."""
    if end - start < 2 * _LEAST_SIDE:
        return []
    at = start + best_split(series[start:end])
    if _t_test(series[start:at], series[at:end]) > max_p:
        return []
    return [*_split(series, start, at, max_p), at, *_split(series, at, end, max_p)]


def best_split(part: Floats) -> int:
    """The index that sets the two sides furthest apart by the energy distance, with weight n m / (n + m)."""
    n = len(part)
    apart = np.abs(part[:, None] - part)
    sums = np.pad(apart.cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # sums[i, j]: of the first i rows and j columns
    at = np.arange(_LEAST_SIDE, n - _LEAST_SIDE + 1)
    left, right = at.astype(float), (n - at).astype(float)
    within_left = sums[at, at] / left**2
    within_right = (sums[n, n] - 2 * sums[at, n] + sums[at, at]) / right**2
    across = 2 * (sums[at, n] - sums[at, at]) / (left * right)
    return int(at[np.argmax(left * right / n * (across - within_left - within_right))])


def _neighbours(splits: Sequence[int], end: int) -> list[tuple[int, int, int]]:
    edges = [0, *splits, end]
    return [(edges[i - 1], edges[i], edges[i + 1]) for i in range(1, len(edges) - 1)]


def _point(series: Floats, start: int, at: int, end: int) -> ChangePoint:
    before, after = series[start:at], series[at:end]
    return ChangePoint(
        index=at,
        before=math.exp(before.mean()),
        after=math.exp(after.mean()),
        change=math.expm1(after.mean() - before.mean()),
        p=_t_test(before, after),
    )


def _t_test(one: Floats, other: Floats) -> float:
    """Two-sided p of Student's t test with one variance for both sides: a side may have two values only."""
    freedom = len(one) + len(other) - 2
    squares = float(((one - one.mean()) ** 2).sum() + ((other - other.mean()) ** 2).sum())
    apart = abs(float(one.mean() - other.mean()))
    error = math.sqrt(squares / freedom * (1 / len(one) + 1 / len(other)))
    if apart <= 1e-12:
        return 1.0
    return min(1.0, 2 * student_tail(apart / error, freedom)) if error > 1e-12 * apart else 0.0
