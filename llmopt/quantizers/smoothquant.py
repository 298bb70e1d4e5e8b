"""SmoothQuant: move the outliers of an activation into the weights that read it.

Source: Xiao et al., arXiv:2211.10438, equation 4. Applied, as there, where a norm can take the inverse scale.
"""

from __future__ import annotations

import torch


def smooth_scale(weight_OI: torch.Tensor, abs_max_I: torch.Tensor, alpha: float) -> torch.Tensor:
    """scale_I by which the site's columns are multiplied: max|x|^alpha / max|w|^(1 - alpha), one for dead channels."""
    weight_max_I = weight_OI.abs().amax(dim=0)
    scale_I = abs_max_I.clamp(min=1e-8) ** alpha / weight_max_I.clamp(min=1e-8) ** (1 - alpha)
    dead_I = (abs_max_I == 0) | (weight_max_I == 0)
    return torch.where(dead_I, torch.ones_like(scale_I), scale_I.clamp(1e-5, 1e5))
