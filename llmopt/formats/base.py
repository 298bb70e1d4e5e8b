"""Quantized weights as integers, and what an encoding of them on disk has to offer.

Shape suffixes: O out features, I in features, G groups of consecutive in-features, W packed 32-bit words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from llmopt.errors import LlmoptError
from llmopt.formats.scheme import Activations, Scheme
from llmopt.models.checkpoint import Checkpoint, bfloat16_to_float32, float32_to_bfloat16


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedWeight:
    """weight_OI = (codes_OI - zero_OG) * scale_OG, each group's zero and scale repeated over its columns.

    codes_OI: uint8 in [0, 2**bits). scale_OG: float32. zero_OG: uint8, None when symmetric (then 2**(bits - 1)).
    """

    codes_OI: np.ndarray
    scale_OG: np.ndarray
    zero_OG: np.ndarray | None
    bits: int

    @property
    def group_size(self) -> int:
        return int(self.codes_OI.shape[1] // self.scale_OG.shape[1])

    def dequantize(self) -> np.ndarray:
        """float32 [O, I]."""
        rows, groups = self.scale_OG.shape
        grouped = self.codes_OI.reshape(rows, groups, -1).astype(np.float32)
        grouped -= self.zeros()[:, :, None]
        grouped *= self.scale_OG[:, :, None]
        return grouped.reshape(self.codes_OI.shape)

    def zeros(self) -> np.ndarray:
        """Zero points as float32, broadcastable to [O, G]."""
        if self.zero_OG is None:
            return np.full((1, 1), 1 << (self.bits - 1), np.float32)
        return self.zero_OG.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it goes to disk: its safetensors dtype and its bits."""

    dtype: str
    array: np.ndarray


#: What a tensor of an encoding must look like: the dtypes allowed, and its shape.
Layout: TypeAlias = Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]]


class Format(Protocol):
    """One encoding on disk. Stateless; the same integers can be written in any of them that holds their bits."""

    name: str

    def layout(self, shape: tuple[int, int], scheme: Scheme) -> Layout:
        """The tensors of one linear of (O, I), by the suffix after its prefix."""

    def encode(
        self, weight: QuantizedWeight, scheme: Scheme, dtype: str, input_scale: float | None
    ) -> dict[str, Stored]:
        """The tensors of one linear, by suffix. `dtype` is that of the checkpoint; `input_scale` only if static."""

    def decode(self, tensors: Mapping[str, np.ndarray], shape: tuple[int, int], scheme: Scheme) -> QuantizedWeight:
        """The inverse: `tensors` by suffix, floats already float32."""

    def config(self, scheme: Scheme, *, head: bool) -> dict[str, Any]:
        """The `quantization_config` of config.json; `head` tells whether lm_head is quantized too."""

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        """The inverse; raises LlmoptError naming what is not supported."""


@dataclass(frozen=True)
class QuantizedReader:
    """The quantized linears of a checkpoint, whatever their encoding."""

    checkpoint: Checkpoint
    format: Format
    scheme: Scheme

    @property
    def activations(self) -> Activations:
        return self.scheme.activations

    def check(self, prefix: str, shape: tuple[int, int]) -> None:
        """Raise LlmoptError unless `prefix` is a plain linear or one encoded just as the scheme says; reads nothing."""
        if f"{prefix}.weight" in self.checkpoint.tensors and not self._is_quantized(prefix):
            return
        for suffix, (dtypes, expected) in self.format.layout(shape, self.scheme).items():
            info = self.checkpoint.tensors.get(f"{prefix}.{suffix}")
            if info is None:
                raise LlmoptError(
                    f"the checkpoint has no tensor `{prefix}.{suffix}`",
                    hint=f"`{self.format.name}` needs it: is a shard missing?",
                )
            if info.shape != expected or info.dtype not in dtypes:
                raise LlmoptError(
                    f"`{prefix}.{suffix}` is {info.dtype} {list(info.shape)} "
                    f"where `{self.format.name}` needs {' or '.join(dtypes)} {list(expected)}",
                    hint="config.json and the weights do not belong together",
                )

    def linear(self, prefix: str, shape: tuple[int, int]) -> QuantizedWeight | None:
        """The integers of a linear of (O, I), or None where it was left plain."""
        self.check(prefix, shape)
        if not self._is_quantized(prefix):
            return None
        layout = self.format.layout(shape, self.scheme)
        tensors = {suffix: self._read(f"{prefix}.{suffix}") for suffix in layout}
        return self.format.decode(tensors, shape, self.scheme)

    def input_scale(self, prefix: str) -> float | None:
        """Static activation scale of a linear (int8 = round(x / scale)); None unless activations are static."""
        if self.scheme.activations != "static" or not self._is_quantized(prefix):
            return None
        return float(self._read(f"{prefix}.input_scale").reshape(-1)[0])

    def _is_quantized(self, prefix: str) -> bool:
        info = self.checkpoint.tensors.get(f"{prefix}.weight")
        return info is None or info.dtype == "I8"

    def _read(self, name: str) -> np.ndarray:
        floats = self.checkpoint.tensors[name].dtype in ("F16", "BF16", "F32")
        return self.checkpoint.float_array(name) if floats else self.checkpoint.array(name)


def pack_bits(codes_RC: np.ndarray, bits: int) -> np.ndarray:
    """Pack rows of `bits`-wide codes (uint8) into int32 words, least significant first, without gaps.

    [R, C] -> int32 [R, ceil(C * bits / 32)]: 32 codes take exactly `bits` words.
    """
    rows, columns = codes_RC.shape
    words = -(-columns * bits // 32)
    packed = np.zeros((rows, words), np.int32)
    for start in range(0, rows, _ROWS_AT_ONCE):
        chunk = codes_RC[start : start + _ROWS_AT_ONCE]
        stream = np.unpackbits(chunk[:, :, None], axis=2, count=bits, bitorder="little").reshape(len(chunk), -1)
        stream = np.pad(stream, ((0, 0), (0, words * 32 - columns * bits)))
        packed[start : start + len(chunk)] = np.packbits(stream, axis=1, bitorder="little").view("<i4")
    return packed


def unpack_bits(packed_RW: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The inverse of `pack_bits`: uint8 [R, columns]."""
    codes = np.empty((len(packed_RW), columns), np.uint8)
    for start in range(0, len(packed_RW), _ROWS_AT_ONCE):
        chunk = np.ascontiguousarray(packed_RW[start : start + _ROWS_AT_ONCE], "<i4").view(np.uint8)
        stream = np.unpackbits(chunk, axis=1, count=columns * bits, bitorder="little")
        stream = stream.reshape(len(chunk), columns, bits)
        codes[start : start + len(chunk)] = np.packbits(stream, axis=2, bitorder="little")[:, :, 0]
    return codes


_ROWS_AT_ONCE = 256  # keeps the unpacked bits (8 bytes a code) small beside the matrix


def store_float(values: np.ndarray, dtype: str) -> Stored:
    """Float32 values in `dtype`; scales are chosen so that BF16 and F16 both hold them exactly (`exact_scale`)."""
    if dtype == "BF16":
        return Stored(dtype, float32_to_bfloat16(values))
    return Stored(dtype, np.ascontiguousarray(values, {"F16": np.float16, "F32": np.float32}[dtype]))


def exact_scale(scale: np.ndarray) -> np.ndarray:
    """Round scales to values that BF16 and F16 both hold, so that no encoding and no runtime dtype changes them.

    BF16 has 8 significant bits and F16 has 11 down to 2**-14, fewer below: rounding to the first and then to the
    second lands on a number of both. The range is F16's, so zero becomes its smallest step.
    """
    rounded = bfloat16_to_float32(float32_to_bfloat16(scale)).clip(2.0**-24, 65280.0)
    return rounded.astype(np.float16).astype(np.float32)
