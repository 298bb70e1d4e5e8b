"""Percentiles and means with the intervals that their sample supports, at 95 %.

Requests are taken as independent of each other, the gaps of one request are not. Sources: Hahn and Meeker, Statistical
Intervals, 5.2 (order statistics); Woodruff 1952, JASA 47, and Cochran, Sampling Techniques, 9A (clusters).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmopt.artifacts.outcome import Json

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Interval: TypeAlias = tuple[float, float]

PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}
_TAIL = 0.025
_T_OF_FEW = (math.inf, 12.706, 4.303)  # Student's t by degrees of freedom, where the expansion is not good yet


def spread(values: Floats, owner: Ints | None = None, owners: int = 0) -> dict[str, Json] | None:
    """Mean, percentiles and extremes, to the third decimal, with their intervals; None of nothing.

    With `owner`, the request (of `owners`) that each value belongs to, intervals allow for the likeness of values of
    one request. An interval is None where the values are too few for it: 368 requests for a p99, 3,688 for a p99.9.
    """
    if not len(values):
        return None
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    points = dict(
        zip(PERCENTILES, np.percentile(ordered, [100 * share for share in PERCENTILES.values()]), strict=True)
    )
    mean = float(ordered.mean())
    intervals: dict[str, Interval | None] = {}
    if owner is None:
        intervals["mean"] = _mean_interval(ordered - mean, len(ordered), mean, len(ordered))
        for name, share in PERCENTILES.items():
            ranks = ranks_around(len(ordered), share)
            intervals[name] = None if ranks is None else (ordered[ranks[0]], ordered[ranks[1]])
    else:
        whose = owner[order]
        sums: Floats = np.bincount(whose, weights=ordered - mean, minlength=owners).astype(np.float64)
        intervals["mean"] = _mean_interval(sums, owners, mean, len(ordered))
        for name, share in PERCENTILES.items():
            intervals[name] = _clustered(ordered, whose, owners, share, points[name])
    figures = {"mean": mean, **points, "min": ordered[0], "max": ordered[-1]}
    rounded: dict[str, Json] = {name: round(float(value), 3) for name, value in figures.items()}
    return {"count": len(ordered), **rounded, "ci95": {name: _rounded(pair) for name, pair in intervals.items()}}


@lru_cache(maxsize=512)
def ranks_around(count: int, share: float) -> tuple[int, int] | None:
    """Indices of the order statistics between which the quantile lies with 95 % or more; None: `count` is too small.

    The number of values below the quantile is binomial, whatever their distribution.
    """
    spread_of_rank = 8 * math.sqrt(count * share * (1 - share)) + 8
    first = max(0, math.floor(count * share - spread_of_rank))
    last = min(count, math.ceil(count * share + spread_of_rank))
    below = np.arange(first, last, dtype=np.float64)
    steps = np.log((count - below) / (below + 1) * (share / (1 - share)))
    log_weights = np.concatenate(([0.0], np.cumsum(steps)))
    weights = np.exp(log_weights - log_weights.max())
    cumulative = np.cumsum(weights) / weights.sum()
    lower = first + int(np.argmax(cumulative > _TAIL))
    upper = first + int(np.argmax(cumulative >= 1 - _TAIL)) + 1
    return (lower - 1, upper - 1) if lower >= 1 and upper <= count else None


def least_count(share: float) -> int:
    """The requests that a percentile needs to have an interval."""
    return math.ceil(math.log(_TAIL) / math.log(max(share, 1 - share)))


def _mean_interval(sums: Floats, clusters: int, mean: float, count: int) -> Interval | None:
    """By the sums of each cluster's deviations from the mean; a single value is a cluster too."""
    if clusters < 2:
        return None
    error = math.sqrt(clusters / (clusters - 1) * float(sums @ sums)) / count
    width = _t(clusters - 1) * error
    return mean - width, mean + width


def _clustered(ordered: Floats, owner: Ints, owners: int, share: float, point: float) -> Interval | None:
    """Woodruff: the interval of the share of values up to `point`, by clusters, carried over to the values."""
    if owners < least_count(share):  # as if all values of a request were one
        return None
    count = len(ordered)
    upto = int(np.searchsorted(ordered, point, side="right"))
    sizes = np.bincount(owner, minlength=owners)
    residues = np.bincount(owner[:upto], minlength=owners) - upto / count * sizes
    width = _t(owners - 1) * math.sqrt(owners / (owners - 1) * float(residues @ residues)) / count
    if share - width <= 0 or share + width >= 1:
        return None
    low, high = (share - width) * (count - 1), (share + width) * (count - 1)
    return ordered[math.floor(low)], ordered[math.ceil(high)]


def _t(freedom: int) -> float:
    """The 97.5 % point of Student's t (Abramowitz and Stegun 26.7.5)."""
    if freedom < len(_T_OF_FEW):
        return _T_OF_FEW[freedom]
    z = 1.959964
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + math.fsum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def _rounded(pair: Interval | None) -> list[Json] | None:
    return None if pair is None else [round(float(end), 3) for end in pair]
