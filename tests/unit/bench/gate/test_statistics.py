from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.bench.gate import statistics

LOOKS = (12, 24, 48)
ratios = st.lists(st.floats(-1, 1), min_size=2, max_size=10)


@given(ratios, st.floats(-1, 1))
def test_the_estimate_moves_with_the_data(values: list[float], shift: float) -> None:
    d = np.array(values)
    assert statistics.hodges_lehmann(d + shift) == pytest.approx(statistics.hodges_lehmann(d) + shift, abs=1e-12)


@given(ratios)
def test_the_estimate_of_the_opposite_is_the_opposite(values: list[float]) -> None:
    d = np.array(values)
    assert statistics.hodges_lehmann(-d) == pytest.approx(-statistics.hodges_lehmann(d), abs=1e-12)


def test_one_wild_round_hardly_moves_the_estimate() -> None:
    d = np.full(12, 0.1)
    d[3] = 50.0
    assert statistics.hodges_lehmann(d) == pytest.approx(0.1)


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_p_is_the_share_of_all_signs_whose_rank_sum_is_as_large(values: list[int]) -> None:
    d = np.array(values, float)
    size = np.abs(d)
    ranks = np.array([0.0 if x == 0 else (size < x).sum() + ((size == x).sum() + 1) / 2 for x in size])
    mine = ranks[d > 0].sum()
    sums = [
        sum(r for r, up in zip(ranks, signs, strict=True) if up) for signs in itertools.product((0, 1), repeat=len(d))
    ]
    assert statistics.sign_flip_p(d) == pytest.approx(np.mean([s >= mine for s in sums]))


def test_p_is_right_where_signs_cannot_be_tried_one_by_one() -> None:
    rng = np.random.default_rng(0)
    d = rng.normal(0.2, 1, 48)
    ranks = np.argsort(np.argsort(np.abs(d))) + 1
    sums = (rng.random((40_000, 48)) < 0.5) @ ranks
    assert statistics.sign_flip_p(d) == pytest.approx((sums >= ranks[d > 0].sum()).mean(), abs=0.01)


def test_under_no_effect_p_is_below_a_level_no_more_often_than_the_level() -> None:
    rng = np.random.default_rng(1)
    ps = np.array([statistics.sign_flip_p(rng.standard_t(2, 12)) for _ in range(2000)])
    for level in (0.01, 0.05, 0.2):
        assert (ps <= level).mean() <= level + 3 * (level / 2000) ** 0.5


def test_the_interval_misses_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    bounds = [statistics.bootstrap(rng.normal(0, 1, 12), 0.05, seed, 300) for seed in range(600)]
    for missed in (np.mean([low > 0 for low, _ in bounds]), np.mean([high < 0 for _, high in bounds])):
        assert 0.02 <= missed <= 0.08


def test_the_same_seed_gives_the_same_interval() -> None:
    d = np.random.default_rng(3).normal(0, 1, 24)
    assert statistics.bootstrap(d, 0.05, 7) == statistics.bootstrap(d, 0.05, 7)
    assert statistics.bootstrap(d, 0.05, 7) != statistics.bootstrap(d, 0.05, 8)


ps = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@given(ps)
def test_holm_lies_between_each_p_and_bonferroni(values: list[float]) -> None:
    for p, adjusted in zip(values, statistics.holm(values), strict=True):
        assert p <= adjusted <= min(1.0, p * len(values))


@given(ps)
def test_holm_keeps_the_order(values: list[float]) -> None:
    adjusted = statistics.holm(values)
    for i, j in itertools.combinations(range(len(values)), 2):
        assert (values[i] <= values[j]) <= (adjusted[i] <= adjusted[j])


@given(ps, st.permutations(range(12)))
def test_holm_does_not_depend_on_the_order(values: list[float], shuffled: list[int]) -> None:
    order = [index for index in shuffled if index < len(values)]
    adjusted = statistics.holm(values)
    assert statistics.holm([values[index] for index in order]) == [adjusted[index] for index in order]


def test_holm_of_nothing_and_of_one() -> None:
    assert statistics.holm([]) == []
    assert statistics.holm([0.03]) == [0.03]


def test_holm_errs_in_any_of_many_true_hypotheses_at_alpha() -> None:
    drawn = np.random.default_rng(4).random((4000, 5))
    assert np.mean([min(statistics.holm(list(row))) < 0.05 for row in drawn]) <= 0.06


@pytest.mark.parametrize("looks", [(12,), LOOKS, (10, 20, 30, 40, 50)])
@pytest.mark.parametrize("alpha", [0.05, 0.005])
def test_all_looks_together_err_at_alpha(looks: tuple[int, ...], alpha: float) -> None:
    rng = np.random.default_rng(5)
    levels = [statistics.nominal(looks, look, alpha) for look in range(len(looks))]
    steps = np.sqrt(np.diff((0, *looks)))
    walk = np.cumsum(rng.normal(0, 1, (200_000, len(looks))) * steps, axis=1) / np.sqrt(looks)
    bounds = np.array([statistics._NORMAL.inv_cdf(1 - level) for level in levels])
    assert (walk > bounds).any(axis=1).mean() == pytest.approx(alpha, abs=4 * (alpha / 200_000) ** 0.5)


def test_one_look_has_all_of_alpha() -> None:
    assert statistics.nominal((20,), 0, 0.05) == pytest.approx(0.05)
    assert statistics.overall_p(0.03, (20,), 0) == 0.03


@pytest.mark.parametrize("look", [0, 1, 2])
@pytest.mark.parametrize("alpha", [0.4, 0.05, 0.004])
def test_the_overall_p_of_a_nominal_level_is_its_alpha(look: int, alpha: float) -> None:
    nominal = statistics.nominal(LOOKS, look, alpha)
    assert statistics.overall_p(nominal, LOOKS, look) == pytest.approx(alpha, rel=0.01)


@pytest.mark.parametrize("look", [0, 1, 2])
def test_the_overall_p_grows_with_p(look: int) -> None:
    found = [statistics.overall_p(p, LOOKS, look) for p in np.geomspace(1e-12, 1, 60)]
    assert found == sorted(found)
    assert found[0] > 0
    assert found[-1] <= 1


@pytest.mark.parametrize(
    ("share", "freedom", "t"), [(0.975, 11, 2.200985), (0.95, 5, 2.015048), (0.999, 1, 318.3088), (0.05, 30, -1.697261)]
)
def test_student_s_quantiles_are_those_of_the_tables(share: float, freedom: float, t: float) -> None:
    assert statistics.student_quantile(share, freedom) == pytest.approx(t, rel=1e-4)
