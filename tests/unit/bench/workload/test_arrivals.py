from __future__ import annotations

from itertools import pairwise
from statistics import fmean, pstdev
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.bench.workload.arrivals import Kind, arrivals_s, replay_s
from llmopt.errors import SettingsError

KINDS = get_args(Kind)


def gaps(times: list[float]) -> list[float]:
    return [later - time for time, later in pairwise(times)]


def variation(times: list[float]) -> float:
    found = gaps(times)
    return pstdev(found) / fmean(found)


@pytest.mark.parametrize("kind", KINDS)
def test_gaps_are_those_of_the_rate_on_average(kind: Kind) -> None:
    assert fmean(gaps(arrivals_s(kind, 50.0, count=20_000, burstiness=0.5))) == pytest.approx(1 / 50, rel=0.05)


@given(st.sampled_from(KINDS), st.floats(0.1, 1000), st.floats(0.2, 5), st.integers(0, 9), st.floats(0, 30))
def test_times_never_go_back(kind: Kind, rate: float, burstiness: float, seed: int, ramp_s: float) -> None:
    times = arrivals_s(kind, rate, count=50, burstiness=burstiness, seed=seed, ramp_s=ramp_s)
    assert len(times) == 50
    assert times[0] >= 0
    assert all(gap >= 0 for gap in gaps(times))


def test_a_constant_rate_is_even_and_begins_at_once() -> None:
    assert arrivals_s("constant", 4.0, duration_s=1.0) == [0.0, 0.25, 0.5, 0.75]


def test_poisson_gaps_vary_as_much_as_they_are_long() -> None:
    assert variation(arrivals_s("poisson", 10.0, count=20_000)) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_burstiness_is_the_shape_of_a_gamma_distribution(burstiness: float) -> None:
    # A gamma distribution of shape k has a coefficient of variation of 1 / sqrt(k).
    times = arrivals_s("gamma", 10.0, count=40_000, burstiness=burstiness)
    assert variation(times) == pytest.approx(burstiness**-0.5, rel=0.05)


def test_a_lower_burstiness_puts_more_requests_into_the_fullest_second() -> None:
    def fullest(burstiness: float) -> int:
        times = arrivals_s("gamma", 20.0, duration_s=200, burstiness=burstiness)
        return max(sum(second <= time < second + 1 for time in times) for second in range(200))

    assert fullest(0.2) > fullest(1.0) > fullest(20.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_ramp_halves_the_requests_of_its_time_and_changes_nothing_later(kind: Kind) -> None:
    times = arrivals_s(kind, 100.0, duration_s=60.0, ramp_s=40.0)
    first, second, after = (sum(low <= time < low + 20 for time in times) for low in (0, 20, 40))
    assert first == pytest.approx(500, rel=0.15)  # the area of a triangle
    assert second == pytest.approx(1500, rel=0.15)
    assert after == pytest.approx(2000, rel=0.15)


def test_the_same_seed_gives_the_same_times_and_another_seed_others() -> None:
    first, same, other = (arrivals_s("poisson", 5.0, count=20, seed=seed) for seed in (1, 1, 2))
    assert first == same != other


def test_the_count_and_the_duration_both_end_it() -> None:
    assert len(arrivals_s("constant", 10.0, count=5, duration_s=100)) == 5
    assert len(arrivals_s("constant", 10.0, count=500, duration_s=1)) == 10


@pytest.mark.parametrize(("rate", "burstiness"), [(0.0, 1.0), (-1.0, 1.0), (float("inf"), 1.0), (1.0, 0.0)])
def test_a_rate_or_burstiness_of_nothing_is_an_error(rate: float, burstiness: float) -> None:
    with pytest.raises(SettingsError, match="cannot be"):
        arrivals_s("gamma", rate, count=1, burstiness=burstiness)


def test_a_trace_is_replayed_from_its_first_request_at_a_speed() -> None:
    assert replay_s([10.0, 11.0, 14.0], speed=2.0) == [0.0, 0.5, 2.0]
    with pytest.raises(SettingsError, match="`speed`"):
        replay_s([1.0], speed=0.0)
