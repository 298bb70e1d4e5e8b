"""A machine with noise, drift and outliers, on which two subjects are measured in rounds, in random order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmopt.bench.gate.verdict import LOOKS, Judgement, Pairs, judge

LOWER, HIGHER = "ttft_ms_p50", "tokens_per_s"


@dataclass(frozen=True, kw_only=True)
class Machine:
    noise: float = 0.05  # deviation of the log of one measurement
    shared: float = 0.0  # of what all figures of one measurement have in common, besides
    drift: float = 0.0  # step of a random walk from measurement to measurement
    trend: float = 0.0  # steady growth a measurement
    outliers: float = 0.0  # share of measurements with ten times the noise

    def rounds(self, rng: np.random.Generator, count: int, effect: float, figures: int = 1) -> dict[str, Pairs]:
        """`count` rounds of times, the candidate's longer by `effect`; the last of several figures is a rate."""
        mood = np.cumsum(rng.normal(self.trend, self.drift, 2 * count)) + rng.normal(0, self.shared, 2 * count)
        first = rng.random(count) < 0.5  # the baseline runs first
        base_at = 2 * np.arange(count) + ~first
        cand_at = 2 * np.arange(count) + first
        found: dict[str, Pairs] = {}
        for figure in range(figures):
            wild = np.where(rng.random(2 * count) < self.outliers, 10, 1)
            times = 100 * np.exp(mood + rng.normal(0, self.noise, 2 * count) * wild)
            base, cand = times[base_at], times[cand_at] * (1 + effect)
            if figure and figure == figures - 1:
                found[HIGHER] = (1e5 / base, 1e5 / cand)
            else:
                found[f"{LOWER[:-2]}{('50', '90', '95', '99')[figure]}"] = (base, cand)
        return found

    def gate(
        self, seed: int, *, effect: float = 0.0, figures: int = 1, looks: tuple[int, ...] = LOOKS, draws: int = 150
    ) -> Judgement:
        """The gate as CI runs it: more rounds while it cannot tell."""
        rounds = self.rounds(np.random.default_rng(seed), looks[-1], effect, figures)
        for look, count in enumerate(looks):
            so_far = {name: (base[:count], cand[:count]) for name, (base, cand) in rounds.items()}
            found = judge({"c4": so_far}, look=look, looks=looks, seed=seed, draws=draws)
            if found.verdict != "inconclusive":
                break
        return found


def share(
    machine: Machine,
    verdict: str,
    runs: int,
    *,
    effect: float = 0.0,
    figures: int = 1,
    rounds: int = 0,
    draws: int = 150,
) -> float:
    """How often the gate says `verdict`; `rounds`: by its first look only."""
    looks = LOOKS if not rounds else tuple(look for look in LOOKS if look >= rounds)
    hits = 0
    for seed in range(runs):
        if rounds:
            drawn = machine.rounds(np.random.default_rng(seed), rounds, effect, figures)
            found = judge({"c4": drawn}, look=0, looks=looks, seed=seed, draws=draws)
        else:
            found = machine.gate(seed, effect=effect, figures=figures, draws=draws)
        hits += found.verdict == verdict
    return hits / runs
