"""Each algorithm by its properties."""

from __future__ import annotations

import pytest
import torch

from llmopt.formats.scheme import Activations, Scheme
from llmopt.models.parallel import Workers
from llmopt.quantizers import awq as awq_module
from llmopt.quantizers import gptq as gptq_module
from llmopt.quantizers.activations import int8_input, static_scale
from llmopt.quantizers.awq import round_groups, search_scale
from llmopt.quantizers.base import Grid, Statistics, block_size, exact_scale, grouped, output_error
from llmopt.quantizers.gptq import Curvature, aim, factorize, gptq, refine
from llmopt.quantizers.rtn import rtn
from llmopt.quantizers.smoothquant import search_smooth_scale, smooth_scale

SCHEMES = [
    Scheme(bits=bits, group_size=group_size, symmetric=symmetric)
    for bits in (2, 4, 8)
    for group_size in (-1, 32)
    for symmetric in (True, False)
]


def statistics_of(x_NI: torch.Tensor, wanted: frozenset[str]) -> Statistics:
    found = Statistics()
    found.take(x_NI, wanted)
    return found.finish()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(tokens: int = 2000, features: int = 128) -> torch.Tensor:
    x_NI = random(tokens, 16, seed=1) @ random(16, features, seed=2) + 0.3 * random(tokens, features, seed=3)
    return x_NI * torch.linspace(0.2, 3, features)


def hessian(x_NI: torch.Tensor) -> torch.Tensor:
    return x_NI.T @ x_NI


def prepared(hessian_II: torch.Tensor, *, act_order: bool = True, damping: float = 0.01) -> Curvature:
    curvature = factorize(hessian_II, damping=damping, act_order=act_order)
    assert curvature is not None
    return curvature


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_errs_by_half_a_step_at_most(scheme: Scheme) -> None:
    weight_OI = random(16, 128)
    rounded = rtn(weight_OI, scheme)
    error_OGS = grouped(rounded.dequantize() - weight_OI, scheme).abs()
    # The scale is rounded to eight bits, which may move the ends of the range by that much.
    slack = grouped(weight_OI, scheme).abs().amax(dim=2) * 2**-7
    assert (error_OGS.amax(dim=2) <= rounded.grid.scale_OG * 0.5001 + slack).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_stay_in_range(scheme: Scheme) -> None:
    for rounded in (
        rtn(random(16, 128), scheme),
        gptq(random(16, 128), prepared(hessian(correlated_inputs())), scheme, act_order=True),
    ):
        assert rounded.codes_OI.min() >= 0
        assert rounded.codes_OI.max() <= (1 << scheme.bits) - 1
        assert torch.equal(rounded.codes_OI, rounded.codes_OI.round())


def test_rows_of_zeros_stay_zero() -> None:
    weight_OI = torch.zeros(4, 128)
    for scheme in SCHEMES:
        assert torch.equal(rtn(weight_OI, scheme).dequantize(), weight_OI)


def test_weights_on_the_grid_are_kept() -> None:
    scheme = Scheme(bits=4, group_size=32, symmetric=True)
    on_grid_OI = rtn(random(16, 128), scheme).dequantize()
    # A group's largest code is -8 or 7: the grid that covers it again differs, so the original grid is given.
    grid = rtn(random(16, 128), scheme).grid
    assert torch.equal(rtn(on_grid_OI, scheme, grid).dequantize(), on_grid_OI)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_is_rounding_when_inputs_are_uncorrelated(scheme: Scheme, act_order: bool) -> None:
    weight_OI = random(16, 128)
    diagonal_II = torch.diag(torch.linspace(1, 2, 128))
    got = gptq(weight_OI, prepared(diagonal_II, act_order=act_order), scheme, act_order=act_order)
    assert torch.equal(got.codes_OI, rtn(weight_OI, scheme, got.grid).codes_OI)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gptq_moves_the_output_less_than_rounding(scheme: Scheme, act_order: bool) -> None:
    weight_OI, hessian_II = random(32, 128), hessian(correlated_inputs())
    got = gptq(weight_OI, prepared(hessian_II, act_order=act_order), scheme, act_order=act_order)
    nearest = rtn(weight_OI, scheme)
    assert output_error(got.dequantize() - weight_OI, hessian_II) < 0.7 * output_error(
        nearest.dequantize() - weight_OI, hessian_II
    )


def test_gptq_does_what_the_paper_says_one_column_at_a_time() -> None:
    """Against OBQ's own update (equation 2 of the paper): no Cholesky, the inverse Hessian shrunk column by column."""
    scheme = Scheme(bits=4, group_size=-1, symmetric=True)
    weight_OI, hessian_II = random(8, 32).double(), hessian(correlated_inputs(500, 32)).double()
    damped_II = hessian_II + 0.01 * hessian_II.diagonal().mean() * torch.eye(32)
    grid = Grid.fit(grouped(weight_OI.float(), scheme), scheme, hessian_II.diagonal().float()[None])
    left_OI, inverse_II, codes = weight_OI.clone(), torch.linalg.inv(damped_II), []
    for column in range(32):
        code_O = grid.round(left_OI[:, column : column + 1].float()[:, None], 4)[:, 0, 0]
        codes.append(code_O)
        error_O = (left_OI[:, column] - (code_O - 8) * grid.scale_OG[:, 0]) / inverse_II[column, column]
        left_OI -= torch.outer(error_O, inverse_II[column])
        inverse_II = inverse_II - torch.outer(inverse_II[:, column], inverse_II[column]) / inverse_II[column, column]
    got = gptq(weight_OI.float(), prepared(hessian_II.float(), act_order=False), scheme, act_order=False)
    assert torch.equal(got.codes_OI, torch.stack(codes, dim=1).float())


def test_block_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI, curvature = random(16, 128), prepared(hessian(correlated_inputs()))
    scheme = Scheme(bits=4, group_size=32, symmetric=False)
    expected = gptq(weight_OI, curvature, scheme, act_order=True).codes_OI
    monkeypatch.setattr(gptq_module, "_BLOCK", 8)
    got = gptq(weight_OI, curvature, scheme, act_order=True).codes_OI
    assert (got != expected).float().mean() < 1e-3  # float rounding may tip a tie


def test_rows_do_not_know_of_each_other() -> None:
    weight_OI, curvature = random(16, 128), prepared(hessian(correlated_inputs()))
    scheme = Scheme(bits=4, group_size=32, symmetric=True)
    whole = gptq(weight_OI, curvature, scheme, act_order=True).codes_OI
    halves = [gptq(part, curvature, scheme, act_order=True).codes_OI for part in (weight_OI[:8], weight_OI[8:])]
    assert torch.equal(whole, torch.cat(halves))


def test_a_dead_column_is_rounded_to_nearest() -> None:
    x_NI = correlated_inputs()
    x_NI[:, 5] = 0
    scheme = Scheme(bits=4, group_size=32, symmetric=True)
    weight_OI = random(16, 128)
    got = gptq(weight_OI, prepared(hessian(x_NI)), scheme, act_order=True)
    assert torch.equal(got.codes_OI[:, 5], rtn(weight_OI, scheme, got.grid).codes_OI[:, 5])


def test_a_singular_hessian_raises_the_damping_and_says_so() -> None:
    x_NI = random(3, 128)
    assert prepared(hessian(x_NI), damping=0.0).damping > 0.0


def test_an_indefinite_hessian_is_given_up() -> None:
    broken_II = -torch.eye(64)
    assert factorize(broken_II, damping=0.01, act_order=False) is None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_refining_never_makes_a_row_worse(scheme: Scheme) -> None:
    weight_OI, hessian_II = random(32, 128), hessian(correlated_inputs())
    start = gptq(weight_OI, prepared(hessian_II), scheme, act_order=True)
    refined = refine(weight_OI, start, hessian_II, ridge=0.0, sweeps=3)
    before, after = (
        torch.stack([output_error(row[None], hessian_II) for row in rounded.dequantize() - weight_OI])
        for rounded in (start, refined)
    )
    assert (after <= before * 1.0001).all()
    assert after.sum() < before.sum()
    assert refined.codes_OI.min() >= 0
    assert refined.codes_OI.max() <= (1 << scheme.bits) - 1
    assert torch.equal(refined.grid.scale_OG, exact_scale(refined.grid.scale_OG))


def test_refining_finds_the_best_codes_of_a_small_problem() -> None:
    """Where the columns do not depend on each other, one sweep is enough and every code is the best of all."""
    scheme = Scheme(bits=2, group_size=-1, symmetric=True)
    weight_OI, hessian_II = random(8, 32), torch.diag(torch.linspace(1, 3, 32))
    refined = refine(weight_OI, rtn(weight_OI, scheme), hessian_II, ridge=0.0, sweeps=10)
    error_OI = (refined.dequantize() - weight_OI).abs()
    for code in range(4):
        other_OI = ((code - 2) * refined.grid.scale_OG - weight_OI).abs()
        assert (error_OI <= other_OI + 1e-6).all()


def test_a_fitted_grid_is_no_worse_than_a_covering_one() -> None:
    scheme = Scheme(bits=3, group_size=32, symmetric=True)
    weight_OI, importance_GS = random(16, 128) ** 3, torch.linspace(0.1, 5, 128).reshape(4, 32)

    def error(grid: Grid) -> torch.Tensor:
        difference_OGS = grouped(rtn(weight_OI, scheme, grid).dequantize() - weight_OI, scheme)
        return (difference_OGS.square() * importance_GS).sum()

    covering = Grid.cover(grouped(weight_OI, scheme), scheme)
    assert error(Grid.fit(grouped(weight_OI, scheme), scheme, importance_GS)) < error(covering)


def test_aiming_is_least_squares_on_the_inputs_as_they_are() -> None:
    """Against torch's solver: W' x nearest to W o + d, over all tokens."""
    original_NI = correlated_inputs(600, 32)
    x_NI, ahead_NO = original_NI + 0.1 * random(600, 32, seed=7), 0.2 * random(600, 8, seed=8)
    weight_OI = random(8, 32)
    got_OI = aim(
        weight_OI, x_NI.T @ x_NI, original_NI.T @ x_NI, ahead_NO.T @ x_NI, prepared(x_NI.T @ x_NI, damping=1e-8)
    )
    expected_OI = torch.linalg.lstsq(x_NI, original_NI @ weight_OI.T + ahead_NO).solution.T
    assert torch.allclose(got_OI, expected_OI, atol=5e-3)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("features", [96, 128, 300, 640])
def test_the_factor_is_that_of_the_inverse(features: int, act_order: bool) -> None:
    """Whatever the switch says, in full float32, and in the order of rounding."""
    hessian_II = hessian(correlated_inputs(2 * features, features))
    with Workers(bfloat16=True):
        found = factorize(hessian_II, damping=0.01, act_order=act_order)
    assert found is not None
    damped_PP = hessian_II.double()[found.order_P[:, None], found.order_P]
    damped_PP.diagonal().add_(0.01 * hessian_II.double().diagonal().mean())
    expected_PP = torch.linalg.cholesky(torch.linalg.inv(damped_PP), upper=True)
    assert float((found.factor_PP - expected_PP).norm() / expected_PP.norm()) < 1e-4


def test_a_ridge_is_a_damped_hessian() -> None:
    weight_OI, hessian_II = random(16, 128), hessian(correlated_inputs())
    scheme = Scheme(bits=3, group_size=32, symmetric=True)
    damped_II = hessian_II + 2.0 * torch.eye(128)
    start = rtn(weight_OI, scheme)
    with_ridge = refine(weight_OI, start, hessian_II, ridge=2.0, sweeps=2)
    assert torch.equal(with_ridge.codes_OI, refine(weight_OI, start, damped_II, ridge=0.0, sweeps=2).codes_OI)


def test_aiming_changes_nothing_where_nothing_deviates() -> None:
    weight_OI, hessian_II = random(8, 128), hessian(correlated_inputs())
    assert torch.equal(aim(weight_OI, hessian_II, hessian_II, None, prepared(hessian_II, damping=0.01)), weight_OI)


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_scaling_beats_rounding_where_channels_differ(symmetric: bool) -> None:
    scheme = Scheme(bits=4, group_size=32, symmetric=symmetric)
    x_NI = correlated_inputs()
    x_NI[:, ::17] *= 20
    weight_OI, hessian_II = random(32, 128), hessian(x_NI)
    scale_I = search_scale(weight_OI, hessian_II[None], x_NI.abs().mean(dim=0), scheme, grid=20)
    scaled = rtn(weight_OI * scale_I, scheme).dequantize() / scale_I
    assert output_error(scaled - weight_OI, hessian_II) < 0.5 * output_error(
        rtn(weight_OI, scheme).dequantize() - weight_OI, hessian_II
    )


def test_awq_leaves_channels_alone_where_no_scale_is_better() -> None:
    """Where every weight is on the grid already, any scale makes it worse."""
    scheme = Scheme(bits=4, group_size=32, symmetric=False)
    weight_OI = (random(32, 128) * 4).round().clamp(-7, 7)
    weight_OI[:, ::32], weight_OI[:, 1::32] = -7, 8
    scale_I = search_scale(weight_OI, torch.eye(128)[None], random(128).abs(), scheme, grid=20)
    assert torch.equal(scale_I, torch.ones(128))


def test_awq_ties_channels_before_it_compares_them() -> None:
    scheme, x_NI = Scheme(bits=4, group_size=32, symmetric=True), correlated_inputs() * torch.logspace(-1, 1, 128)
    scale_I = search_scale(
        random(32, 128),
        hessian(x_NI)[None],
        x_NI.abs().mean(dim=0),
        scheme,
        grid=20,
        tie=lambda scale_I: scale_I.view(2, 64).mean(dim=0).repeat(2),
    )
    assert torch.equal(scale_I[:64], scale_I[64:])
    assert scale_I.std() > 0


@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_awq_rounds_each_group_no_worse_with_each_step(scheme: Scheme, size: int) -> None:
    """Clipping lowers the error of every group of every row, and so does refining it."""
    weight_OI, hessian_II = random(32, 128) ** 3, hessian(correlated_inputs())
    blocks_BSS = torch.stack([hessian_II[i : i + size, i : i + size] for i in range(0, 128, size)])
    group = min(size, 32 if scheme.group_size == 32 else 128)

    def errors(*, clip: bool, sweeps: int) -> torch.Tensor:
        rounded = round_groups(weight_OI, blocks_BSS, scheme, clip=clip, sweeps=sweeps)
        assert rounded.codes_OI.min() >= 0
        assert rounded.codes_OI.max() <= (1 << scheme.bits) - 1
        assert torch.equal(rounded.codes_OI, rounded.codes_OI.round())
        assert torch.equal(rounded.grid.scale_OG, exact_scale(rounded.grid.scale_OG))
        error_OI = rounded.dequantize() - weight_OI
        blocks_II = torch.block_diag(*[hessian_II[i : i + group, i : i + group] for i in range(0, 128, group)])
        each_OI = (error_OI @ blocks_II) * error_OI
        return each_OI.view(32, scheme.groups(128), -1).sum(dim=2)

    plain, clipped, refined = (errors(clip=c, sweeps=s) for c, s in ((False, 0), (True, 0), (True, 3)))
    assert (clipped <= plain * 1.0001 + 1e-6).all()
    assert (refined <= clipped * 1.0001 + 1e-6).all()
    assert clipped.sum() < plain.sum()
    assert refined.sum() < 0.9 * clipped.sum()


def test_sweeping_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI, blocks_BSS = random(32, 128), hessian(correlated_inputs())[None]
    scheme = Scheme(bits=4, group_size=-1, symmetric=False)
    expected = round_groups(weight_OI, blocks_BSS, scheme, clip=False, sweeps=1).codes_OI
    monkeypatch.setattr(awq_module, "_CHUNK", 128)
    got = round_groups(weight_OI, blocks_BSS, scheme, clip=False, sweeps=1).codes_OI
    assert (got != expected).float().mean() < 1e-3  # float rounding may tip a tie


def test_a_dead_channel_stops_no_group() -> None:
    x_NI = correlated_inputs()
    x_NI[:, 5] = 0
    scheme, weight_OI = Scheme(bits=4, group_size=32, symmetric=True), random(16, 128)
    got = round_groups(weight_OI, hessian(x_NI)[None], scheme, clip=True, sweeps=1)
    assert torch.equal(got.codes_OI[:, 5], rtn(weight_OI, scheme, got.grid).codes_OI[:, 5])


def test_smoothing_evens_out_activations_and_weights() -> None:
    abs_max_I = torch.tensor([1.0, 100.0, 4.0])
    weight_OI = torch.tensor([[1.0, 0.01, 1.0], [-2.0, 0.005, 1.0]])
    scale_I = smooth_scale(weight_OI, abs_max_I, 0.5)
    # At alpha 0.5 both sides end with the same maximum: sqrt(max|x| max|w|).
    assert torch.allclose(abs_max_I / scale_I, weight_OI.abs().amax(dim=0) * scale_I)


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, [1.0, 100.0]), (0.0, [0.5, 100.0])])
def test_alpha_moves_all_or_nothing(alpha: float, expected: list[float]) -> None:
    scale_I = smooth_scale(torch.tensor([[2.0, 0.01]]), torch.tensor([1.0, 100.0]), alpha)
    assert torch.allclose(scale_I, torch.tensor(expected))


def test_dead_channels_are_not_smoothed() -> None:
    scale_I = smooth_scale(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([0.0, 5.0, 4.0]), 0.5)
    assert torch.equal(scale_I, torch.tensor([1.0, 1.0, 2.0]))


def w8a8(activations: Activations) -> Scheme:
    return Scheme(bits=8, group_size=-1, symmetric=True, activations=activations)


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_a_searched_smoothing_is_no_worse_than_any_fixed_one(activations: Activations) -> None:
    x_NI, weight_OI = correlated_inputs() * torch.logspace(-1, 1.5, 128), random(64, 128)
    statistics = statistics_of(x_NI, frozenset({"abs_max", "sample"}))
    scheme = w8a8(activations)

    def error(scale_I: torch.Tensor) -> float:
        scaled = statistics_of(x_NI / scale_I, frozenset({"abs_max", "sample"}))
        step = None
        if activations == "static":
            step = static_scale(weight_OI * scale_I, scaled.sample_NI, scaled.abs_max_I, len(x_NI), scheme)  # type: ignore[arg-type]
        out_NO = int8_input(x_NI / scale_I, step) @ rtn(weight_OI * scale_I, scheme).dequantize().T
        return float((out_NO - x_NI @ weight_OI.T).square().sum())

    found = error(search_smooth_scale(weight_OI, statistics, scheme, tie=lambda scale_I: scale_I))
    assert statistics.abs_max_I is not None
    fixed = [error(smooth_scale(weight_OI, statistics.abs_max_I, alpha)) for alpha in (0.25, 0.5, 0.75, 1.0)]
    assert found <= min(fixed) * 1.0001
    assert found < 0.5 * error(torch.ones(128))


def test_statistics_add_up() -> None:
    x_NI = random(30, 8)
    wanted = frozenset({"hessian", "blocks", "abs_sum", "abs_max"})
    total = Statistics()
    for part in torch.split(x_NI, 7):
        total.take(part, wanted)
    whole = statistics_of(x_NI, wanted)
    total.finish()
    assert total.tokens == whole.tokens == 30
    for name in ("hessian_II", "blocks_BSS", "abs_sum_I", "abs_max_I"):
        assert torch.allclose(getattr(total, name), getattr(whole, name), atol=1e-4)


def test_the_hessian_is_whole_though_only_half_is_summed() -> None:
    x_NI, original_NI, ahead_NO = random(40, 1100), random(40, 1100, seed=1), random(40, 7, seed=2)
    got = Statistics()
    for part in (slice(0, 24), slice(24, 40)):
        got.take(x_NI[part], frozenset({"hessian"}), original=original_NI[part], ahead=ahead_NO[part])
    assert torch.allclose(got.finish().hessian_II, x_NI.T @ x_NI, atol=1e-4)  # type: ignore[arg-type]
    assert torch.allclose(got.cross_II, original_NI.T @ x_NI, atol=1e-4)  # type: ignore[arg-type]
    assert torch.allclose(got.ahead_OI, ahead_NO.T @ x_NI, atol=1e-4)  # type: ignore[arg-type]


def test_products_of_bfloat16_factors_are_summed_in_float32() -> None:
    x_NI = random(2000, 64) + 1  # sums of 2000 positive numbers, of which BF16 would keep three digits
    with Workers(bfloat16=True):
        got = statistics_of(x_NI.bfloat16(), frozenset({"hessian"})).hessian_II
    exact = x_NI.bfloat16().double().T @ x_NI.bfloat16().double()
    assert got is not None
    assert float((got - exact).norm() / exact.norm()) < 1e-5


def test_samples_of_batches_come_in_their_order() -> None:
    x_NI, total = random(60, 8), Statistics()
    for part in torch.split(x_NI, 20):
        total.take(part, frozenset({"sample"}), sample_every=5)
    assert total.sample_NI is not None
    assert torch.equal(total.sample_NI, x_NI[2::5])


@pytest.mark.parametrize("features", [48, 96, 256])
def test_blocks_are_those_of_the_hessian(features: int) -> None:
    statistics = statistics_of(random(50, features), frozenset({"hessian", "blocks"}))
    assert statistics.hessian_II is not None
    assert statistics.blocks_BSS is not None
    size = block_size(features)
    for number, block_SS in enumerate(statistics.blocks_BSS):
        part = slice(number * size, (number + 1) * size)
        assert torch.allclose(block_SS, statistics.hessian_II[part, part], atol=1e-4)


def test_divided_statistics_are_those_of_the_divided_input() -> None:
    x_NI, scale_I = random(50, 256), random(256, seed=1).abs() + 0.1
    wanted = frozenset({"hessian", "blocks", "sample", "abs_sum", "abs_max"})
    got, expected = statistics_of(x_NI, wanted), statistics_of(x_NI / scale_I, wanted)
    got.divide(scale_I)
    for name in ("hessian_II", "blocks_BSS", "sample_NI", "abs_sum_I", "abs_max_I"):
        assert torch.allclose(getattr(got, name), getattr(expected, name), rtol=1e-4, atol=1e-2), name


def test_both_exact_scales_agree() -> None:
    from llmopt.formats.base import exact_scale as in_numpy

    values = torch.cat((random(500).abs(), torch.logspace(-9, 4, 500), torch.zeros(1)))
    assert torch.equal(exact_scale(values), torch.from_numpy(in_numpy(values.numpy())))
