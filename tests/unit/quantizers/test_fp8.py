from __future__ import annotations

import pytest
import torch

from llmopt.formats.scheme import Scheme
from llmopt.quantizers import fp8
from llmopt.quantizers.base import exact_scale
from llmopt.quantizers.rtn import rtn


def scheme(group_size: int = -1) -> Scheme:
    return Scheme(bits=8, group_size=group_size, symmetric=True, kind="float")


def every_number() -> torch.Tensor:
    """All E4M3 numbers: the patterns but the two that mean NaN."""
    return fp8.from_codes(torch.tensor([code for code in range(256) if code & 127 != 127]).float())


def test_the_numbers_are_those_of_the_paper() -> None:
    numbers = every_number()
    assert numbers.max() == 448
    assert numbers[numbers > 0].min() == 2.0**-9
    assert torch.isfinite(numbers).all()


def test_every_number_is_kept() -> None:
    assert torch.equal(fp8.from_codes(fp8.to_codes(every_number())), every_number())


def test_rounding_finds_the_nearest_number() -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 100
    got = (fp8.from_codes(fp8.to_codes(values)) - values).abs()
    assert torch.equal(got, (every_number()[None] - values.clamp(-448, 448)[:, None]).abs().amin(dim=1))


@pytest.mark.parametrize("value", [449.0, 1e6, float("inf")])
def test_what_is_too_large_becomes_the_largest(value: float) -> None:
    assert fp8.from_codes(fp8.to_codes(torch.tensor([value, -value]))).tolist() == [448.0, -448.0]


def test_a_scale_a_row_keeps_small_rows_precise() -> None:
    weight_OI = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 1, 8)[:, None]
    relative_O = [
        (rtn(weight_OI, scheme(size)).dequantize() - weight_OI).norm(dim=1) / weight_OI.norm(dim=1) for size in (-1, 0)
    ]
    assert relative_O[0].max() < 0.04
    assert relative_O[1].max() > 0.5


def test_one_scale_for_the_tensor_is_that_of_its_largest_weight() -> None:
    weight_OI = torch.tensor([[1.0, -2.0], [896.0, 0.5]])
    scale_OG = rtn(weight_OI, scheme(0)).grid.scale_OG
    assert scale_OG.tolist() == [[2.0], [2.0]]


@pytest.mark.parametrize("group_size", [-1, 0])
def test_scales_are_exact_in_every_format(group_size: int) -> None:
    weight_OI = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    rounded = rtn(weight_OI, scheme(group_size))
    assert torch.equal(rounded.grid.scale_OG, exact_scale(rounded.grid.scale_OG))
    assert rounded.grid.scale_OG.shape == (8, 1)
    assert (rounded.dequantize() - weight_OI).abs().max() < weight_OI.abs().max() / 16


def test_rows_of_zeros_stay_zero() -> None:
    assert torch.equal(rtn(torch.zeros(4, 8), scheme()).dequantize(), torch.zeros(4, 8))
