"""The statistics of the gate. What is random takes a seed; the same input and seed give the same floats.

All work on `d`, the log ratios of paired rounds (candidate over baseline, turned so that above 0 is worse). Rounds are
the unit: requests of one round share its luck, so they say little about the next (Kalibera & Jones, arXiv:2007.10899,
section 6: repeat at the level where the variance comes from).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_NORMAL = NormalDist()
_MOST_AT_ONCE = 2_000_000  # Walsh averages in memory: 16 MB


def walsh(d: Floats) -> Floats:
    """The averages of all pairs along the last axis, each value with itself too: n (n + 1) / 2 of them."""
    i, j = np.triu_indices(d.shape[-1])
    averages = np.take(d, i, axis=-1)
    averages += np.take(d, j, axis=-1)
    averages /= 2
    return averages


def hodges_lehmann(d: Floats) -> Floats:
    """Median of the Walsh averages along the last axis (Hodges & Lehmann 1963): a mean that outliers cannot move."""
    averages = walsh(d)
    lower, upper = (averages.shape[-1] - 1) // 2, averages.shape[-1] // 2
    averages.partition((lower, upper), axis=-1)  # np.median does the same in three times the time
    return np.asarray((averages[..., lower] + averages[..., upper]) / 2)


def bootstrap(d: Floats, alpha: float, seed: int, draws: int = 4000) -> tuple[float, float]:
    """Bounds of the Hodges-Lehmann estimate, each missed with probability `alpha`, by resampling rounds.

    Percentiles of the bootstrap, taken further out by Student's t and n / (n - 1), for the plain ones are too narrow
    with few rounds (Hesterberg 2015, arXiv:1411.5279, "expanded percentile interval").
    """
    n = d.shape[-1]
    rng = np.random.default_rng(seed)
    step = max(1, _MOST_AT_ONCE // (n * (n + 1) // 2))
    drawn = d[rng.integers(0, n, (draws, n))]
    estimates = np.concatenate([hodges_lehmann(drawn[at : at + step]) for at in range(0, draws, step)])
    outer = _NORMAL.cdf(-math.sqrt(n / (n - 1)) * student_quantile(1 - alpha, n - 1))
    low, high = np.quantile(estimates, (outer, 1 - outer))
    return float(low), float(high)


def sign_flip_p(d: Floats) -> float:
    """One-sided p that `d` is not above 0: the share of the 2^n choices of signs whose rank sum is as large.

    Which of a pair ran first is random, so without an effect each sign is a fair coin (Fisher 1935, section 21),
    whatever the noise. The sum is of ranks (Wilcoxon 1945), not of values: it belongs to the Hodges-Lehmann estimate,
    one wild round cannot drown it, and its distribution is counted exactly at any n, ties included (mean ranks,
    doubled to be whole numbers).
    """
    size = np.abs(d)
    order = np.sort(size)
    ranks = np.searchsorted(order, size, side="left") + np.searchsorted(order, size, side="right") + 1
    ranks = np.where(size == 0, 0, ranks)  # twice the mean rank; a round without a difference has no sign
    return _tail(tuple(sorted(int(rank) for rank in ranks)), int(ranks[d > 0].sum()))


@lru_cache(maxsize=512)
def _tail(ranks: tuple[int, ...], least: int) -> float:
    """The share of the subsets of `ranks` that sum to `least` or more."""
    share = np.zeros(sum(ranks) + 1)
    share[0] = 1.0
    for rank in ranks:
        with_it = np.roll(share, rank)
        with_it[:rank] = 0
        share = (share + with_it) / 2
    return min(1.0, float(share[least:].sum()))


def holm(ps: Sequence[float]) -> list[float]:
    """The p values adjusted for their number, step down (Holm 1979): all that are below alpha err at alpha together."""
    adjusted = [1.0] * len(ps)
    highest = 0.0
    for done, index in enumerate(sorted(range(len(ps)), key=lambda at: ps[at])):
        highest = max(highest, min(1.0, (len(ps) - done) * ps[index]))
        adjusted[index] = highest
    return adjusted


def spent(share: float, alpha: float) -> float:
    """The alpha used up when `share` of the rounds are in (Lan & DeMets 1983): its power family, exponent 1/2.

    Half of it at a quarter of the rounds, for most runs should end there; docs/decisions/0018-gate.md has the others.
    """
    return alpha * math.sqrt(share)


@lru_cache(maxsize=4096)
def nominal(looks: tuple[int, ...], look: int, alpha: float) -> float:
    """The level of a test at `look` (from 0) so that all looks together err with probability `alpha`.

    Found by integrating the path of the running sum from look to look (Armitage, McPherson & Rowe 1969, section 3).
    """
    if look == 0:
        return spent(looks[0] / looks[-1], alpha)
    share = [rounds / looks[-1] for rounds in looks[: look + 1]]
    grid = np.linspace(-6.0, 6.0, 601)  # the running sum in units of its deviation at the last look
    step = grid[1] - grid[0]
    density = np.exp(-(grid**2) / (2 * share[0])) / math.sqrt(2 * math.pi * share[0])
    bound = -_NORMAL.inv_cdf(spent(share[0], alpha)) * math.sqrt(share[0])
    for before, now in pairwise(share):
        inside = density * np.clip((bound - grid) / step + 0.5, 0, 1)  # paths that went on
        kernel = np.exp(-((grid[:, None] - grid) ** 2) / (2 * (now - before)))
        density = kernel @ inside * step / math.sqrt(2 * math.pi * (now - before))
        above = np.concatenate(
            [np.cumsum(density[::-1])[::-1] * step, [0.0]]
        )  # the chance of lying above each cell's edge
        edges = np.append(grid, grid[-1] + step) - step / 2
        bound = float(np.interp(-(spent(now, alpha) - spent(before, alpha)), -above, edges))
    return _NORMAL.cdf(-bound / math.sqrt(share[-1]))


def overall_p(p: float, looks: tuple[int, ...], look: int) -> float:
    """The alpha, of all looks together, at which `p` would just be enough at `look`: comparable with alpha itself.

    (The sequential p value of Liu & Anderson 2008; Holm holds on these, Maurer & Bretz 2013.)
    """
    if len(looks) == 1:
        return p
    levels, alphas = _levels(looks, look)
    if p < math.exp(levels[0]):  # so far out, one is in proportion to the other
        return p * math.exp(alphas[0] - levels[0])
    return math.exp(np.interp(math.log(p), levels, alphas))


@lru_cache(maxsize=64)
def _levels(looks: tuple[int, ...], look: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Logs of the nominal levels that belong to alphas from 1e-6 to 1."""
    alphas = [10 ** (exponent / 8) for exponent in range(-48, 1)]
    return tuple(math.log(nominal(looks, look, alpha)) for alpha in alphas), tuple(math.log(alpha) for alpha in alphas)


def student_tail(t: float, freedom: float) -> float:
    """P(T > t) of Student's t: with t = sqrt(freedom) tan(angle) the density is a power of a cosine."""
    if t < 0:
        return 1 - student_tail(-t, freedom)
    angle, width = _gauss_legendre()
    start = math.atan2(t, math.sqrt(freedom))
    half = (math.pi / 2 - start) / 2
    area = half * float((width * np.cos(start + half * (angle + 1)) ** (freedom - 1)).sum())
    return area * math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)


@cache
def _gauss_legendre() -> tuple[Floats, Floats]:
    return np.polynomial.legendre.leggauss(200)


@lru_cache(maxsize=4096)
def student_quantile(share: float, freedom: float) -> float:
    """The t that Student's distribution lies below with probability `share`."""
    low, high = -1e3, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - student_tail(middle, freedom) < share else (low, middle)
    return (low + high) / 2
