"""GPTQ: round one column at a time and let the columns still to come absorb the error.

Source: Frantar et al., arXiv:2210.17323, Algorithm 1. Shape suffixes as in base.py; P is a column in the order of
rounding, K a column of the block of them that is updated at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmopt.formats.scheme import Scheme
from llmopt.models.parallel import float32_products
from llmopt.quantizers.base import Grid, Rounded, exact_scale, grouped

_BLOCK = 128  # columns updated at once; changes the speed, and the result by no more than float rounding


@dataclass(frozen=True, slots=True)
class Curvature:
    """The Hessian as the column loop needs it.

    order_P: the column rounded at each step. factor_PP: upper Cholesky factor R of the damped Hessian's inverse in that
    order, H^-1 = R^T R. diagonal_I: of the Hessian, before damping; what an error in a column costs by itself.
    damping: the share of the diagonal's mean that was needed to factorize it, and ridge what that came to.
    """

    order_P: torch.Tensor
    factor_PP: torch.Tensor
    diagonal_I: torch.Tensor
    damping: float
    ridge: float


@float32_products()
def factorize(hessian_II: torch.Tensor, *, damping: float, act_order: bool) -> Curvature | None:
    """Prepare a Hessian; the damping grows tenfold until the factorization succeeds, None past 1.0.

    Columns that no calibration token touched get a diagonal of one: they are rounded to nearest and pass on nothing.
    The inverse is never formed: with the columns in reverse, H = L L^T; back in order H = U U^T, U upper, so R = U^-1.
    That takes half of the operations, and two matrices beside the Hessian in place of four.
    """
    diagonal_I = hessian_II.diagonal().clone()
    diagonal_I[diagonal_I == 0] = 1.0
    order_P = torch.arange(len(hessian_II))
    if act_order:
        order_P = torch.argsort(diagonal_I, descending=True, stable=True)
    reverse_P = order_P.flip(0)
    share = damping
    while share <= 1.0:
        ridge = float(share * diagonal_I.mean())
        reversed_PP = hessian_II[reverse_P[:, None], reverse_P]
        reversed_PP.diagonal().copy_(diagonal_I[reverse_P] + ridge)
        lower_PP, failed = torch.linalg.cholesky_ex(reversed_PP)
        del reversed_PP
        if not failed:
            _invert_lower(lower_PP)
            factor_PP = lower_PP.flip(0, 1)
            if bool(torch.isfinite(factor_PP).all()):
                return Curvature(order_P, factor_PP, diagonal_I, share, ridge)
        share = max(share * 10, 1e-4)
    return None


def _invert_lower(lower_PP: torch.Tensor) -> None:
    """Invert a lower triangular matrix in place, by halves: products do nearly all of the work."""
    size = len(lower_PP)
    if size <= _BLOCK:
        lower_PP.copy_(torch.linalg.solve_triangular(lower_PP, torch.eye(size), upper=False))
        return
    half = size // 2 // _BLOCK * _BLOCK or _BLOCK
    _invert_lower(lower_PP[:half, :half])
    _invert_lower(lower_PP[half:, half:])
    lower_PP[half:, :half] = -(lower_PP[half:, half:] @ lower_PP[half:, :half] @ lower_PP[:half, :half])


@float32_products()
def aim(
    weight_OI: torch.Tensor,
    hessian_II: torch.Tensor,
    cross_II: torch.Tensor,
    ahead_OI: torch.Tensor | None,
    curvature: Curvature,
) -> torch.Tensor:
    """The weight that, on the inputs as they are now, comes nearest to the original model's outputs.

    The blocks before are quantized, so the site reads x where the original reads o, and adds to a residual stream that
    is d behind. Minimizing |W' x - (W o + d)|^2 plus the damping times the distance from W over W' gives
    W' = W + (W (sum o x^T - H) + sum d x^T) (H + damping)^-1. Rounding W' against H is then what GPTAQ rounds
    (Li et al., arXiv:2504.02692, section 3), with the residual stream's deviation as well.
    """
    gap_OI = weight_OI @ (cross_II - hessian_II)
    if ahead_OI is not None:
        gap_OI += ahead_OI
    order_P, factor_PP = curvature.order_P, curvature.factor_PP
    moved_OI = torch.empty_like(gap_OI)
    moved_OI[:, order_P] = gap_OI[:, order_P] @ factor_PP.T @ factor_PP
    return weight_OI + moved_OI


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


def refine(
    weight_OI: torch.Tensor, rounded: Rounded, hessian_II: torch.Tensor, *, ridge: float, sweeps: int
) -> Rounded:
    """Lower the output error of a rounded weight: refit the scales, then sweep over the columns, `sweeps` times.

    Scales: with codes and zero points fixed, the error tr(E H E^T) is a quadratic in a row's scales, one small linear
    system a row. Columns: with everything else fixed, the best code of a column is the one nearest to where the
    error's derivative vanishes (coordinate descent). Neither step can make a row worse; one that would (because
    scales are rounded to be exact) is not taken. The Hessian has `ridge` added to its diagonal, and with it must be
    positive definite.

    Costs 2 O I^2 multiplications and 2 O I^2 more a sweep, nearly all of them in matrix products.
    """
    if sweeps == 0:
        return rounded
    error_IO = (weight_OI - rounded.dequantize()).T.contiguous()
    best, best_error_O = rounded, (error_IO * _pushed(hessian_II, error_IO, ridge)).sum(dim=0)
    pushed_OI = (weight_OI @ hessian_II).add_(weight_OI, alpha=ridge)
    for _ in range(sweeps):
        candidate, error_O = _sweep(weight_OI, _refit(pushed_OI, best, hessian_II, ridge), hessian_II, ridge)
        better_O1 = (error_O < best_error_O)[:, None]
        grid = Grid(torch.where(better_O1, candidate.grid.scale_OG, best.grid.scale_OG), best.grid.zero_OG)
        best = Rounded(torch.where(better_O1, candidate.codes_OI, best.codes_OI), grid, best.scheme)
        best_error_O = torch.minimum(error_O, best_error_O)
    return best


def _pushed(hessian_II: torch.Tensor, error_IO: torch.Tensor, ridge: float) -> torch.Tensor:
    return (hessian_II @ error_IO).add_(error_IO, alpha=ridge)


def _refit(pushed_OI: torch.Tensor, rounded: Rounded, hessian_II: torch.Tensor, ridge: float) -> Rounded:
    """The scales that are best for these codes, rounded to be exact. pushed_OI: the weight times the Hessian."""
    scheme, zero_OG = rounded.scheme, rounded.grid.zero_OG
    steps_OGS = grouped(rounded.codes_OI, scheme) - zero_OG[:, :, None]
    rows, groups, size = steps_OGS.shape
    left_OGG = torch.zeros(rows, groups, groups)
    for g in range(groups):
        # The rows of H that meet this group, from its own columns on: the system is symmetric.
        reach_OGS = (steps_OGS[:, g] @ hessian_II[g * size : (g + 1) * size, g * size :]).view(rows, groups - g, size)
        left_OGG[:, g, g:] = (reach_OGS * steps_OGS[:, g:]).sum(dim=2)
    left_OGG += left_OGG.triu(1).transpose(1, 2)
    left_OGG.diagonal(dim1=1, dim2=2).add_(steps_OGS.square().sum(dim=2), alpha=ridge)
    right_OG = (pushed_OI.view(rows, groups, size) * steps_OGS).sum(dim=2)
    empty_OG = (steps_OGS == 0).all(dim=2)
    left_OGG.diagonal(dim1=1, dim2=2)[empty_OG] = 1.0
    solved_OG = torch.linalg.solve_ex(left_OGG, right_OG).result
    usable_OG = torch.isfinite(solved_OG) & (solved_OG > 0) & ~empty_OG
    scale_OG = torch.where(usable_OG, exact_scale(solved_OG), rounded.grid.scale_OG)
    return Rounded(rounded.codes_OI, Grid(scale_OG, zero_OG), scheme)


def _sweep(
    weight_OI: torch.Tensor, rounded: Rounded, hessian_II: torch.Tensor, ridge: float
) -> tuple[Rounded, torch.Tensor]:
    """Each column once, in order, to its best code given all the others; with the error of each row afterwards.

    slope_IO, half the error's derivative, is kept up to date for the columns of a block at once, for later blocks by
    one product a block.
    """
    scheme, top = rounded.scheme, (1 << rounded.scheme.bits) - 1
    size = weight_OI.shape[1] // rounded.grid.scale_OG.shape[1]
    codes_IO, scale_GO, zero_GO = (
        t.T.contiguous() for t in (rounded.codes_OI, rounded.grid.scale_OG, rounded.grid.zero_OG)
    )
    error_IO = (weight_OI - rounded.dequantize()).T.contiguous()
    slope_IO = _pushed(hessian_II, error_IO, ridge)
    error_O = (error_IO * slope_IO).sum(dim=0)
    for start in range(0, len(codes_IO), _BLOCK):
        stop = min(start + _BLOCK, len(codes_IO))
        slope_KO, hessian_KK = slope_IO[start:stop], hessian_II[start:stop, start:stop].clone()
        hessian_KK.diagonal().add_(ridge)
        moved_KO = torch.empty_like(slope_KO)
        for k in range(stop - start):
            code_O, scale_O, zero_O = codes_IO[start + k], scale_GO[(start + k) // size], zero_GO[(start + k) // size]
            wish_O = slope_KO[k] / hessian_KK[k, k] / scale_O + code_O
            new_O = wish_O.sub_(zero_O).round_().add_(zero_O).clamp_(0, top)
            torch.mul(new_O - code_O, scale_O, out=moved_KO[k])
            error_O += moved_KO[k] * (hessian_KK[k, k] * moved_KO[k] - 2 * slope_KO[k])
            slope_KO.addr_(hessian_KK[:, k], moved_KO[k], alpha=-1)
            codes_IO[start + k] = new_O
        slope_IO[stop:].addmm_(hessian_II[stop:, start:stop], moved_KO, alpha=-1)
    return Rounded(codes_IO.T.contiguous(), rounded.grid, scheme), error_O
