from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
from noisy_machine import HIGHER, LOWER, Machine, share

from llmopt.bench.gate.verdict import LEAST_ROUNDS, Comparison, Judgement, judge
from llmopt.errors import SettingsError


def one(base: Sequence[float], cand: Sequence[float], metric: str = LOWER, margin: float = 0.05) -> Comparison:
    return judge({"c4": {metric: (base, cand)}}, margin=margin, draws=1000).comparisons[0]


def pair(effect: float, count: int = 12, noise: float = 0.02, seed: int = 0) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(seed)
    base, cand = 100 * np.exp(rng.normal(0, noise, (2, count)))
    return list(base), list(cand * (1 + effect))


def test_a_time_much_longer_fails() -> None:
    found = one(*pair(0.2))
    assert (found.verdict, found.better) == ("fail", "lower")
    assert found.low is not None
    assert found.high is not None
    assert found.ratio is not None
    assert 1 < found.low < found.ratio < found.high
    assert found.ratio == pytest.approx(1.2, rel=0.03)


def test_a_time_much_shorter_passes() -> None:
    assert one(*pair(-0.2)).verdict == "pass"


def test_a_rate_much_higher_passes_and_a_lower_one_fails() -> None:
    assert one(*pair(0.2), metric=HIGHER).verdict == "pass"
    assert one(*pair(-0.2), metric=HIGHER).verdict == "fail"


def test_no_change_passes_in_little_noise_and_is_not_told_in_much() -> None:
    assert one(*pair(0.0)).verdict == "pass"
    assert one(*pair(0.0, noise=0.3)).verdict == "inconclusive"


def test_a_real_change_within_the_margin_is_no_failure() -> None:
    base, cand = pair(0.03, noise=0.002)
    found = one(base, cand, margin=0.05)
    assert found.verdict == "pass"
    assert found.p is not None
    assert found.p < 0.01


def test_swapping_the_subjects_turns_the_ratio_over() -> None:
    base, cand = pair(0.08, noise=0.05)
    there, back = one(base, cand), one(cand, base)
    assert there.ratio is not None
    assert back.ratio is not None
    assert there.ratio == pytest.approx(1 / back.ratio)


def test_a_rate_is_judged_as_its_time_is() -> None:
    base, cand = pair(0.08, noise=0.05)
    time, rate = one(base, cand), one([1 / x for x in base], [1 / x for x in cand], metric=HIGHER)
    assert (time.verdict, time.p) == (rate.verdict, rate.p)
    assert rate.ratio is not None
    assert time.ratio == pytest.approx(1 / rate.ratio)
    assert rate.low is not None
    assert time.high == pytest.approx(1 / rate.low)


def test_the_unit_does_not_matter() -> None:
    base, cand = pair(0.08, noise=0.05)
    in_ms, in_us = one(base, cand).to_json(), one([x * 1000 for x in base], [x * 1000 for x in cand]).to_json()
    assert in_ms == in_us


@pytest.mark.parametrize("count", [0, 1, LEAST_ROUNDS - 1])
def test_few_rounds_tell_nothing_and_it_says_so(count: int) -> None:
    found = one(*pair(0.5, count=count))
    assert found.verdict == "inconclusive"
    assert f"{count} round" in found.reason


def test_six_rounds_can_fail() -> None:
    assert one(*pair(0.5, count=LEAST_ROUNDS)).verdict == "fail"


def test_a_zero_has_no_ratio_and_it_says_so() -> None:
    base, cand = pair(0.0)
    found = one([0.0, *base[1:]], cand)
    assert (found.verdict, found.ratio) == ("inconclusive", None)
    assert "0" in found.reason


def test_one_figure_that_fails_fails_the_gate() -> None:
    found = judge({"c1": {LOWER: pair(0.0)}, "c4": {LOWER: pair(0.5, seed=1)}}, draws=1000)
    assert found.verdict == "fail"
    assert [comparison.verdict for comparison in found.comparisons] == ["pass", "fail"]
    assert "c4 ttft_ms_p50" in found.reason


def test_one_figure_that_is_not_known_keeps_the_gate_from_passing() -> None:
    assert judge({"c1": {LOWER: pair(0.0), HIGHER: pair(0.0, noise=0.3)}}, draws=1000).verdict == "inconclusive"


def test_what_fails_alone_may_not_fail_among_many() -> None:
    base, cand = pair(0.075, noise=0.07, seed=4)
    alone = judge({"c1": {LOWER: (base, cand)}}, draws=1000).comparisons[0]
    assert alone.verdict == "fail"
    others = {f"c{level}": {LOWER: pair(0.0, seed=level)} for level in range(2, 40)}
    among = judge({"c1": {LOWER: (base, cand)}, **others}, draws=200).comparisons[0]
    assert among.verdict == "inconclusive"
    assert "more rounds" in among.reason


def test_the_same_rounds_and_seed_give_the_same_judgement() -> None:
    rounds = {"c4": {LOWER: pair(0.05, noise=0.05)}}
    assert judge(rounds, seed=3) == judge(rounds, seed=3)


def test_a_judgement_is_plain_json() -> None:
    found: Judgement = judge({"c4": {LOWER: pair(0.2), HIGHER: ([0.0] * 12, [1.0] * 12)}}, looks=(12, 24))
    again = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert again["verdict"] == "fail"
    assert again["looks"] == [12, 24]
    assert [comparison["ratio"] is None for comparison in again["comparisons"]] == [False, True]


def test_only_the_chosen_figures_are_judged() -> None:
    rounds = {"c4": {LOWER: pair(0.5), HIGHER: pair(0.5)}}
    assert judge(rounds, metrics=[HIGHER], draws=200).verdict == "pass"


@pytest.mark.parametrize(
    ("metrics", "hint"), [(["ttft_ms_p51"], "p50"), (["tftt_ms_p50"], "`ttft_ms_p50`"), (["e2e_ms_p50"], LOWER)]
)
def test_a_figure_that_is_not_there_is_an_error(metrics: list[str], hint: str) -> None:
    with pytest.raises(SettingsError) as raised:
        judge({"c4": {LOWER: pair(0.0)}}, metrics=metrics)
    assert raised.value.hint is not None
    assert hint in raised.value.hint


@pytest.mark.parametrize("values", [{"margin": 0.0}, {"margin": -1.0}, {"alpha": 0.0}, {"alpha": 1.0}])
def test_an_impossible_setting_is_an_error(values: dict[str, float]) -> None:
    with pytest.raises(SettingsError):
        judge({"c4": {LOWER: pair(0.0)}}, **values)  # type: ignore[arg-type]


# The figures that the gate is there for; tests/bench/test_gate.py prints the whole table.

MACHINES = {
    "quiet": Machine(noise=0.05),
    "noisy": Machine(noise=0.3),
    "drifting": Machine(noise=0.05, drift=0.1),
    "heating up": Machine(noise=0.02, trend=0.03),
    "with outliers": Machine(noise=0.05, outliers=0.1),
}


@pytest.mark.parametrize(
    ("name", "figures"), [("quiet", 1), ("noisy", 1), ("with outliers", 1), ("drifting", 3), ("heating up", 3)]
)
def test_equal_subjects_fail_in_5_of_100_runs_at_most_over_all_looks(name: str, figures: int) -> None:
    assert share(MACHINES[name], "fail", 200, figures=figures) <= 0.05


@pytest.mark.parametrize("noise", [0.02, 0.05])
def test_ten_percent_longer_is_found_in_95_of_100_runs_with_12_rounds(noise: float) -> None:
    assert share(Machine(noise=noise), "fail", 200, effect=0.1, rounds=12) >= 0.95


@pytest.mark.parametrize("name", ["drifting", "noisy"])
def test_a_change_as_large_as_the_margin_rarely_passes(name: str) -> None:
    assert share(MACHINES[name], "pass", 100, effect=0.05, draws=400) <= 0.08
