"""Two or more ways of doing a thing, measured in turn: on a machine that others use, only ratios of one round count."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass
class Rounds:
    """Seconds of every way in every round, and of its client's CPU where that was taken."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu_s: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, ways: Mapping[str, Callable[[], tuple[float, float]]], count: int) -> Rounds:
        """Each way returns its seconds and CPU seconds; every other round goes through them backwards."""
        rounds = cls({way: [] for way in ways}, {way: [] for way in ways})
        for number in range(count):
            for way in list(ways) if number % 2 == 0 else reversed(ways):
                os.sync()  # what one left for the disk to do is not the next one's
                seconds, cpu_s = ways[way]()
                rounds.seconds[way].append(seconds)
                rounds.cpu_s[way].append(cpu_s)
        return rounds

    def speed(self, way: str, beside: str) -> float:
        """How fast one is, as a share of the other: the median of the ratios of each round."""
        return statistics.median(b / a for a, b in zip(self.seconds[way], self.seconds[beside], strict=True))

    def line(self, way: str, size: float, unit: str) -> str:
        """Its median: so many of `unit` a second of `size` in all, and CPU seconds."""
        seconds = statistics.median(self.seconds[way])
        cpu = statistics.median(self.cpu_s[way])
        each = " ".join(f"{second:.2f}" for second in self.seconds[way])
        return f"  {way:34} {size / seconds:8.0f} {unit}  {cpu:6.2f} s of CPU  ({each} s)"
