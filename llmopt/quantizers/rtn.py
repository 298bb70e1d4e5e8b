"""Round to nearest: every weight to the nearest point of its group's grid."""

from __future__ import annotations

import torch

from llmopt.formats.scheme import Scheme
from llmopt.quantizers.base import Grid, Rounded, grouped


def rtn(weight_OI: torch.Tensor, scheme: Scheme, grid: Grid | None = None) -> Rounded:
    """Round to `grid`, by default the one that just covers each group."""
    weight_OGS = grouped(weight_OI, scheme)
    grid = grid or Grid.cover(weight_OGS, scheme)
    return Rounded(grid.round(weight_OGS, scheme.bits).reshape(weight_OI.shape), grid, scheme)
