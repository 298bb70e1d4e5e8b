"""Each algorithm by its properties."""

from __future__ import annotations

import pytest
import torch

from llmopt.formats.scheme import Scheme
from llmopt.quantizers import gptq as gptq_module
from llmopt.quantizers.awq import round_clipped, search_scale
from llmopt.quantizers.base import Grid, Statistics, exact_scale, grouped, output_error
from llmopt.quantizers.gptq import Curvature, aim, factorize, gptq, refine
from llmopt.quantizers.rtn import rtn
from llmopt.quantizers.smoothquant import smooth_scale

SCHEMES = [
    Scheme(bits=bits, group_size=group_size, symmetric=symmetric)
    for bits in (2, 4, 8)
    for group_size in (-1, 32)
    for symmetric in (True, False)
]


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
    refined = refine(weight_OI, start, hessian_II, sweeps=3)
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
    refined = refine(weight_OI, rtn(weight_OI, scheme), hessian_II, sweeps=10)
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
    got_OI = aim(weight_OI, x_NI.T @ x_NI, original_NI.T @ x_NI, ahead_NO.T @ x_NI, damping=1e-8)
    expected_OI = torch.linalg.lstsq(x_NI, original_NI @ weight_OI.T + ahead_NO).solution.T
    assert torch.allclose(got_OI, expected_OI, atol=5e-3)


def test_aiming_changes_nothing_where_nothing_deviates() -> None:
    weight_OI, hessian_II = random(8, 128), hessian(correlated_inputs())
    assert torch.equal(aim(weight_OI, hessian_II, hessian_II, None, damping=0.01), weight_OI)


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_scaling_beats_rounding_where_channels_differ(symmetric: bool) -> None:
    scheme = Scheme(bits=4, group_size=32, symmetric=symmetric)
    x_NI = correlated_inputs()
    x_NI[:, ::17] *= 20
    weight_OI, hessian_II = random(32, 128), hessian(x_NI)
    scale_I = search_scale(weight_OI, hessian_II, x_NI.abs().mean(dim=0), scheme, grid=20)
    scaled = rtn(weight_OI * scale_I, scheme).dequantize() / scale_I
    assert output_error(scaled - weight_OI, hessian_II) < 0.5 * output_error(
        rtn(weight_OI, scheme).dequantize() - weight_OI, hessian_II
    )


def test_awq_leaves_uniform_channels_alone() -> None:
    scheme = Scheme(bits=4, group_size=32, symmetric=True)
    scale_I = search_scale(random(32, 128), torch.eye(128), torch.full((128,), 0.8), scheme, grid=20)
    assert torch.allclose(scale_I, torch.ones(128))


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_never_makes_a_group_worse(symmetric: bool) -> None:
    scheme = Scheme(bits=3, group_size=32, symmetric=symmetric)
    weight_OI = random(32, 128) ** 3
    hessian_II = hessian(correlated_inputs())
    blocks_II = torch.block_diag(*[hessian_II[i : i + 32, i : i + 32] for i in range(0, 128, 32)])
    clipped = output_error(round_clipped(weight_OI, hessian_II, scheme).dequantize() - weight_OI, blocks_II)
    assert clipped < 0.9 * output_error(rtn(weight_OI, scheme).dequantize() - weight_OI, blocks_II)


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


def test_statistics_add_up() -> None:
    x_NI = random(30, 8)
    wanted = frozenset({"hessian", "abs_sum", "abs_max"})
    total = Statistics()
    for part in torch.split(x_NI, 7):
        total.add(Statistics.of(part, wanted))
    whole = Statistics.of(x_NI, wanted)
    assert total.tokens == whole.tokens == 30
    for name in ("hessian_II", "abs_sum_I", "abs_max_I"):
        assert torch.allclose(getattr(total, name), getattr(whole, name), atol=1e-4)


def test_both_exact_scales_agree() -> None:
    from llmopt.formats.base import exact_scale as in_numpy

    values = torch.cat((random(500).abs(), torch.logspace(-9, 4, 500), torch.zeros(1)))
    assert torch.equal(exact_scale(values), torch.from_numpy(in_numpy(values.numpy())))
