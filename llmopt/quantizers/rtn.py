"""Round to nearest: every weight to the nearest point of its group's grid, or to the nearest FP8 number."""

from __future__ import annotations

import torch

from llmopt.formats.scheme import Scheme
from llmopt.quantizers import fp8
from llmopt.quantizers.base import Grid, Rounded, exact_scale, grouped


def rtn(weight_OI: torch.Tensor, scheme: Scheme, grid: Grid | None = None) -> Rounded:
    """Round to `grid`, by default the one that just covers each group."""
    if scheme.kind == "float":
        scale_OG = exact_scale(fp8.covering_scale(weight_OI, scheme)) if grid is None else grid.scale_OG
        return Rounded(fp8.to_codes(weight_OI / scale_OG), Grid(scale_OG, torch.zeros_like(scale_OG)), scheme)
    weight_OGS = grouped(weight_OI, scheme)
    grid = grid or Grid.cover(weight_OGS, scheme)
    return Rounded(grid.round(weight_OGS, scheme.bits).reshape(weight_OI.shape), grid, scheme)
