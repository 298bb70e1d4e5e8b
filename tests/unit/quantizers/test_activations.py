"""Scales of inputs and of the KV cache; compressed-tensors is the judge of what a scale means."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams

from llmopt.formats.scheme import KVCache, Scheme
from llmopt.quantizers.activations import int8_input, kv_scales, static_scale
from llmopt.quantizers.base import exact_scale

STATIC = Scheme(bits=8, group_size=-1, symmetric=True, activations="static")
FP8 = Scheme(bits=8, group_size=-1, symmetric=True, activations="static", kind="float")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def output_error(x_NI: torch.Tensor, weight_OI: torch.Tensor, step: torch.Tensor) -> float:
    return float(((int8_input(x_NI, step) - x_NI) @ weight_OI.T).square().sum())


def test_a_static_scale_clips_rare_large_inputs() -> None:
    x_NI, weight_OI = random(4000, 64) ** 5, random(32, 64)
    abs_max_I = x_NI.abs().amax(dim=0)
    step = static_scale(weight_OI, x_NI[::8], abs_max_I, len(x_NI), STATIC)
    assert step < abs_max_I.max() / 127.5
    assert output_error(x_NI, weight_OI, step) < 0.9 * output_error(
        x_NI, weight_OI, exact_scale(abs_max_I.max() / 127.5)
    )


def test_a_static_scale_covers_inputs_without_outliers() -> None:
    x_NI = random(4000, 64).sign() * 3
    step = static_scale(random(32, 64), x_NI[::8], x_NI.abs().amax(dim=0), len(x_NI), STATIC)
    assert step * 127.5 == pytest.approx(3, rel=2**-7)


def test_a_peak_that_the_sample_missed_still_counts() -> None:
    """One channel of a few tokens is 1000 times the others, as where a model parks its attention."""
    x_NI, weight_OI = random(4000, 64), random(32, 64)
    x_NI[7, 3] = 3000.0
    sample_NI, abs_max_I = x_NI[8::8], x_NI.abs().amax(dim=0)
    step = static_scale(weight_OI, sample_NI, abs_max_I, len(x_NI), STATIC)
    assert output_error(x_NI, weight_OI, step) < 0.1 * output_error(
        x_NI, weight_OI, exact_scale(sample_NI.abs().max() / 127.5)
    )


def test_channels_that_no_weight_reads_are_clipped_at_will() -> None:
    x_NI, weight_OI = random(4000, 64), random(32, 64)
    x_NI[:, 5] *= 1000
    weight_OI[:, 5] = 0
    step = static_scale(weight_OI, x_NI[::8], x_NI.abs().amax(dim=0), len(x_NI), STATIC)
    assert step * 127 < 100


def test_a_static_fp8_scale_covers_the_peak() -> None:
    abs_max_I = torch.tensor([1.0, 896.0])
    assert static_scale(random(4, 2), random(8, 2), abs_max_I, 8, FP8) == 2.0


def test_inputs_of_zero_stay_zero() -> None:
    assert torch.equal(int8_input(torch.zeros(2, 4), None), torch.zeros(2, 4))


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_compressed_tensors_has_the_same_kv_scales(kind: KVCache) -> None:
    peaks = torch.tensor([3.7, 121.0])
    arguments = QuantizationArgs(num_bits=8, type="float" if kind == "fp8" else "int", symmetric=True)
    for got, peak in zip(kv_scales(peaks, kind), peaks, strict=True):
        expected, _ = calculate_qparams(-peak, peak, arguments)
        assert got == pytest.approx(float(expected), rel=2**-8)  # ours is rounded to eight bits
