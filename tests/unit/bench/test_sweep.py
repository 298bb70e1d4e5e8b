from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.bench.sweep import Limits, Measured, sweep

SERVICE_MS = 100.0


def slots(count: int, *, slo_ms: float | None = None, noise: float = 0.0, seed: int = 0) -> Callable[[float], Measured]:
    """A server with so many slots, each of which takes 100 ms for a request, under a closed loop."""
    rng = random.Random(seed)

    def measure(streams: float) -> Measured:
        latency_ms = SERVICE_MS * max(1.0, streams / count) * rng.lognormvariate(0, noise)
        per_s = min(streams, count) / SERVICE_MS * 1e3 * rng.lognormvariate(0, noise)
        figures = {"tokens_per_s": 50 * per_s, "requests_per_s": per_s, "e2e_ms_p50": latency_ms}
        return Measured(figures=figures, meets=None if slo_ms is None else latency_ms <= slo_ms)

    return measure


def queue(
    per_s: float, *, slo_ms: float | None = None, noise: float = 0.0, seed: int = 0
) -> Callable[[float], Measured]:
    """M/M/1 under an open loop: a mean latency of 1 / (mu - lambda), and above its capacity that of a test of 60 s."""
    rng = random.Random(seed)

    def measure(rate: float) -> Measured:
        latency_ms = 1e3 / (per_s - rate) if rate < 0.99 * per_s else 30e3
        latency_ms *= rng.lognormvariate(0, noise)
        figures = {"tokens_per_s": 50 * min(rate, per_s), "e2e_ms_p50": latency_ms}
        return Measured(figures=figures, meets=None if slo_ms is None else latency_ms <= slo_ms)

    return measure


@given(st.integers(1, 200))
def test_the_knee_of_a_server_with_slots_is_where_the_slots_are_full(count: int) -> None:
    found = sweep(slots(count), kind="streams")
    assert found.knee is not None
    assert found.knee == pytest.approx(count, rel=0.11, abs=1)


def test_the_knee_of_a_queue_is_at_half_its_capacity() -> None:
    # Kleinrock (1979): rho = 1/2 gives the greatest power of M/M/1.
    found = sweep(queue(37.0), kind="rate")
    assert found.knee == pytest.approx(37 / 2, rel=0.15)


@given(st.integers(1, 200), st.floats(1.3, 6))
def test_the_best_load_meets_the_slo_and_the_next_does_not(count: int, factor: float) -> None:
    found = sweep(slots(count, slo_ms=factor * SERVICE_MS), kind="streams", limits=Limits(most=4096))
    assert found.best is not None
    assert int(factor * count) / 1.1 - 1 <= found.best <= int(factor * count)
    assert not found.at_limit


@given(st.floats(0.5, 300), st.floats(0.1, 0.9))
def test_the_best_rate_of_a_queue_is_found_to_the_resolution(per_s: float, utilisation: float) -> None:
    slo_ms = 1e3 / (per_s * (1 - utilisation))
    found = sweep(queue(per_s, slo_ms=slo_ms), kind="rate", limits=Limits(resolution=0.05))
    assert found.best is not None
    assert per_s * utilisation / 1.06 <= found.best <= per_s * utilisation * 1.01


@pytest.mark.parametrize("seed", range(20))
def test_noise_of_ten_percent_moves_the_best_load_little(seed: int) -> None:
    found = sweep(queue(40.0, slo_ms=100.0, noise=0.1, seed=seed), kind="rate")
    assert found.best == pytest.approx(30, rel=0.2)


@pytest.mark.parametrize("seed", range(20))
def test_noise_of_five_percent_moves_the_knee_little(seed: int) -> None:
    found = sweep(slots(24, noise=0.05, seed=seed), kind="streams")
    assert found.knee == pytest.approx(24, rel=0.25)


def test_one_unlucky_measurement_does_not_decide() -> None:
    honest, seen = queue(100.0, slo_ms=50.0), set()

    def measure(rate: float) -> Measured:
        first_time = rate not in seen
        seen.add(rate)
        figures = honest(rate)
        return Measured(figures=figures.figures, meets=False) if rate == 4.0 and first_time else figures

    assert sweep(measure, kind="rate").best == pytest.approx(80, rel=0.11)


def test_one_lucky_measurement_does_not_decide() -> None:
    honest, seen = queue(100.0, slo_ms=50.0), set()

    def measure(rate: float) -> Measured:
        first_time = rate not in seen
        seen.add(rate)
        figures = honest(rate)
        return Measured(figures=figures.figures, meets=True) if rate == 128.0 and first_time else figures

    assert sweep(measure, kind="rate").best == pytest.approx(80, rel=0.11)


def test_a_load_that_is_not_valid_is_neither_knee_nor_best() -> None:
    honest = slots(64, slo_ms=1e6)

    def measure(streams: float) -> Measured:
        found = honest(streams)
        return Measured(figures=found.figures, meets=found.meets, valid=streams <= 20)

    found = sweep(measure, kind="streams")
    assert found.knee is not None
    assert found.knee <= 20
    assert found.best is not None
    assert 18 <= found.best <= 20
    assert found.at_limit
    assert "32" in found.stopped


def test_without_slos_the_best_load_is_the_smallest_of_the_highest_throughput() -> None:
    assert sweep(slots(16), kind="streams").best == 16


def test_nothing_is_best_where_even_one_stream_breaks_the_slo() -> None:
    assert sweep(slots(4, slo_ms=SERVICE_MS / 2), kind="streams").best is None


def test_a_rate_below_the_first_is_found() -> None:
    found = sweep(queue(0.8, slo_ms=2000.0), kind="rate", limits=Limits(first=4.0))
    assert found.best == pytest.approx(0.3, rel=0.11)


def test_no_load_is_larger_than_allowed() -> None:
    found = sweep(slots(1000), kind="streams", limits=Limits(most=48))
    assert max(point.load for point in found.points) == 48
    assert found.at_limit


def test_doubling_ends_soon_after_throughput_does() -> None:
    found = sweep(slots(8), kind="streams")
    assert max(point.load for point in found.points) == 16
    assert "grew no more" in found.stopped


@given(st.integers(1, 100), st.floats(0, 0.5), st.integers(3, 30), st.integers(0, 1000))
def test_the_number_of_measurements_is_bounded_whatever_the_noise(
    count: int, noise: float, measurements: int, seed: int
) -> None:
    limits = Limits(measurements=measurements)
    found = sweep(slots(count, slo_ms=300, noise=noise, seed=seed), kind="streams", limits=limits)
    assert len(found.points) <= measurements


def test_streams_are_whole_numbers() -> None:
    assert all(point.load == int(point.load) for point in sweep(slots(13, slo_ms=250), kind="streams").points)


def test_the_first_loads_double() -> None:
    loads = [point.load for point in sweep(slots(32), kind="streams").points][:6]
    assert all(later == 2 * load for load, later in pairwise(loads))


def test_json_says_every_point() -> None:
    found = sweep(slots(4, slo_ms=150), kind="streams")
    told = json.loads(json.dumps(found.to_json()))
    assert [point["load"] for point in told["points"]] == [point.load for point in found.points]
    assert told["best"] == found.best
    assert {"e2e_ms_p50", "valid", "meets"} <= told["points"][0].keys()
