"""When requests of an open loop are due, in seconds after the load's start."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

from llmopt.errors import SettingsError

Kind: TypeAlias = Literal["constant", "poisson", "gamma"]


def arrivals_s(
    kind: Kind,
    rate: float,
    *,
    count: int | None = None,
    duration_s: float | None = None,
    burstiness: float = 1.0,
    seed: int = 0,
    ramp_s: float = 0.0,
) -> list[float]:
    """Times at `rate` a second: the first `count` of them, those before `duration_s`, or what comes first of both.

    constant: evenly, from the start. poisson: gaps are exponential. gamma: gaps are gamma distributed with the shape
    `burstiness` and the same mean, as in `vllm bench serve`: below 1 they come in bursts, 1 is poisson, above 1 more
    evenly. During the first `ramp_s` the rate grows linearly from 0.
    """
    if count is None and duration_s is None:
        raise ValueError("arrivals need a count or a duration")
    for name, value in (("rate", rate), ("burstiness", burstiness)):
        if not 0 < value < math.inf:
            raise SettingsError(f"`{name}` cannot be `{value}`", hint="give a number above 0")
    times: Iterator[float] = (_ramped(pace / rate, ramp_s) for pace in _paces(kind, burstiness, seed))
    if duration_s is not None:
        times = itertools.takewhile(lambda at_s: at_s < duration_s, times)
    return list(itertools.islice(times, count))


def replay_s(at_s: Sequence[float], *, speed: float = 1.0) -> list[float]:
    """The times of a trace from its first request on, `speed` times as fast."""
    if not 0 < speed < math.inf:
        raise SettingsError(f"`speed` cannot be `{speed}`", hint="give a number above 0")
    return [(at - at_s[0]) / speed for at in at_s]


def _paces(kind: Kind, burstiness: float, seed: int) -> Iterator[float]:
    """Times of arrivals whose gaps are 1 on average."""
    if kind == "constant":
        yield from map(float, itertools.count())
    shape = burstiness if kind == "gamma" else 1.0
    rng = random.Random(f"arrivals {seed}")
    at = 0.0
    while True:
        at += rng.gammavariate(shape, 1 / shape)
        yield at


def _ramped(at_s: float, ramp_s: float) -> float:
    """When as many requests have come under the ramp as at the full rate until `at_s`.

    With a rate that grows linearly over `ramp_s`, the requests until t are t² / (2 ramp_s), then t - ramp_s / 2, each
    times the rate.
    """
    return math.sqrt(2 * ramp_s * at_s) if at_s < ramp_s / 2 else at_s + ramp_s / 2
