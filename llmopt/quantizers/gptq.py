"""GPTQ: round one column at a time and let the columns still to come absorb the error.

Source: Frantar et al., arXiv:2210.17323, Algorithm 1. Shape suffixes as in base.py; P is a column in the order of
rounding, K a column of the block of them that is updated at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmopt.formats.base import Scheme
from llmopt.quantizers.base import Grid, Rounded, grouped

_BLOCK = 128  # columns updated at once; changes the speed, and the result by no more than float rounding


@dataclass(frozen=True, slots=True)
class Curvature:
    """The Hessian as the column loop needs it.

    order_P: the column rounded at each step. factor_PP: upper Cholesky factor of the inverse Hessian in that order.
    damping: the share of the diagonal's mean that was needed to factorize it.
    """

    order_P: torch.Tensor
    factor_PP: torch.Tensor
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
            return Curvature(order_P, factor_PP, share)
        share = max(share * 10, 1e-4)
    return None


def gptq(weight_OI: torch.Tensor, curvature: Curvature, scheme: Scheme, *, act_order: bool) -> Rounded:
    """Round weight_OI (not changed) so that the output on the calibration inputs moves least.

    With `act_order` the grids are those of the original weights (static groups), so that groups stay consecutive
    columns; without it each group's grid is made when its first column comes up, from the weights as they are then.
    """
    rows, columns = weight_OI.shape
    groups = scheme.groups(columns)
    size, top = columns // groups, (1 << scheme.bits) - 1
    order_P, factor_PP = curvature.order_P, curvature.factor_PP
    weight_PO = weight_OI.T[order_P].contiguous()
    codes_PO = torch.empty_like(weight_PO)
    grid = Grid.cover(grouped(weight_OI, scheme), scheme)
    scale_GO, zero_GO = grid.scale_OG.T.contiguous(), grid.zero_OG.T.contiguous()
    block = _BLOCK if act_order or size == columns else min(_BLOCK, size)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        if not act_order and size < columns and start % size == 0:
            fresh = Grid.cover(weight_PO[start : start + size].T.reshape(rows, 1, size), scheme)
            scale_GO[start // size], zero_GO[start // size] = fresh.scale_OG[:, 0], fresh.zero_OG[:, 0]
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
