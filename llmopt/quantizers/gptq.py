"""GPTQ: round one column at a time and let the columns still to come absorb the error.

Source: Frantar et al., arXiv:2210.17323, Algorithm 1. Shape suffixes as in base.py; P is a column in the order of
rounding, K a column of the block of them that is updated at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmopt.formats.scheme import Scheme
from llmopt.quantizers.base import Grid, Rounded, exact_scale, grouped

_BLOCK = 128  # columns updated at once; changes the speed, and the result by no more than float rounding


@dataclass(frozen=True, slots=True)
class Curvature:
    """The Hessian as the column loop needs it.

    order_P: the column rounded at each step. factor_PP: upper Cholesky factor of the inverse Hessian in that order.
    diagonal_I: of the Hessian, before damping; what an error in a column costs by itself.
    damping: the share of the diagonal's mean that was needed to factorize it.
    """

    order_P: torch.Tensor
    factor_PP: torch.Tensor
    diagonal_I: torch.Tensor
    damping: float


def factorize(hessian_II: torch.Tensor, *, damping: float, act_order: bool) -> Curvature | None:
    """Prepare a Hessian; the damping grows tenfold until the factorization succeeds, None past 1.0.

    Columns that no calibration token touched get a diagonal of one: they are rounded to nearest and pass on nothing.
    """
    hessian_II = hessian_II.clone()
    diagonal_I = hessian_II.diagonal()
    diagonal_I[diagonal_I == 0] = 1.0
    order_P = torch.arange(len(hessian_II))
    if act_order:
        order_P = torch.argsort(diagonal_I, descending=True, stable=True)
        hessian_II = hessian_II[order_P][:, order_P]
    mean = hessian_II.diagonal().mean()
    share = damping
    while share <= 1.0:
        damped_PP = hessian_II.clone()
        damped_PP.diagonal().add_(share * mean)
        lower_PP, failed = torch.linalg.cholesky_ex(damped_PP)
        if not failed:
            factor_PP, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_PP), upper=True)
        if not failed and bool(torch.isfinite(factor_PP).all()):
            return Curvature(order_P, factor_PP, diagonal_I, share)
        share = max(share * 10, 1e-4)
    return None


def aim(
    weight_OI: torch.Tensor,
    hessian_II: torch.Tensor,
    cross_II: torch.Tensor,
    ahead_OI: torch.Tensor | None,
    *,
    damping: float,
) -> torch.Tensor:
    """The weight that, on the inputs as they are now, comes nearest to the original model's outputs.

    The blocks before are quantized, so the site reads x where the original reads o, and adds to a residual stream that
    is d behind. Minimizing |W' x - (W o + d)|^2 plus `damping` times the distance from W over W' gives
    W' = W + (W (sum o x^T - H) + sum d x^T) (H + damping)^-1. Rounding W' against H is then what GPTAQ rounds
    (Li et al., arXiv:2504.02692, section 3), with the residual stream's deviation as well.
    """
    damped_II = hessian_II.clone()
    damped_II.diagonal().add_(damping * hessian_II.diagonal().mean())
    gap_OI = weight_OI @ (cross_II - hessian_II)
    if ahead_OI is not None:
        gap_OI += ahead_OI
    lower_II, failed = torch.linalg.cholesky_ex(damped_II)
    return weight_OI if failed else weight_OI + torch.cholesky_solve(gap_OI.T, lower_II).T


def gptq(weight_OI: torch.Tensor, curvature: Curvature, scheme: Scheme, *, act_order: bool) -> Rounded:
    """Round weight_OI (not changed) so that the output on the calibration inputs moves least.

    Each group has the grid that rounds it to nearest with the least error, weighted by the Hessian's diagonal. With
    `act_order` that of the weights as they come (static groups), so that groups stay consecutive columns; without it
    each group's grid is made when its first column comes up, from the weights as they are then.
    """
    rows, columns = weight_OI.shape
    groups = scheme.groups(columns)
    size, top = columns // groups, (1 << scheme.bits) - 1
    order_P, factor_PP = curvature.order_P, curvature.factor_PP
    weight_PO = weight_OI.T[order_P].contiguous()
    codes_PO = torch.empty_like(weight_PO)
    importance_GS = curvature.diagonal_I.reshape(groups, size)
    grid = Grid.fit(grouped(weight_OI, scheme), scheme, importance_GS)
    scale_GO, zero_GO = grid.scale_OG.T.contiguous(), grid.zero_OG.T.contiguous()
    block = _BLOCK if act_order or size == columns else min(_BLOCK, size)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        if not act_order and size < columns and start % size == 0:
            g = start // size
            fresh = Grid.fit(weight_PO[start : start + size].T.reshape(rows, 1, size), scheme, importance_GS[g : g + 1])
            scale_GO[g], zero_GO[g] = fresh.scale_OG[:, 0], fresh.zero_OG[:, 0]
        group_K = order_P[start:stop] // size
        _round_block(
            weight_PO[start:stop],
            codes_PO[start:stop],
            factor_PP[start:stop, start:stop].contiguous(),
            scale_GO[group_K],
            zero_GO[group_K],
            top,
        )
        # _round_block left its scaled errors where the weights were.
        weight_PO[stop:].addmm_(factor_PP[start:stop, stop:].T, weight_PO[start:stop], alpha=-1)
    codes_IO = torch.empty_like(codes_PO)
    codes_IO[order_P] = codes_PO
    return Rounded(codes_IO.T.contiguous(), Grid(scale_GO.T.contiguous(), zero_GO.T.contiguous()), scheme)


def _round_block(
    weight_KO: torch.Tensor,
    codes_KO: torch.Tensor,
    factor_KK: torch.Tensor,
    scale_KO: torch.Tensor,
    zero_KO: torch.Tensor,
    top: int,
) -> None:
    """Fill codes_KO, and replace weight_KO by each column's error over its factor, both in place."""
    for k in range(len(weight_KO)):
        torch.div(weight_KO[k], scale_KO[k], out=codes_KO[k]).round_().add_(zero_KO[k]).clamp_(0, top)
        weight_KO[k] -= (codes_KO[k] - zero_KO[k]) * scale_KO[k]
        weight_KO[k] /= factor_KK[k, k]
        weight_KO[k + 1 :].addr_(factor_KK[k, k + 1 :], weight_KO[k], alpha=-1)


def refine(weight_OI: torch.Tensor, rounded: Rounded, hessian_II: torch.Tensor, *, sweeps: int) -> Rounded:
    """Lower the output error of a rounded weight: refit the scales, then sweep over the columns, `sweeps` times.

    Scales: with codes and zero points fixed, the error tr(E H E^T) is a quadratic in a row's scales, one small linear
    system a row. Columns: with everything else fixed, the best code of a column is the one nearest to where the
    error's derivative vanishes (coordinate descent). Neither step can make a row worse; one that would (because
    scales are rounded to be exact) is not taken. hessian_II must be positive definite.
    """
    best, best_error_O = rounded, _row_errors(weight_OI - rounded.dequantize(), hessian_II)
    for _ in range(sweeps):
        candidate = _sweep(weight_OI, _refit(weight_OI, best, hessian_II), hessian_II)
        error_O = _row_errors(weight_OI - candidate.dequantize(), hessian_II)
        better_O1 = (error_O < best_error_O)[:, None]
        grid = Grid(torch.where(better_O1, candidate.grid.scale_OG, best.grid.scale_OG), best.grid.zero_OG)
        best = Rounded(torch.where(better_O1, candidate.codes_OI, best.codes_OI), grid, best.scheme)
        best_error_O = torch.minimum(error_O, best_error_O)
    return best


def _row_errors(error_OI: torch.Tensor, hessian_II: torch.Tensor) -> torch.Tensor:
    return ((error_OI @ hessian_II) * error_OI).sum(dim=1)


def _refit(weight_OI: torch.Tensor, rounded: Rounded, hessian_II: torch.Tensor) -> Rounded:
    """The scales that are best for these codes, rounded to be exact."""
    scheme, zero_OG = rounded.scheme, rounded.grid.zero_OG
    steps_OGS = grouped(rounded.codes_OI, scheme) - zero_OG[:, :, None]
    rows, groups, size = steps_OGS.shape
    spread_OGI = torch.zeros(rows, groups, groups * size)
    for g in range(groups):
        spread_OGI[:, g, g * size : (g + 1) * size] = steps_OGS[:, g]
    pushed_OGI = spread_OGI @ hessian_II
    left_OGG = pushed_OGI @ spread_OGI.transpose(1, 2)
    right_OG = (pushed_OGI @ weight_OI[:, :, None])[:, :, 0]
    empty_OG = (steps_OGS == 0).all(dim=2)
    left_OGG.diagonal(dim1=1, dim2=2)[empty_OG] = 1.0
    solved_OG = torch.linalg.solve_ex(left_OGG, right_OG).result
    usable_OG = torch.isfinite(solved_OG) & (solved_OG > 0) & ~empty_OG
    scale_OG = torch.where(usable_OG, exact_scale(solved_OG), rounded.grid.scale_OG)
    return Rounded(rounded.codes_OI, Grid(scale_OG, zero_OG), scheme)


def _sweep(weight_OI: torch.Tensor, rounded: Rounded, hessian_II: torch.Tensor) -> Rounded:
    """Each column once, in order, to its best code given all the others."""
    scheme, top = rounded.scheme, (1 << rounded.scheme.bits) - 1
    size = weight_OI.shape[1] // rounded.grid.scale_OG.shape[1]
    codes_IO, scale_GO, zero_GO = (
        t.T.contiguous() for t in (rounded.codes_OI, rounded.grid.scale_OG, rounded.grid.zero_OG)
    )
    slope_IO = hessian_II @ (weight_OI - rounded.dequantize()).T
    for i in range(len(codes_IO)):
        scale_O, zero_O = scale_GO[i // size], zero_GO[i // size]
        value_O = (codes_IO[i] - zero_O) * scale_O + slope_IO[i] / hessian_II[i, i]
        code_O = (value_O / scale_O).round_().add_(zero_O).clamp_(0, top)
        slope_IO.addr_(hessian_II[:, i], (code_O - codes_IO[i]) * scale_O, alpha=-1)
        codes_IO[i] = code_O
    return Rounded(codes_IO.T.contiguous(), rounded.grid, scheme)
