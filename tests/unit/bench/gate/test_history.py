from __future__ import annotations

import numpy as np
import pytest

from llmopt.bench.gate.history import change_points


def nights(seed: int, *levels: tuple[int, float], noise: float = 0.05) -> list[float]:
    rng = np.random.default_rng(seed)
    return [float(value * np.exp(rng.normal(0, noise))) for count, value in levels for _ in range(count)]


def test_a_change_is_found_where_it_happened() -> None:
    (point,) = change_points(nights(0, (30, 100), (10, 120)))
    assert abs(point.index - 30) <= 1
    assert point.change == pytest.approx(0.2, abs=0.06)
    assert point.after / point.before == pytest.approx(1 + point.change)
    assert point.p < 0.001


def test_both_ways_and_in_order() -> None:
    points = change_points(nights(1, (20, 100), (20, 130), (20, 90)))
    assert [abs(point.index - at) <= 1 for point, at in zip(points, (20, 40), strict=True)] == [True, True]
    assert [point.change > 0 for point in points] == [True, False]


def test_a_return_to_the_old_level_is_found_too() -> None:
    points = change_points(nights(2, (20, 100), (8, 120), (20, 100), noise=0.02))
    assert [point.index for point in points] == [20, 28]


def test_noise_alone_is_rarely_a_change() -> None:
    assert sum(bool(change_points(nights(seed, (60, 100)))) for seed in range(200)) <= 10


def test_one_bad_night_is_not_a_change() -> None:
    series = nights(3, (40, 100))
    series[20] *= 3
    assert change_points(series) == []


def test_ten_percent_at_five_percent_noise_is_found_in_most_histories() -> None:
    found = [change_points(nights(seed, (40, 100), (20, 110))) for seed in range(100)]
    assert sum(len(points) == 1 and abs(points[0].index - 40) <= 4 for points in found) >= 90


def test_a_small_change_can_be_left_out() -> None:
    series = nights(4, (20, 100), (20, 103), (20, 130), noise=0.002)
    assert [point.index for point in change_points(series)] == [20, 40]
    assert [point.index for point in change_points(series, least_change=0.05)] == [40]


def test_the_unit_does_not_matter_and_the_opposite_is_the_opposite() -> None:
    series = nights(5, (20, 100), (20, 120))
    (point,) = change_points(series)
    (scaled,) = change_points([value * 1000 for value in series])
    (inverse,) = change_points([1 / value for value in series])
    assert scaled.index == inverse.index == point.index
    assert scaled.change == pytest.approx(point.change)
    assert 1 + inverse.change == pytest.approx(1 / (1 + point.change))


@pytest.mark.parametrize("series", [[], [100.0], [100.0, 200.0, 300.0], [100.0] * 30])
def test_a_short_or_constant_history_has_no_changes(series: list[float]) -> None:
    assert change_points(series) == []


def test_a_step_without_noise_is_certain() -> None:
    (point,) = change_points([100.0] * 5 + [110.0] * 5)
    assert (point.index, point.p) == (5, 0.0)


def test_a_figure_that_is_not_positive_is_an_error() -> None:
    with pytest.raises(ValueError, match="positive"):
        change_points([1.0, 0.0])
