"""FP8 E4M3 numbers: four bits of exponent, three of mantissa, no infinities, 448 the largest.

Source: Micikevicius et al., arXiv:2209.05433, section 3. Shape suffixes as in base.py.
"""

from __future__ import annotations

import torch

from llmopt.formats.scheme import Scheme

LARGEST = 448.0


def to_codes(values: torch.Tensor) -> torch.Tensor:
    """The bit patterns of the nearest E4M3 numbers, as floats like all codes; ties to even.

    Saturating: what is past the largest becomes it, where torch's own cast would give NaN.
    """
    return values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8).float()


def from_codes(codes: torch.Tensor) -> torch.Tensor:
    """The numbers that bit patterns stand for, float32."""
    return codes.to(torch.uint8).view(torch.float8_e4m3fn).float()


def covering_scale(weight_OI: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """scale_OG [O, 1] that maps each row's largest weight, or with group size 0 the tensor's, to the largest number.

    Not rounded yet; a whole linear must come at once for group size 0.
    """
    peak_O1 = weight_OI.abs().amax(dim=1, keepdim=True)
    return (peak_O1.amax().expand_as(peak_O1) if scheme.group_size == 0 else peak_O1) / LARGEST
