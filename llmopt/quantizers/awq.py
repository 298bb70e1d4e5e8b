"""AWQ: scale up the input channels that matter before rounding, then search a tighter range for each group.

Source: Lin et al., arXiv:2306.00978, sections 3.2 and 5.1. The paper runs the block for each candidate; here the
error of the site's own linears comes from the Hessian by algebra, without running anything.
"""

from __future__ import annotations

import torch

from llmopt.formats.scheme import Scheme
from llmopt.quantizers.base import SHRINK, Grid, Rounded, grouped, output_error
from llmopt.quantizers.rtn import rtn


def search_scale(
    weight_OI: torch.Tensor, hessian_II: torch.Tensor, abs_mean_I: torch.Tensor, scheme: Scheme, *, grid: int
) -> torch.Tensor:
    """The scale_I = abs_mean_I ** ratio (ratio in [0, 1), `grid` of them) with the least output error when rounded.

    weight_OI holds the rows of all linears of the site. The scale's geometric middle is one.
    """
    best_scale_I, best_error = torch.ones_like(abs_mean_I), torch.tensor(float("inf"))
    for step in range(grid):
        scale_I = abs_mean_I.clamp(min=1e-4) ** (step / grid)
        scale_I = scale_I / (scale_I.max() * scale_I.min()).sqrt()
        error_OI = rtn(weight_OI * scale_I, scheme).dequantize() / scale_I - weight_OI
        error = output_error(error_OI, hessian_II)
        if error < best_error:
            best_scale_I, best_error = scale_I, error
    return best_scale_I


def round_clipped(weight_OI: torch.Tensor, hessian_II: torch.Tensor, scheme: Scheme) -> Rounded:
    """Round to nearest with, for each group of each row, the range that gives the least error of the group's output."""
    weight_OGS = grouped(weight_OI, scheme)
    rows, groups, size = weight_OGS.shape
    hessian_GSS = torch.stack([hessian_II[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(groups)])
    best = Grid.cover(weight_OGS, scheme)
    best_error_OG = torch.full((rows, groups), float("inf"))
    for shrink in SHRINK:
        grid = Grid.cover(weight_OGS, scheme, shrink)
        error_OGS = grid.value(grid.round(weight_OGS, scheme.bits)) - weight_OGS
        pushed_OGS = torch.einsum("ogs,gst->ogt", error_OGS, hessian_GSS)
        error_OG = (pushed_OGS * error_OGS).sum(dim=2)
        best, best_error_OG = best.where_better(grid, error_OG, best_error_OG)
    return rtn(weight_OI, scheme, best)
