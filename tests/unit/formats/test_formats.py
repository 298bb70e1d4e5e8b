from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.errors import LlmoptError, SettingsError
from llmopt.formats.base import QuantizedWeight, Stored, exact_scale, pack_bits, unpack_bits
from llmopt.formats.reading import get_format
from llmopt.formats.scheme import FORMATS, Scheme, check_scheme
from llmopt.models.checkpoint import bfloat16_to_float32, float32_to_bfloat16


def weight(scheme: Scheme, shape: tuple[int, int] = (64, 96), seed: int = 0) -> QuantizedWeight:
    random = np.random.default_rng(seed)
    groups = scheme.groups(shape[1])
    top = 1 << scheme.bits
    return QuantizedWeight(
        codes_OI=random.integers(0, top, shape, dtype=np.uint8),
        scale_OG=exact_scale(random.lognormal(-6, 2, (shape[0], groups)).astype(np.float32)),
        zero_OG=None if scheme.symmetric else random.integers(0, top, (shape[0], groups), dtype=np.uint8),
        bits=scheme.bits,
    )


def as_read(stored: Stored) -> np.ndarray:
    """What a reader sees: floats as float32."""
    if stored.dtype == "BF16":
        return bfloat16_to_float32(stored.array)
    return stored.array.astype(np.float32) if stored.dtype in ("F16", "F32") else stored.array


def round_trip(name: str, original: QuantizedWeight, scheme: Scheme, dtype: str = "BF16") -> QuantizedWeight:
    encoding, shape = get_format(name), (original.codes_OI.shape[0], original.codes_OI.shape[1])
    stored = encoding.encode(original, scheme, dtype, None)
    layout = encoding.layout(shape, scheme)
    assert {suffix: value.array.shape for suffix, value in stored.items()} == {s: v[1] for s, v in layout.items()}
    assert all(value.dtype in layout[suffix][0] for suffix, value in stored.items())
    return encoding.decode({suffix: as_read(value) for suffix, value in stored.items()}, shape, scheme)


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


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_three_encodings_dequantize_to_the_same_bits(symmetric: bool, dtype: str) -> None:
    scheme = Scheme(bits=4, group_size=32, symmetric=symmetric)
    original = weight(scheme)
    results = [round_trip(name, original, scheme, dtype).dequantize().tobytes() for name in FORMATS]
    assert set(results) == {original.dequantize().tobytes()}


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


@pytest.mark.parametrize(("name", "bits"), [("awq", 3), ("gptq", 5)])
def test_bits_that_an_encoding_cannot_hold_are_refused(name: str, bits: int) -> None:
    with pytest.raises(SettingsError, match=f"cannot hold {bits}-bit"):
        check_scheme(name, Scheme(bits=bits, group_size=128, symmetric=True))


def test_an_unknown_format_names_the_nearest() -> None:
    with pytest.raises(SettingsError) as caught:
        get_format("gptqq")
    assert "`gptq`" in str(caught.value.hint)


def test_reordered_groups_are_refused_not_misread() -> None:
    scheme = Scheme(bits=4, group_size=32, symmetric=True)
    encoding = get_format("gptq")
    tensors = {k: as_read(v) for k, v in encoding.encode(weight(scheme), scheme, "F16", None).items()}
    tensors["g_idx"] = tensors["g_idx"][::-1]
    with pytest.raises(LlmoptError, match="consecutive"):
        encoding.decode(tensors, (64, 96), scheme)
