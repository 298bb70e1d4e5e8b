"""Scales of what flows through the model: the inputs of linears, and the keys and values of the cache.

Shape suffixes as in base.py; N are sampled rows of a site's input.
"""

from __future__ import annotations

import torch

from llmopt.formats.scheme import KVCache, Scheme
from llmopt.quantizers import fp8
from llmopt.quantizers.base import exact_scale

_INT8_HALF = 127.5  # half of the 255 steps of int8's range, as compressed-tensors divides it
_COARSE, _FINE = 4, (-3, -2, -1, 1, 2, 3)  # eighths of a power of two between candidates for a static scale
_SMALLEST = 48  # of them: 1/64 of the range


def int8_input(x_NI: torch.Tensor, step: torch.Tensor | None) -> torch.Tensor:
    """Inputs after int8: with one step for all, or with None one for each row, from its largest."""
    if step is None:
        step = (x_NI.abs().amax(dim=1, keepdim=True) / _INT8_HALF).clamp(min=1e-10)
    return (x_NI / step).round_().clamp_(-128, 127).mul_(step)


def static_scale(
    weight_OI: torch.Tensor, sample_NI: torch.Tensor, abs_max_I: torch.Tensor, tokens: int, scheme: Scheme
) -> torch.Tensor:
    """The one scale of a site's inputs, a scalar, exact in every format.

    For int8 that with the least squared error of the outputs, where a channel's errors count by its column's norm.
    What lies past 127 steps is clipped, which the sample may not show: so every channel's peak, known from all
    `tokens`, counts as one more token. For FP8, whose error is relative, the one that covers the peak.
    """
    peak = abs_max_I.max()
    if scheme.kind == "float":
        return exact_scale(peak / fp8.LARGEST)
    importance_I, weight = weight_OI.square().sum(dim=0), tokens / max(1, len(sample_NI))

    def candidate(eighths: int) -> torch.Tensor:
        return exact_scale(peak / _INT8_HALF * 2 ** (-eighths / 8))

    def error(eighths: int) -> float:
        step = candidate(eighths)
        error_I = (int8_input(sample_NI, step) - sample_NI).square_().sum(dim=0) * weight
        error_I += (abs_max_I - step * 127).clamp(min=0).square()
        return float(error_I @ importance_I)

    errors = {eighths: error(eighths) for eighths in range(0, _SMALLEST, _COARSE)}
    near = min(errors, key=errors.__getitem__)
    errors |= {near + offset: error(near + offset) for offset in _FINE if near + offset > 0}
    return candidate(min(errors, key=errors.__getitem__))


def kv_scales(peaks: torch.Tensor, kind: KVCache) -> tuple[float, float]:
    """(k_scale, v_scale) of an attention from the largest |key| and |value| that calibration saw, `peaks` [2].

    A cache holds value / scale. The largest goes to 448 in FP8 and to 127.5 in int8, as compressed-tensors computes
    both (quantization/utils/helpers.py, calculate_qparams); vLLM reads the former as they are. Rounded to be exact.
    """
    k_scale, v_scale = exact_scale(peaks / (fp8.LARGEST if kind == "fp8" else _INT8_HALF)).tolist()
    return k_scale, v_scale
