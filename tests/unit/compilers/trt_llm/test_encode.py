"""Rounding FP8 codes again."""

from __future__ import annotations

import numpy as np
import torch

from llmopt.compilers.trt_llm.encode import nearest_e4m3, to_largest_scale
from llmopt.formats.base import E4M3, QuantizedWeight

FINITE = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)


def test_codes_are_their_own_nearest() -> None:
    assert np.array_equal(nearest_e4m3(E4M3[FINITE]), FINITE)


def test_rounding_is_that_of_torch() -> None:
    """Ties among them: the middle between any two neighbours."""
    sizes = np.sort(E4M3[:0x7F])
    middles = (sizes[1:] + sizes[:-1]) / 2
    random = np.random.default_rng(0).normal(size=10000) * np.float32(448) / 4
    values = np.concatenate([middles, -middles, sizes / 3, random.clip(-448, 448)]).astype(np.float32)
    expected = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(nearest_e4m3(values), expected)


def weight(scale: float) -> QuantizedWeight:
    codes = np.tile(FINITE, (2, 1))
    return QuantizedWeight(
        codes_OI=codes, scale_OG=np.full((2, 1), scale, np.float32), zero_OG=None, bits=8, kind="float"
    )


def test_a_scale_twice_as_large_costs_only_what_is_too_small_for_it() -> None:
    """Halved values keep their codes but for the subnormal ones with an odd last bit."""
    (large, small), changed = to_largest_scale([weight(0.5), weight(0.25)])
    assert np.array_equal(large.codes_OI, weight(0.5).codes_OI)
    differ = small.dequantize() != weight(0.25).dequantize()
    assert set(small.scale_OG.reshape(-1)) == {0.5}
    assert changed == int(differ.sum()) == 2 * 2 * 8


def test_equal_scales_are_left_alone() -> None:
    found, changed = to_largest_scale([weight(0.3), weight(0.3)])
    assert changed == 0
    assert all(np.array_equal(one.codes_OI, weight(0.3).codes_OI) for one in found)
