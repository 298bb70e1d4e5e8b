"""What the gate says of a machine that is known, and of this one: false alarms, and regressions found.

The simulated machine has noise in each measurement, and a mood that wanders: between two measurements by half of that
noise. The real one is two known-truth servers, loaded by the client in rounds.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmopt.bench import Subject, measure, resolve
from llmopt.bench.gate.calibrate import calibrate
from llmopt.bench.gate.statistics import student_tail
from llmopt.bench.gate.verdict import LOOKS, judge
from llmopt.errors import MeasurementInvalidError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "bench" / "gate"))

from noisy_machine import LOWER, Machine

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]

RUNS = int(os.environ.get("LLMOPT_GATE_RUNS", "200"))  # of each cell of the simulated tables
REAL_RUNS = int(os.environ.get("LLMOPT_GATE_REAL_RUNS", "40"))
EFFECTS = (0.0, 0.05, 0.1, 0.2)
NOISES = (0.02, 0.05, 0.1, 0.3)
Alarm = Callable[[int, float, float], bool]


def machine(noise: float) -> Machine:
    return Machine(noise=noise, drift=noise / 2)


def one_threshold(seed: int, noise: float, effect: float) -> bool:
    """One run of each, 10 % apart."""
    ((base,), (cand,)) = machine(noise).rounds(np.random.default_rng(seed), 1, effect)[LOWER]
    return bool(cand > 1.1 * base)


def welch_in_sequence(seed: int, noise: float, effect: float) -> bool:
    """12 runs of the baseline, then 12 of the candidate, Welch's t test, p < 0.05."""
    rng = np.random.default_rng(seed)
    logs = np.cumsum(rng.normal(0, noise / 2, 24)) + rng.normal(0, noise, 24)
    base, cand = logs[:12], logs[12:] + math.log1p(effect)
    parts = np.array([base.var(ddof=1), cand.var(ddof=1)]) / 12
    freedom = parts.sum() ** 2 / (parts**2 / 11).sum()
    return student_tail(float((cand.mean() - base.mean()) / math.sqrt(parts.sum())), float(freedom)) < 0.05


def gate_of_12(seed: int, noise: float, effect: float) -> bool:
    rounds = machine(noise).rounds(np.random.default_rng(seed), LOOKS[0], effect)
    return judge({"c4": rounds}, looks=LOOKS, seed=seed, draws=1000).verdict == "fail"


def gate_in_sequence(seed: int, noise: float, effect: float) -> bool:
    return machine(noise).gate(seed, effect=effect, draws=400).verdict == "fail"


def gate_of_four_figures(seed: int, noise: float, effect: float) -> bool:
    return Machine(noise=noise, drift=noise / 2).gate(seed, effect=effect, figures=4, draws=200).verdict == "fail"


RULES: dict[str, Alarm] = {
    "one run, 10 % threshold": one_threshold,
    "Welch's t, in sequence": welch_in_sequence,
    "gate, 12 rounds": gate_of_12,
    "gate, up to 48 rounds": gate_in_sequence,
}


@pytest.mark.parametrize("name", RULES)
def test_table(name: str) -> None:
    rule = RULES[name]
    shares = {
        (noise, effect): sum(rule(seed, noise, effect) for seed in range(RUNS)) / RUNS
        for noise in NOISES
        for effect in EFFECTS
    }
    print(f"\n{name}: fails of {RUNS} runs; noise of one measurement down, true change across")
    print("        " + "".join(f"{effect:>8.0%}" for effect in EFFECTS))
    for noise in NOISES:
        print(f"{noise:>8.0%}" + "".join(f"{shares[noise, effect]:>8.1%}" for effect in EFFECTS))
    if name.startswith("gate"):
        assert max(shares[noise, 0.0] for noise in NOISES) <= 0.05
        assert min(shares[0.02, 0.2], shares[0.02, 0.1], shares[0.05, 0.2]) >= 0.95


def test_ten_percent_at_five_percent_noise() -> None:
    """Without a wandering mood: 5 % is all the noise there is."""
    hits = Counter(
        judge(
            {"c4": Machine(noise=0.05).rounds(np.random.default_rng(seed), 12, 0.1)}, looks=LOOKS, seed=seed, draws=1000
        ).verdict
        for seed in range(5 * RUNS)
    )
    print(f"\n+10 % at 5 % noise, first look (12 rounds) of {5 * RUNS} runs: {dict(hits)}")
    assert hits["fail"] >= 0.95 * 5 * RUNS


def test_false_alarms_of_several_figures() -> None:
    for noise in NOISES:
        alarms = sum(gate_of_four_figures(seed, noise, 0.0) for seed in range(RUNS))
        print(f"\nfour figures at {noise:.0%} noise, up to 48 rounds: {alarms} false alarms of {RUNS}")
        assert alarms <= 0.05 * RUNS


@contextmanager
def truth_server(ttft_ms: float, gap_ms: float) -> Iterator[str]:
    command = [sys.executable, "-m", "llmopt.bench.truth", "--ttft-ms", str(ttft_ms), "--gap-ms", str(gap_ms)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[1]
        finally:
            process.kill()


def gated(candidate: str, baseline: str, out: Path, seed: int) -> dict[str, Any]:
    """The verdict of a bench of 12 rounds, and up to 48 while it cannot tell; a busy machine may make it invalid."""
    settings = resolve(
        {
            "concurrency": (4,),
            "requests": 24,
            "rounds": LOOKS[0],
            "max_rounds": LOOKS[-1],
            "prompt_tokens": 16,
            "output_tokens": 16,
            "model": "truth",
            "gate": True,
            "seed": seed,
        }
    )
    subjects = {name: Subject(name=name, url=url) for name, url in (("candidate", candidate), ("baseline", baseline))}
    out.mkdir()
    try:
        metrics = measure(subjects, settings, out, lambda line, **facts: None).metrics
    except MeasurementInvalidError as error:
        return {"verdict": "invalid", "reason": error.message}
    gate = metrics["gate"]
    assert isinstance(gate, dict)
    return gate


def first_rounds_differ(out: Path) -> bool:
    """What a threshold of 10 % on one run of each would have said of the medians of TTFT and TPOT."""
    results = json.loads((out / "report.json").read_text())["results"]
    first = {name: results[name]["c4"]["rounds"][0] for name in results}
    return any(
        first["candidate"][figure] > 1.1 * first["baseline"][figure] for figure in ("ttft_ms_p50", "tpot_ms_p50")
    )


def test_real_runs(tmp_path: Path) -> None:
    """Two servers that do the same: four figures compared, so a false alarm is any of the four."""
    verdicts: Counter[str] = Counter()
    thresholds, noises = 0, []
    with truth_server(20, 2) as one, truth_server(20, 2) as other:
        for run in range(REAL_RUNS):
            out = tmp_path / str(run)
            gate = gated(one, other, out, run)
            verdicts[gate["verdict"]] += 1
            print(f"{run:3} {gate['verdict']:12} {gate['reason']}", flush=True)
            if gate["verdict"] != "invalid":
                thresholds += first_rounds_differ(out)
                noises.append(noise_of(out))
    print(f"\n{REAL_RUNS} real A/A runs: {dict(verdicts)}; a 10 % threshold on the first round: {thresholds} alarms")
    print(f"noise of the ratio of a pair of rounds, TTFT p50, median of the runs: {statistics.median(noises):.1%}")
    assert verdicts["fail"] <= 0.05 * REAL_RUNS


def test_real_regression(tmp_path: Path) -> None:
    """A server that is 10 % slower in all it does."""
    verdicts: Counter[str] = Counter()
    runs = max(1, REAL_RUNS // 4)
    with truth_server(22, 2.2) as slower, truth_server(20, 2) as usual:
        for run in range(runs):
            verdicts[gated(slower, usual, tmp_path / str(run), run)["verdict"]] += 1
    print(f"\n{runs} real runs with +10 %: {dict(verdicts)}")
    assert verdicts["pass"] == 0


def noise_of(out: Path) -> float:
    results = json.loads((out / "report.json").read_text())["results"]
    base, cand = ([each[LOWER] for each in results[name]["c4"]["rounds"]] for name in ("baseline", "candidate"))
    return calibrate({"c4": {LOWER: (base, cand)}}, looks=(12,)).floors[0].pair_cv
