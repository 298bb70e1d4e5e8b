from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
from noisy_machine import HIGHER, LOWER, Machine, share

from llmopt.bench.gate.calibrate import Calibration, calibrate
from llmopt.errors import LlmoptError


@cache
def equal(noise: float, count: int = 24, seed: int = 0, metric: str = LOWER, drift: float = 0.0) -> Calibration:
    pairs = Machine(noise=noise, drift=drift).rounds(np.random.default_rng(seed), count, 0.0)[LOWER]
    return calibrate({"c4": {metric: pairs}}, looks=(12, 18))


def test_the_noise_is_that_of_the_machine() -> None:
    (floor,) = equal(0.05, count=200).floors
    assert floor.round_cv == pytest.approx(0.05, rel=0.15)
    assert floor.pair_cv == pytest.approx(0.05 * 2**0.5, rel=0.15)


def test_pairs_do_not_feel_the_drift_that_rounds_show() -> None:
    (floor,) = equal(0.02, drift=0.05).floors
    assert floor.round_cv > 2 * floor.pair_cv


def test_more_rounds_more_power_and_less_noise_find_smaller_changes() -> None:
    quiet, noisy = (equal(noise).floors[0].found for noise in (0.02, 0.1))
    for few, many in (quiet, noisy):
        assert many.smallest[0.8] < few.smallest[0.8] < few.smallest[0.95]
    assert quiet[0].smallest[0.8] < noisy[0].smallest[0.8]


def test_no_change_within_the_margin_is_said_to_be_found() -> None:
    assert equal(0.001).floors[0].found[0].smallest[0.8] >= 0.05


def test_the_gate_finds_the_change_that_is_foretold() -> None:
    machine = Machine(noise=0.08)
    rounds = machine.rounds(np.random.default_rng(1), 200, 0.0)
    change = calibrate({"c4": rounds}).floors[0].found[0].smallest[0.8]
    assert share(machine, "fail", 200, effect=change, rounds=12) == pytest.approx(0.8, abs=0.1)


def test_a_quiet_machine_needs_12_rounds_and_a_noisy_one_a_wider_margin() -> None:
    assert (equal(0.02).recommended_rounds, equal(0.02).recommended_margin) == (12, 0.05)
    assert equal(0.3).recommended_rounds == 18
    assert equal(0.3).recommended_margin > 0.1


def test_rates_are_calibrated_like_times() -> None:
    time, rate = equal(0.05), equal(0.05, metric=HIGHER)
    assert rate.floors[0].pair_cv == pytest.approx(time.floors[0].pair_cv)


def test_it_is_plain_json_and_lines() -> None:
    found = equal(0.05)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False)) == found.to_json()
    assert found.lines()[-1].startswith("recommended: ")


@pytest.mark.parametrize("pairs", [([1.0] * 5, [1.0] * 5), ([0.0] * 12, [1.0] * 12)])
def test_too_little_to_calibrate_by_is_an_error(pairs: tuple[list[float], list[float]]) -> None:
    with pytest.raises(LlmoptError, match="ttft_ms_p50"):
        calibrate({"c4": {LOWER: pairs}})
