"""SmoothQuant: move the outliers of an activation into the weights that read it.

Source: Xiao et al., arXiv:2211.10438, equation 4. The paper scales the inputs that come from a norm; here every input
whose scale can be folded into what makes it, and the share alpha may be searched for each site.
"""

from __future__ import annotations

import torch

from llmopt.formats.scheme import Scheme
from llmopt.quantizers.activations import int8_input, static_scale
from llmopt.quantizers.base import Statistics, Tie, some_rows
from llmopt.quantizers.rtn import rtn

ALPHAS = tuple(step / 20 for step in range(5, 21))  # that a search tries: 0.25 to 1


def smooth_scale(weight_OI: torch.Tensor, abs_max_I: torch.Tensor, alpha: float) -> torch.Tensor:
    """scale_I by which the site's columns are multiplied: max|x|^alpha / max|w|^(1 - alpha), one for dead channels."""
    weight_max_I = weight_OI.abs().amax(dim=0)
    scale_I = abs_max_I.clamp(min=1e-8) ** alpha / weight_max_I.clamp(min=1e-8) ** (1 - alpha)
    dead_I = (abs_max_I == 0) | (weight_max_I == 0)
    return torch.where(dead_I, torch.ones_like(scale_I), scale_I.clamp(1e-5, 1e5))


def search_smooth_scale(weight_OI: torch.Tensor, statistics: Statistics, scheme: Scheme, *, tie: Tie) -> torch.Tensor:
    """The smoothing with the least output error on the sampled inputs when both sides are int8, or none (ones)."""
    sample_NI, abs_max_I = statistics.sample_NI, statistics.abs_max_I
    assert sample_NI is not None
    assert abs_max_I is not None
    part_OI = some_rows(weight_OI)
    expected_NO = sample_NI @ part_OI.T

    def error(scale_I: torch.Tensor) -> torch.Tensor:
        step = None
        if scheme.activations == "static":
            step = static_scale(part_OI * scale_I, sample_NI / scale_I, abs_max_I / scale_I, statistics.tokens, scheme)
        rounded_OI = rtn(part_OI * scale_I, scheme).dequantize()
        return (int8_input(sample_NI / scale_I, step) @ rounded_OI.T - expected_NO).square_().sum()

    best_scale_I = torch.ones_like(abs_max_I)
    best_error = error(best_scale_I)
    for alpha in ALPHAS:
        scale_I = tie(smooth_scale(weight_OI, abs_max_I, alpha))
        found = error(scale_I)
        if found < best_error:
            best_scale_I, best_error = scale_I, found
    return best_scale_I
