from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.errors import SettingsError
from llmopt.formats.base import E4M3, QuantizedWeight, Stored, as_float, exact_scale, pack_bits, unpack_bits
from llmopt.formats.dequantized import fp8_input
from llmopt.formats.modelopt import ALGORITHMS
from llmopt.formats.reading import get_format, open_quantized
from llmopt.formats.scheme import FORMATS, Activations, Scheme
from llmopt.models.checkpoint import TensorInfo, bfloat16_to_float32, float32_to_bfloat16

FP8 = [Scheme(bits=8, group_size=size, symmetric=True, kind="float") for size in (-1, 0)]


def weight(scheme: Scheme, shape: tuple[int, int] = (64, 96), seed: int = 0) -> QuantizedWeight:
    random = np.random.default_rng(seed)
    groups = scheme.groups(shape[1])
    top = 1 << scheme.bits
    codes_OI = random.integers(0, top, shape, dtype=np.uint8)
    scale_OG = exact_scale(random.lognormal(-6, 2, (shape[0], groups)).astype(np.float32))
    return QuantizedWeight(
        codes_OI=np.where(np.isnan(E4M3[codes_OI]), 0, codes_OI) if scheme.kind == "float" else codes_OI,
        scale_OG=scale_OG if scheme.group_size else np.full_like(scale_OG, scale_OG[0, 0]),
        zero_OG=None if scheme.symmetric else random.integers(0, top, (shape[0], groups), dtype=np.uint8),
        bits=scheme.bits,
        kind=scheme.kind,
    )


class Memory:
    """A checkpoint that was never written: what its file would hold, as a reader sees it."""

    def __init__(self, stored: dict[str, Stored], config: dict[str, Any]) -> None:
        self.config = {"quantization_config": config}
        self._stored = stored
        self.tensors = {
            name: TensorInfo(each.dtype, each.array.shape, Path("memory"), 0, each.array.nbytes)
            for name, each in stored.items()
        }

    def array(self, name: str) -> np.ndarray:
        return self._stored[name].array

    def float_array(self, name: str) -> np.ndarray:
        return as_float(self._stored[name])


def round_trip(name: str, original: QuantizedWeight, scheme: Scheme, dtype: str = "BF16") -> QuantizedWeight:
    encoding, shape = get_format(name), (original.codes_OI.shape[0], original.codes_OI.shape[1])
    stored = encoding.encode(original, scheme, dtype, 0.5 if scheme.activations == "static" else None)
    layout = encoding.layout(shape, scheme)
    assert {suffix: value.array.shape for suffix, value in stored.items()} == {
        s: v.shapes[0] for s, v in layout.items()
    }
    assert all(value.dtype in layout[suffix].dtypes for suffix, value in stored.items())
    prefix = "model.layers.0.mlp.up_proj"
    config = encoding.config({prefix: scheme, "lm_head": None})
    if name == "modelopt":
        config |= encoding.extra_files({prefix: scheme})["hf_quant_config.json"]
    reader = open_quantized(Memory({f"{prefix}.{suffix}": each for suffix, each in stored.items()}, config))  # type: ignore[arg-type]
    assert reader is not None
    assert reader.scheme(prefix) == (replace(scheme, symmetric=False) if name == "awq" else scheme)
    again = reader.linear(prefix, shape)
    assert again is not None
    return again


@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 70), st.randoms())
@settings(deadline=None)
def test_packing_is_that_of_compressed_tensors(bits: int, rows: int, columns: int, random: object) -> None:
    codes = np.random.default_rng(rows * columns).integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    signed = torch.from_numpy(codes.astype(np.int16) - (1 << (bits - 1))).to(torch.int8)
    packed = pack_bits(codes, bits)
    assert np.array_equal(packed, pack_to_int32(signed, bits).numpy())
    assert np.array_equal(unpack_bits(packed, bits, columns), codes)


@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("name", "bits"),
    [("awq", 4), *[("gptq", b) for b in (2, 3, 4, 8)], *[("compressed-tensors", b) for b in range(2, 9)]],
)
def test_what_is_written_is_read_back(name: str, bits: int, symmetric: bool, group_size: int) -> None:
    scheme = Scheme(bits=bits, group_size=group_size, symmetric=symmetric)
    original = weight(scheme)
    again = round_trip(name, original, scheme)
    assert np.array_equal(again.codes_OI, original.codes_OI)
    assert np.array_equal(again.dequantize(), original.dequantize())


@pytest.mark.parametrize("activations", ["none", "dynamic", "static"])
@pytest.mark.parametrize("scheme", [Scheme(bits=8, group_size=-1, symmetric=True), *FP8], ids=str)
def test_eight_bits_are_read_back_with_any_activations(scheme: Scheme, activations: Activations) -> None:
    scheme = replace(scheme, activations=activations)
    original = weight(scheme)
    again = round_trip("compressed-tensors", original, scheme)
    assert np.array_equal(again.codes_OI, original.codes_OI)
    assert np.array_equal(again.dequantize(), original.dequantize())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_of_modelopt_is_read_back(algorithm: str) -> None:
    scheme = ALGORITHMS[algorithm]
    original = weight(scheme, (64, 256))
    again = round_trip("modelopt", original, scheme)
    assert np.array_equal(again.codes_OI, original.codes_OI)
    assert again.dequantize().tobytes() == original.dequantize().tobytes()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_all_encodings_dequantize_to_the_same_bits(symmetric: bool, dtype: str) -> None:
    scheme = Scheme(bits=4, group_size=32, symmetric=symmetric)
    original = weight(scheme)
    names = [name for name in FORMATS if symmetric or name != "modelopt"]
    results = [round_trip(name, original, scheme, dtype).dequantize().tobytes() for name in names]
    assert set(results) == {original.dequantize().tobytes()}


def test_fp8_codes_are_those_of_torch() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(E4M3, every, equal_nan=True)


@pytest.mark.parametrize("name", ["compressed-tensors", "modelopt"])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_fp8_codes_that_are_no_number_are_never_written(name: str, code: int) -> None:
    scheme = ALGORITHMS["FP8"]
    original = weight(scheme)
    original.codes_OI[3, 5] = code
    with pytest.raises(ValueError, match="NaN"):
        get_format(name).encode(original, scheme, "BF16", 0.5)


@pytest.mark.parametrize("scale", [None, 0.25])
def test_fp8_inputs_are_rounded_as_compressed_tensors_does(scale: float | None) -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * 100
    args = QuantizationArgs(num_bits=8, type="float", strategy="tensor" if scale else "token", dynamic=not scale)
    if scale:
        scales, zeros = torch.tensor([scale]), None
    else:
        scales, zeros = compute_dynamic_scales_and_zp(x, args, torch.nn.Module())
    expected = fake_quantize(x, scales, zeros, args)
    assert torch.equal(fp8_input(scale)(x.clone()), expected)


def test_fp8_inputs_beyond_the_range_saturate() -> None:
    got = fp8_input(1.0)(torch.tensor([[1e6, -1e6, 448.0, 0.0]]))
    assert got.tolist() == [[448.0, -448.0, 448.0, 0.0]]


def test_fp8_inputs_in_groups_do_not_disturb_each_other() -> None:
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    alone = fp8_input(None)(x[:, :128].clone())
    x[:, 128:] *= 1000
    assert torch.equal(fp8_input(None, 128)(x)[:, :128], alone)


@given(st.lists(st.floats(min_value=0, max_value=60000, width=32), min_size=1))
def test_an_exact_scale_survives_both_half_precisions(values: list[float]) -> None:
    scale = exact_scale(np.array(values, np.float32))
    assert np.array_equal(scale, scale.astype(np.float16).astype(np.float32))
    assert np.array_equal(scale, bfloat16_to_float32(float32_to_bfloat16(scale)))
    assert (scale > 0).all()


def test_gptq_stores_the_zero_point_minus_one() -> None:
    scheme = Scheme(bits=4, group_size=-1, symmetric=True)
    stored = get_format("gptq").encode(weight(scheme), scheme, "F16", None)
    assert set(np.unique(stored["qzeros"].array)) == {0x77777777}


def test_awq_interleaves_its_columns() -> None:
    scheme = Scheme(bits=4, group_size=-1, symmetric=True)
    codes = np.arange(8, dtype=np.uint8)[:, None]
    one = QuantizedWeight(codes_OI=codes, scale_OG=np.ones((8, 1), np.float32), zero_OG=None, bits=4)
    word = int(get_format("awq").encode(one, scheme, "F16", None)["qweight"].array[0, 0]) & 0xFFFFFFFF
    assert [word >> 4 * nibble & 15 for nibble in range(8)] == [0, 2, 4, 6, 1, 3, 5, 7]


def test_an_unknown_format_names_the_nearest() -> None:
    with pytest.raises(SettingsError) as caught:
        get_format("gptqq")
    assert "`gptq`" in str(caught.value.hint)
