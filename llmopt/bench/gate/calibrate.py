"""What this machine's noise lets the gate find, from rounds in which both subjects are the same (A/A).

The measured rounds are drawn again and again into gates of 12, 24 and 48 rounds. A change of x would have moved each
log ratio by log(1 + x) and nothing else, so for each draw there is a smallest change that the gate calls a failure: its
quantile over the draws is the change found with that power.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmopt.artifacts.outcome import Json
from llmopt.bench.gate import statistics
from llmopt.bench.gate.statistics import Floats
from llmopt.bench.gate.verdict import LEAST_ROUNDS, LOOKS, Pairs, check, log_ratios
from llmopt.errors import LlmoptError

POWERS = (0.8, 0.95)
_MARGINS = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0)
_DRAWS = 200  # gates simulated for each number of rounds
_BOOTSTRAP = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a gate of so many rounds can do; changes are shares, 0.1 for +10 %."""

    rounds: int
    smallest: Mapping[float, float]  # the power -> the smallest change for the worse that fails with that power
    passes: Mapping[float, float]  # the power -> the smallest margin with which no change passes with that power

    def to_json(self) -> dict[str, Json]:
        return {
            "rounds": self.rounds,
            "smallest_change": {f"{power:g}": round(change, 4) for power, change in self.smallest.items()},
            "passing_margin": {f"{power:g}": round(margin, 4) for power, margin in self.passes.items()},
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Floor:
    """The noise of one figure at one level, and what can be found in it."""

    level: str
    metric: str
    rounds: int
    round_cv: float  # of a round's figure from round to round, of either subject
    pair_cv: float  # of the ratio of the two subjects of a round: what the gate sees
    found: tuple[Found, ...]

    def to_json(self) -> dict[str, Json]:
        return {
            "level": self.level,
            "metric": self.metric,
            "rounds": self.rounds,
            "round_cv": round(self.round_cv, 4),
            "pair_cv": round(self.pair_cv, 4),
            "found": [found.to_json() for found in self.found],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The noise floor of a machine and the gate that suits it."""

    margin: float  # the one asked for, at which the smallest changes hold
    alpha: float
    floors: tuple[Floor, ...]
    recommended_rounds: int
    recommended_margin: float

    def to_json(self) -> dict[str, Json]:
        return {
            "margin": self.margin,
            "alpha": self.alpha,
            "floors": [floor.to_json() for floor in self.floors],
            "recommended_rounds": self.recommended_rounds,
            "recommended_margin": self.recommended_margin,
        }

    def lines(self) -> list[str]:
        """The result for a person."""
        said = []
        for floor in self.floors:
            said.append(
                f"{floor.level} {floor.metric}: varies {floor.round_cv:.1%} from round to round, "
                f"{floor.pair_cv:.1%} between two of the same in a round"
            )
            for found in floor.found:
                powers = ", ".join(f"+{change:.1%} in {power:.0%}" for power, change in found.smallest.items())
                said.append(f"  {found.rounds:2} rounds find {powers} of the runs (margin {self.margin:.1%})")
        return [*said, f"recommended: {self.recommended_rounds} rounds, margin {self.recommended_margin:.1%}"]


def calibrate(
    rounds: Mapping[str, Mapping[str, Pairs]],
    *,
    margin: float = 0.05,
    alpha: float = 0.05,
    looks: Sequence[int] = LOOKS,
    seed: int = 0,
) -> Calibration:
    """Noise and power from A/A rounds, in the form that `verdict.judge` takes: `rounds[level][metric]`."""
    check(margin, alpha)
    floors = []
    for level, figures in rounds.items():
        for metric, (one, other) in figures.items():
            if len(one) < LEAST_ROUNDS or min(*one, *other) <= 0:
                raise LlmoptError(
                    f"{len(one)} rounds of `{metric}` at `{level}` are too few to calibrate by, or one of them is 0",
                    hint=f"measure {LOOKS[0]} rounds, {LEAST_ROUNDS} at the least",
                )
            floors.append(_floor(level, metric, one, other, margin, alpha, tuple(looks), seed))
    if not floors:
        raise LlmoptError("there is nothing to calibrate by", hint="measure rounds of two equal subjects")
    recommended_rounds, recommended_margin = _recommended(floors, margin, looks)
    return Calibration(
        margin=margin,
        alpha=alpha,
        floors=tuple(floors),
        recommended_rounds=recommended_rounds,
        recommended_margin=recommended_margin,
    )


def _floor(
    level: str,
    metric: str,
    one: Sequence[float],
    other: Sequence[float],
    margin: float,
    alpha: float,
    looks: tuple[int, ...],
    seed: int,
) -> Floor:
    d = log_ratios(one, other, metric)
    noise = d - statistics.hodges_lehmann(d)  # the two are equal: what is left is noise
    return Floor(
        level=level,
        metric=metric,
        rounds=len(d),
        round_cv=_cv(np.concatenate([np.log(one) - np.log(one).mean(), np.log(other) - np.log(other).mean()]), 2),
        pair_cv=_cv(d - d.mean(), 1),
        found=tuple(_found(noise, look, looks, margin, alpha, seed) for look in range(len(looks))),
    )


def _found(noise: Floats, look: int, looks: tuple[int, ...], margin: float, alpha: float, seed: int) -> Found:
    rng = np.random.default_rng([seed, look])
    level = statistics.nominal(looks, look, alpha)
    count = looks[look]
    wide = math.sqrt(len(noise) / (len(noise) - 1))  # a sample varies less around its own centre
    changes, bounds = [], []
    for draw in range(_DRAWS):
        d = wide * noise[rng.integers(0, len(noise), count)] * rng.choice((-1.0, 1.0), count)
        low, high = statistics.bootstrap(d, level, draw, _BOOTSTRAP)
        enough = math.log1p(margin) - float(statistics.hodges_lehmann(d))
        changes.append(max(enough, -low, _significant(d, level)))
        bounds.append(high)
    return Found(
        rounds=count,
        smallest={power: math.expm1(float(np.quantile(changes, power))) for power in POWERS},
        passes={power: max(0.0, math.expm1(float(np.quantile(bounds, power)))) for power in POWERS},
    )


def _significant(d: Floats, level: float) -> float:
    """The shift from which the sign-flip test rejects: minus the Walsh average that its critical rank sum picks."""
    averages = np.sort(statistics.walsh(d))
    least, most = 0, len(averages) - 1
    if statistics.sign_flip_p(d - averages[0] + 1e-12) >= level:
        return math.inf  # so few rounds never reject
    while least < most:  # the last average whose shift to just above 0 still rejects
        middle = (least + most + 1) // 2
        if statistics.sign_flip_p(d - averages[middle] + 1e-12) < level:
            least = middle
        else:
            most = middle - 1
    return float(-averages[least])


def _recommended(floors: Sequence[Floor], margin: float, looks: Sequence[int]) -> tuple[int, float]:
    """The first number of rounds at which every figure without a change passes in 80 % of the runs; else the most
    rounds, with the margin that it takes there."""
    needed = [max(floor.found[look].passes[POWERS[0]] for floor in floors) for look in range(len(looks))]
    for rounds, least in zip(looks, needed, strict=True):
        if least <= margin:
            return rounds, margin
    return looks[-1], next((step for step in _MARGINS if step >= needed[-1]), math.ceil(needed[-1] * 2) / 2)


def _cv(centred: Floats, means: int) -> float:
    """Coefficient of variation from logs less their `means` means."""
    return math.sqrt(math.expm1(float((centred**2).sum()) / (len(centred) - means)))
