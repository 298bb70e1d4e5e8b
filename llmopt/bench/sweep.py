"""The search for the load that a server takes: where its knee is, and the largest load that meets the SLOs.

Only the search: what measures a load is given. Loads double until throughput stops growing. The knee is the load with
the greatest power, throughput over latency (Giessler et al., 1978; Kleinrock, "Power and deterministic rules of thumb
for probabilistic problems in computer communications", ICC 1979): it needs no threshold, and no smooth curve as Kneedle
does. The largest load that meets the SLOs is found by bisection, and both ends of what is left are measured again:
one noisy point does not move the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Literal, TypeAlias

from llmopt.artifacts.outcome import Json

Kind: TypeAlias = Literal["streams", "rate"]

_DEEPEST = 64  # the search goes down to the first rate over this, where the first one breaks the SLOs


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one measurement of a load brought. `meets`: the SLOs; None where there are none."""

    figures: Mapping[str, Json]  # by the compact names
    valid: bool = True  # the client kept up, so the figures mean something
    meets: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    load: float
    measured: Measured

    def to_json(self) -> dict[str, Json]:
        found: dict[str, Json] = {"load": self.load, **self.measured.figures, "valid": self.measured.valid}
        return found if self.measured.meets is None else {**found, "meets": self.measured.meets}


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How far the search goes and how closely it looks."""

    first: float = 1.0  # the load that it begins with
    most: float = 1024.0  # the largest load it may try
    resolution: float = 0.1  # it stops where two loads differ by no more than this share (streams: or by one)
    growth: float = 0.05  # throughput that grows by less over a doubling has stopped
    votes: int = 3  # measurements of the loads next to the answer; most of them decide
    measurements: int = 40  # it ends here, whatever is left


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """`points` in the order of measuring. `knee` and `best` are loads; None where no load is one.

    `best` is the largest load that meets the SLOs, or, without any, the smallest one that gives the highest throughput
    but for `Limits.growth`. `at_limit`: no larger load has been measured (validly), so a larger one may do too.
    """

    kind: Kind
    points: tuple[Point, ...]
    knee: float | None
    best: float | None
    at_limit: bool
    stopped: str  # why no larger load was tried

    def to_json(self) -> dict[str, Json]:
        return {
            "kind": self.kind,
            "points": [point.to_json() for point in self.points],
            "knee": self.knee,
            "best": self.best,
            "at_limit": self.at_limit,
            "stopped": self.stopped,
        }


def sweep(
    measure: Callable[[float], Measured],
    *,
    kind: Kind,
    limits: Limits = Limits(),
    throughput: str = "tokens_per_s",
    latency: str = "e2e_ms_p50",
) -> Sweep:
    """Search with `measure`, which takes a number of streams or a rate. `throughput`, `latency`: compact names."""
    search = _Search(measure, kind, limits, throughput, latency)
    search.double()
    best = search.largest_that_meets() if search.judged else search.fastest()
    search.refine_knee()
    return Sweep(
        kind=kind,
        points=tuple(search.points),
        knee=search.knee(),
        best=best,
        at_limit=best is not None and search.is_limit(best),
        stopped=search.stopped,
    )


@dataclass(slots=True)
class _Search:
    measure: Callable[[float], Measured]
    kind: Kind
    limits: Limits
    throughput: str
    latency: str
    points: list[Point] = field(default_factory=list)
    stopped: str = ""

    @property
    def judged(self) -> bool:
        return any(point.measured.meets is not None for point in self.points)

    @property
    def spent(self) -> bool:
        return len(self.points) >= self.limits.measurements

    def loads(self) -> list[float]:
        return sorted({point.load for point in self.points})

    def at(self, load: float) -> list[Measured]:
        return [point.measured for point in self.points if point.load == load]

    def look(self, load: float) -> None:
        self.points.append(Point(load=load, measured=self.measure(load)))

    def figure(self, load: float, name: str) -> float | None:
        """The median of the valid measurements of a load."""
        values = [m.figures.get(name) for m in self.at(load) if m.valid]
        numbers = [value for value in values if isinstance(value, int | float)]
        return median(numbers) if numbers else None

    def double(self) -> None:
        """Measure doubled loads until one of the limits; `stopped` says which.

        More streams than throughput grows for may still meet the SLOs. A higher rate would only make the queue longer.
        """
        load, most = self._rounded(self.limits.first), 0.0
        while not self.spent:
            self.look(load)
            if not self.at(load)[0].valid and not self.spent:  # it may have been bad luck
                self.look(load)
            if not any(measured.valid for measured in self.at(load)):
                self.stopped = f"the measurement of {load:g} was not valid"
                return
            reached = self.figure(load, self.throughput) or 0.0
            stalled, most = reached < (1 + self.limits.growth) * most, max(most, reached)
            if stalled and (self.kind == "rate" or not self.meets(load)):
                self.stopped = "throughput grew no more"
                return
            if load >= self.limits.most:
                self.stopped = f"{load:g} is the largest load allowed"
                return
            load = self._rounded(min(2 * load, self.limits.most))
        self.stopped = f"{len(self.points)} measurements are the most allowed"

    def largest_that_meets(self) -> float | None:
        """Bisect between the smallest load that breaks the SLOs and the largest one below it that meets them."""
        while not self.spent:
            low, high = self._bracket()
            if high is None:
                break
            if any(self.meets(load) for load in self.loads() if load > high) and not self._decided(high):
                self.look(high)  # a larger one did better, so it may have been bad luck
                continue
            between = self._below(high) if low is None else self._between(low, high)
            doubtful = [load for load in (low, high) if load is not None and not self._decided(load)]
            if between is not None:
                self.look(between)
            elif doubtful:
                self.look(doubtful[0])
            else:
                break
        return self._bracket()[0]

    def refine_knee(self) -> None:
        """Measure between the knee and its neighbours until they are close."""
        while not self.spent and (knee := self.knee()) is not None:
            loads = self.loads()
            at = loads.index(knee)
            pairs = zip(loads[max(0, at - 1) : at + 1], loads[max(1, at) : at + 2], strict=False)
            between = [load for low, high in pairs if (load := self._between(low, high)) is not None]
            if not between:
                return
            for load in between[: self.limits.measurements - len(self.points)]:
                self.look(load)

    def knee(self) -> float | None:
        """The load of the greatest throughput over latency."""
        powers = {}
        for load in self.loads():
            throughput, latency = self.figure(load, self.throughput), self.figure(load, self.latency)
            if throughput is not None and latency:
                powers[load] = throughput / latency
        return max(powers, key=powers.__getitem__) if powers else None

    def fastest(self) -> float | None:
        """The smallest load whose throughput is that of the fastest, but for `growth`."""
        found = {load: self.figure(load, self.throughput) or 0.0 for load in self.loads()}
        most = max(found.values())
        return next(load for load, value in found.items() if value * (1 + self.limits.growth) >= most) if most else None

    def meets(self, load: float) -> bool:
        """Whether most of its measurements meet the SLOs; those that are not valid do not."""
        votes = [measured.valid and measured.meets is True for measured in self.at(load)]
        return 2 * sum(votes) > len(votes)

    def is_limit(self, load: float) -> bool:
        """Whether nothing valid above it has been measured."""
        return not any(measured.valid for above in self.loads() if above > load for measured in self.at(above))

    def _bracket(self) -> tuple[float | None, float | None]:
        loads = self.loads()
        high = next((load for load in loads if not self.meets(load)), None)
        below = [load for load in loads if high is None or load < high]
        return (below[-1] if below else None), high

    def _decided(self, load: float) -> bool:
        """Whether further votes could not change what most of them say."""
        met = [measured.valid and measured.meets is True for measured in self.at(load)]
        return 2 * max(sum(met), len(met) - sum(met)) > self.limits.votes

    def _between(self, low: float, high: float) -> float | None:
        """Their geometric middle; None where they are as close as asked for."""
        middle = self._rounded(math.sqrt(low * high))
        return middle if high > low * (1 + self.limits.resolution) and low < middle < high else None

    def _below(self, load: float) -> float | None:
        """Half of a load where even the smallest one breaks the SLOs."""
        least = 1.0 if self.kind == "streams" else self.limits.first / _DEEPEST
        half = self._rounded(load / 2)
        return half if least <= half < load else None

    def _rounded(self, load: float) -> float:
        return float(max(1, round(load)) if self.kind == "streams" else f"{load:.3g}")
