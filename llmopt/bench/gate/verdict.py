"""Is the candidate worse than the baseline by more than a margin? pass, fail, or not known from this many rounds.

A figure fails where three things hold: the lower bound of its change is above 0, its p value (Holm over all figures and
levels) is below alpha, and the estimate is above the margin. It passes where the upper bound is below the margin. The
gate fails if one figure fails and passes if all pass; looks after 12, 24, 48 rounds share one alpha.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from llmopt.artifacts.outcome import Json
from llmopt.bench.gate import statistics
from llmopt.bench.gate.names import Better, better, names
from llmopt.errors import SettingsError, nearest

Verdict = Literal["pass", "fail", "inconclusive"]
Pairs = tuple[Sequence[float], Sequence[float]]  # baseline and candidate, one value a round

LOOKS = (12, 24, 48)
LEAST_ROUNDS = 6  # five values are too few to draw an interval from, and their p has a floor of 1 in 2^5


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One figure at one level; `ratio` is candidate / baseline, None where it does not exist, as are its bounds."""

    level: str
    metric: str
    better: Better
    ratio: float | None
    low: float | None
    high: float | None
    p: float | None
    p_adjusted: float | None
    rounds: int
    margin: float
    verdict: Verdict
    reason: str

    def to_json(self) -> dict[str, Json]:
        return {
            "level": self.level,
            "metric": self.metric,
            "better": self.better,
            "ratio": _rounded(self.ratio),
            "low": _rounded(self.low),
            "high": _rounded(self.high),
            "p": _rounded(self.p),
            "p_adjusted": _rounded(self.p_adjusted),
            "rounds": self.rounds,
            "margin": _rounded(self.margin),
            "verdict": self.verdict,
            "reason": self.reason,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """The gate's verdict and what it rests on."""

    verdict: Verdict
    margin: float
    alpha: float
    looks: tuple[int, ...]
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...] = ()  # what a reader has to know beside the verdict

    @property
    def reason(self) -> str:
        """The verdict in a line: what failed, else what is not known."""
        for verdict in ("fail", "inconclusive"):
            those = [comparison for comparison in self.comparisons if comparison.verdict == verdict]
            if those:
                first = f"{those[0].level} {those[0].metric}: {those[0].reason}"
                return first if len(those) == 1 else f"{first} (and {len(those) - 1} more)"
        return f"no figure is worse by more than {self.margin:.1%}"

    def to_json(self) -> dict[str, Json]:
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "margin": self.margin,
            "alpha": self.alpha,
            "looks": list(self.looks),
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
            "notes": list(self.notes),
        }


def judge(
    rounds: Mapping[str, Mapping[str, Pairs]],
    *,
    margin: float = 0.05,
    alpha: float = 0.05,
    metrics: Sequence[str] | None = None,
    look: int = 0,
    looks: Sequence[int] = (),
    seed: int = 0,
    draws: int = 4000,
) -> Judgement:
    """Compare interleaved rounds: `rounds[level][metric]` are baseline and candidate, round by round.

    `metrics` None: all that there are; else those of them that a level has. `look` counts from 0 in `looks`, the
    numbers of rounds at which the gate is or may be asked; empty: this is the only time. `alpha` is the chance of a
    wrong fail over all looks and figures; `draws` is the size of the bootstrap.
    """
    check(margin, alpha)
    _check_names(metrics or (), rounds)
    chosen = [
        (level, metric, *_floats(figures[metric]))
        for level, figures in rounds.items()
        for metric in (figures if metrics is None else metrics)
        if metric in figures
    ]
    if not chosen:
        raise SettingsError("there is nothing to compare", hint="name a figure that the report has, as `ttft_ms_p50`")
    plan = tuple(looks) or (max(len(base) for _, _, base, _ in chosen),)
    found = [
        _compare(level, metric, base, cand, margin=margin, alpha=alpha, look=look, looks=plan, seed=seed, draws=draws)
        for level, metric, base, cand in chosen
    ]
    return Judgement(
        verdict=overall(comparisons := settled(found, alpha)),
        margin=margin,
        alpha=alpha,
        looks=plan,
        comparisons=comparisons,
    )


def overall(comparisons: Sequence[Comparison]) -> Verdict:
    """Fail if one fails, pass if all pass."""
    verdicts = {comparison.verdict for comparison in comparisons}
    if "fail" in verdicts:
        return "fail"
    return "pass" if verdicts == {"pass"} else "inconclusive"


def log_ratios(base: Sequence[float], cand: Sequence[float], metric: str) -> statistics.Floats:
    """Log of how much worse each round of the candidate was, above 0 worse whichever way the figure is better."""
    d = np.log(np.asarray(cand, float)) - np.log(np.asarray(base, float))
    return np.asarray(d if better(metric) == "lower" else -d)


def in_words(metric: str, worse: float) -> str:
    """`8.2 % higher`, of a change that is `worse` as a log ratio."""
    change = math.expm1(worse if better(metric) == "lower" else -worse)
    return f"{abs(change):.1%} {'higher' if change > 0 else 'lower'}"


def _compare(
    level: str,
    metric: str,
    base: Sequence[float],
    cand: Sequence[float],
    *,
    margin: float,
    alpha: float,
    look: int,
    looks: tuple[int, ...],
    seed: int,
    draws: int,
) -> Comparison:
    """One figure before Holm: its verdict is what it would be if no other were compared; `settled` has the rest."""
    count = len(base)
    nothing = unknown(level, metric, rounds=count, margin=margin)
    if count and min(*base, *cand) <= 0:
        return replace(nothing, reason="a round has no value, or 0, which has no ratio")
    d = log_ratios(base, cand, metric)
    if count < LEAST_ROUNDS:
        told = f"{in_words(metric, float(np.median(d)))}, but " if count else ""
        rounds = f"{count} round{'' if count == 1 else 's'}"
        return replace(
            nothing, reason=f"{told}{rounds} cannot tell: {LEAST_ROUNDS} are the least and {LOOKS[0]} advised"
        )
    low, high = statistics.bootstrap(d, statistics.nominal(looks, look, alpha), seed, draws)
    p = statistics.overall_p(statistics.sign_flip_p(d), looks, look)
    return decided(nothing, float(statistics.hodges_lehmann(d)), low, high, p)


def unknown(level: str, metric: str, *, rounds: int, margin: float, reason: str = "") -> Comparison:
    """A comparison of which nothing is known yet."""
    return Comparison(
        level=level,
        metric=metric,
        better=better(metric),
        ratio=None,
        low=None,
        high=None,
        p=None,
        p_adjusted=None,
        rounds=rounds,
        margin=margin,
        verdict="inconclusive",
        reason=reason,
    )


def decided(comparison: Comparison, estimate: float, low: float, high: float, p: float) -> Comparison:
    """With its figures, from log ratios above 0 where worse, and the verdict that they give."""
    limit = math.log1p(comparison.margin)
    verdict: Verdict = "fail" if low > 0 and estimate > limit else "pass" if high < limit else "inconclusive"
    ratio, *bounds = (math.exp(x if comparison.better == "lower" else -x) for x in (estimate, low, high))
    return replace(comparison, ratio=ratio, low=min(bounds), high=max(bounds), p=p, verdict=verdict)


def settled(found: Sequence[Comparison], alpha: float) -> tuple[Comparison, ...]:
    """The verdicts once p is adjusted for all the figures, each with its reason."""
    tested = [index for index, comparison in enumerate(found) if comparison.p is not None]
    adjusted = dict(zip(tested, statistics.holm([found[index].p or 0.0 for index in tested]), strict=True))
    comparisons = []
    for index, comparison in enumerate(found):
        if index in adjusted:
            p = adjusted[index]
            missed = comparison.verdict == "fail" and p >= alpha
            comparison = replace(comparison, p_adjusted=p, verdict="inconclusive" if missed else comparison.verdict)
            comparison = replace(comparison, reason=_reason(comparison, alpha))
        comparisons.append(comparison)
    return tuple(comparisons)


def _reason(comparison: Comparison, alpha: float) -> str:
    """One line for a person: the change, what is certain of it, and why that decides it or does not."""
    assert comparison.ratio is not None
    assert comparison.low is not None
    assert comparison.high is not None
    sign = 1 if comparison.better == "lower" else -1
    worst = math.log(comparison.high if sign > 0 else comparison.low) * sign
    best = math.log(comparison.low if sign > 0 else comparison.high) * sign
    estimate = math.log(comparison.ratio) * sign
    limit = math.log1p(comparison.margin)
    change = in_words(comparison.metric, estimate)
    between = f"{comparison.low - 1:+.1%} to {comparison.high - 1:+.1%}"
    p = f"p = {comparison.p_adjusted:.2g}"
    if comparison.verdict == "fail":
        return f"{change} ({between}, {p}), worse by more than the margin of {comparison.margin:.1%}"
    if comparison.verdict == "pass":
        return f"{change} ({between}), not worse by the margin of {comparison.margin:.1%}"
    if best > 0 and estimate > limit:
        return f"{change} ({between}), but {p} is not below {alpha:g}: more rounds would tell"
    what = "worse, but by the margin or less" if best > 0 and estimate <= limit else "not told from noise"
    return f"{change} ({between}): {what}, and {in_words(comparison.metric, worst)} is not ruled out"


def _check_names(metrics: Sequence[str], rounds: Mapping[str, Mapping[str, Pairs]]) -> None:
    """A level may lack a figure (TPOT, of answers of one token); a figure that every level lacks is a mistake."""
    there = {metric for figures in rounds.values() for metric in figures}
    for metric in metrics:
        better(metric)  # a name that no report can have
        if metric not in there:
            raise SettingsError(f"no round has a `{metric}`", hint=nearest(metric, there or names()))


def _floats(pairs: Pairs) -> tuple[list[float], list[float]]:
    base, cand = ([float(value) for value in values] for values in pairs)
    if len(base) != len(cand):
        raise ValueError(f"{len(base)} rounds of the baseline, {len(cand)} of the candidate")
    return base, cand


def check(margin: float, alpha: float) -> None:
    if not 0 < margin < math.inf:
        raise SettingsError(f"`margin` cannot be `{margin}`", hint="give a share above 0, as 0.05 for 5 %")
    if not 0 < alpha < 0.5:
        raise SettingsError(f"`alpha` cannot be `{alpha}`", hint="give a chance between 0 and 0.5, as 0.05")


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
