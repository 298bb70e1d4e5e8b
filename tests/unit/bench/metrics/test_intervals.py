from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.bench.metrics.intervals import PERCENTILES, _t, least_count, ranks_around, spread


def below(count: int, share: float, most: int) -> float:
    """The chance that at most so many of `count` lie below a quantile."""
    return math.fsum(math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(most + 1))


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_percentiles_are_numpy_s(values: list[float]) -> None:
    found: Any = spread(np.array(values))
    for name, share in PERCENTILES.items():
        assert found[name] == pytest.approx(np.percentile(values, 100 * share), abs=2e-3)
    assert (found["min"], found["max"]) == (round(min(values), 3), round(max(values), 3))


def test_nothing_has_no_spread() -> None:
    assert spread(np.array([])) is None


@given(count=st.integers(2, 900), share=st.sampled_from(list(PERCENTILES.values())))
def test_the_order_statistics_hold_the_quantile_with_95_percent(count: int, share: float) -> None:
    ranks = ranks_around(count, share)
    if ranks is None:
        assert count < least_count(share)
        return
    lower, upper = ranks
    assert 0 <= lower < upper < count
    assert below(count, share, upper) - below(count, share, lower) >= 0.95
    assert below(count, share, lower) <= 0.025 < below(count, share, lower + 1)  # and no wider than that


@pytest.mark.parametrize(("share", "count"), [(0.5, 6), (0.9, 36), (0.99, 368), (0.999, 3688)])
def test_a_percentile_has_an_interval_from_a_count_on(share: float, count: int) -> None:
    assert least_count(share) == count
    assert ranks_around(count - 1, share) is None
    assert ranks_around(count, share) is not None


def test_intervals_of_too_few_are_none() -> None:
    found: Any = spread(np.array([4.0, 1.0, 3.0, 2.0]))
    assert set(found["ci95"]) == {"mean", *PERCENTILES}
    assert found["ci95"]["p50"] is None
    assert found["ci95"]["mean"] is not None
    one: Any = spread(np.array([4.0]))
    assert set(one["ci95"].values()) == {None}


@pytest.mark.parametrize(("freedom", "exact"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (9, 2.2622), (99, 1.9842)])
def test_student_s_t(freedom: int, exact: float) -> None:
    assert _t(freedom) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize(("name", "requests"), [("mean", 120), ("p50", 120), ("p95", 120), ("p99", 600)])
def test_intervals_of_gaps_cover_the_truth_though_gaps_of_a_request_are_alike(name: str, requests: int) -> None:
    """Requests of different speeds: an interval that took each gap as independent would hold in about 30 %."""
    rng = np.random.default_rng(0)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        speeds = rng.lognormal(2, 0.3, count)
        gaps = (speeds[:, None] * rng.gamma(20, 1 / 20, (count, 40))).ravel()
        return gaps, np.repeat(np.arange(count), 40)

    truth: Any = spread(draw(20_000)[0])
    held = 0
    for _ in range(200):
        gaps, owner = draw(requests)
        found: Any = spread(gaps, owner, requests)
        low, high = found["ci95"][name]
        held += low <= truth[name] <= high
    assert held >= 180


def test_one_request_tells_nothing_of_others() -> None:
    found: Any = spread(np.arange(100.0), np.zeros(100, dtype=np.int64), 1)
    assert set(found["ci95"].values()) == {None}
