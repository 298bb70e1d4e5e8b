"""Quantized weights as integers or FP8 codes, and what an encoding of them on disk has to offer.

Shape suffixes: O out features, I in features, G groups of consecutive in-features, W packed 32-bit words.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import numpy as np

from llmopt.errors import LlmoptError
from llmopt.formats.scheme import Activations, Kind, KVCache, Scheme, Schemes
from llmopt.models.checkpoint import FLOATS, Checkpoint, bfloat16_to_float32, float32_to_bfloat16


def _e4m3_values() -> np.ndarray:
    """The 256 values of FP8 E4M3 (Micikevicius et al., arXiv:2209.05433): no infinities, NaN at 0x7F and 0xFF."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, (code & 7) / 8
    size = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0))
    size[[0x7F, 0xFF]] = np.nan
    return np.where(code < 128, size, -size).astype(np.float32)


E4M3 = _e4m3_values()


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedWeight:
    """weight_OI = (codes_OI - zero_OG) * scale_OG, each group's zero and scale repeated over its columns.

    codes_OI: uint8 in [0, 2**bits), or E4M3 bit patterns where `kind` is float. scale_OG: float32; a scale of the whole
    tensor is [O, 1] with equal entries. zero_OG: uint8, None when symmetric (then 2**(bits - 1); 0 for floats).

    Checkpoints of other tools may say more, ours never do. order_I: the codes' columns belong to these in-features
    (groups that are not consecutive). smooth_I: the input is multiplied by this first.
    """

    codes_OI: np.ndarray
    scale_OG: np.ndarray
    zero_OG: np.ndarray | None
    bits: int
    kind: Kind = "int"
    order_I: np.ndarray | None = None
    smooth_I: np.ndarray | None = None

    @property
    def group_size(self) -> int:
        return int(self.codes_OI.shape[1] // self.scale_OG.shape[1])

    def dequantize(self) -> np.ndarray:
        """float32 [O, I]: what the input is multiplied with, `order_I` and `smooth_I` worked in."""
        rows, groups = self.scale_OG.shape
        grouped = self.codes_OI.reshape(rows, groups, -1)
        grouped = E4M3[grouped] if self.kind == "float" else grouped.astype(np.float32)
        if self.kind == "int":
            grouped -= self.zeros()[:, :, None]
        grouped *= self.scale_OG[:, :, None]
        weight_OI: np.ndarray = grouped.reshape(self.codes_OI.shape)
        if self.order_I is not None:
            weight_OI = weight_OI[:, np.argsort(self.order_I)]
        return weight_OI if self.smooth_I is None else weight_OI * self.smooth_I

    def zeros(self) -> np.ndarray:
        """Zero points of integers as float32, broadcastable to [O, G]."""
        if self.zero_OG is None:
            return np.full((1, 1), 1 << (self.bits - 1), np.float32)
        return self.zero_OG.astype(np.float32)

    def stored_zeros(self) -> np.ndarray:
        """Zero points of integers as uint8 [O, G], for encodings that always have them."""
        return np.broadcast_to(self.zeros(), self.scale_OG.shape).astype(np.uint8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A QuantizedWeight without its codes."""

    scale_OG: np.ndarray
    zero_OG: np.ndarray | None = None
    order_I: np.ndarray | None = None
    smooth_I: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it goes to disk: its safetensors dtype and its bits."""

    dtype: str
    array: np.ndarray


@dataclass(frozen=True, slots=True)
class Part:
    """What a tensor of an encoding must look like: the dtypes and shapes allowed; the first shape is what we write."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


#: The tensors of one linear by the suffix after its prefix.
Layout: TypeAlias = Mapping[str, Part]
Tensors: TypeAlias = Mapping[str, np.ndarray]
HALVES = ("F16", "BF16", "F32")


class Format(Protocol):
    """How to write one encoding. Stateless; the same codes can be written in any format that holds their scheme."""

    name: str
    #: What scales are stored in, None: the dtype of the checkpoint.
    scale_dtype: str | None

    def layout(self, shape: tuple[int, int], scheme: Scheme) -> Layout:
        """The tensors of one linear of (O, I); LlmoptError where the format has no room for that shape."""

    def encode(
        self, weight: QuantizedWeight, scheme: Scheme, dtype: str, input_scale: float | None
    ) -> dict[str, Stored]:
        """The tensors of one linear, by suffix. `dtype` is that of the checkpoint; `input_scale` only if static."""

    def encode_kv(self, k_scale: float, v_scale: float) -> dict[str, Stored]:
        """Scales of one block's KV cache, by the suffix after its attention module."""

    def config(self, schemes: Schemes, *, kv_cache: KVCache = "none") -> dict[str, Any]:
        """The `quantization_config` of config.json. `schemes` names every linear module of the model, those that stay
        plain among them: whatever it leaves out may be taken for quantized."""

    def extra_files(self, schemes: Schemes, kv_cache: KVCache = "none") -> Mapping[str, dict[str, Any]]:
        """JSON files that belong beside config.json."""


class Encoding(Protocol):
    """How one checkpoint is encoded, by any tool: made of its `quantization_config`."""

    @property
    def kv_cache(self) -> KVCache:
        """What the checkpoint has scales of a KV cache for."""

    def scheme(self, prefix: str) -> Scheme | None:
        """That of a linear that has no plain weight; None where the config knows of none."""

    def layout(self, shape: tuple[int, int], scheme: Scheme, present: Collection[str]) -> Layout:
        """The tensors to read of a linear of (O, I), given the suffixes `present` of which a tool may leave some out.

        LlmoptError for what is not supported.
        """

    def grid(self, tensors: Tensors, shape: tuple[int, int], scheme: Scheme) -> Grid:
        """`tensors` by suffix: those of the layout but its codes. Floats are float32, FP8 is bits."""

    def codes(self, tensors: Tensors, shape: tuple[int, int], scheme: Scheme) -> np.ndarray:
        """codes_OI of the tensors that hold the codes, the columns in the order of the in-features."""


@dataclass(frozen=True)
class QuantizedReader:
    """The quantized linears of a checkpoint, whatever their encoding."""

    checkpoint: Checkpoint
    encoding: Encoding

    def scheme(self, prefix: str) -> Scheme | None:
        """How a linear is quantized, None where it is plain."""
        plain = self.checkpoint.tensors.get(f"{prefix}.weight")
        if plain is not None and plain.dtype in FLOATS:
            return None
        scheme = self.encoding.scheme(prefix)
        if scheme is None:
            raise LlmoptError(
                f"config.json says that `{prefix}` is not quantized, and it has no plain weight",
                hint="config.json and the weights do not belong together",
            )
        return scheme

    def activations(self, prefix: str) -> Activations:
        """How a linear's input is rounded."""
        scheme = self.scheme(prefix)
        return "none" if scheme is None else scheme.activations

    def check(self, prefix: str, shape: tuple[int, int]) -> None:
        """Raise LlmoptError unless `prefix` is a plain linear or one encoded as its scheme says; reads nothing."""
        scheme = self.scheme(prefix)
        if scheme is None:
            return
        layout = dict(self._layout(prefix, shape, scheme))
        if scheme.activations == "static":
            layout["input_scale"] = Part(HALVES, ((1,), ()))
        for suffix, part in layout.items():
            info = self.checkpoint.tensors.get(f"{prefix}.{suffix}")
            if info is None:
                raise LlmoptError(
                    f"the checkpoint has no tensor `{prefix}.{suffix}`",
                    hint=f"its `quantization_config` asks for {scheme.bits}-bit weights with it: is a shard missing?",
                )
            if info.shape not in part.shapes or info.dtype not in part.dtypes:
                shapes = " or ".join(str(list(expected)) for expected in part.shapes)
                raise LlmoptError(
                    f"`{prefix}.{suffix}` is {info.dtype} {list(info.shape)} "
                    f"where its `quantization_config` asks for {' or '.join(part.dtypes)} {shapes}",
                    hint="config.json and the weights do not belong together",
                )

    def linear(self, prefix: str, shape: tuple[int, int]) -> QuantizedWeight | None:
        """The codes of a linear of (O, I), or None where it was left plain."""
        self.check(prefix, shape)
        scheme = self.scheme(prefix)
        if scheme is None:
            return None
        grid = self.grid(prefix, shape)
        tensors = {suffix: self._read(f"{prefix}.{suffix}") for suffix in self._codes(prefix)}
        codes_OI = self.encoding.codes(tensors, shape, scheme)
        return QuantizedWeight(
            codes_OI=codes_OI if grid.order_I is None else codes_OI[:, grid.order_I],
            scale_OG=grid.scale_OG,
            zero_OG=grid.zero_OG,
            bits=scheme.bits,
            kind=scheme.kind,
            order_I=grid.order_I,
            smooth_I=grid.smooth_I,
        )

    def grid(self, prefix: str, shape: tuple[int, int]) -> Grid:
        """What is needed of a quantized linear beside its codes; reads no codes."""
        scheme = self.scheme(prefix)
        assert scheme is not None
        suffixes = set(self._layout(prefix, shape, scheme)) - self._codes(prefix)
        tensors = {suffix: self._read(f"{prefix}.{suffix}") for suffix in suffixes}
        return self.encoding.grid(tensors, shape, scheme)

    def _codes(self, prefix: str) -> set[str]:
        return {"weight", "weight_packed", "qweight"} & set(self._suffixes[prefix])

    def input_scale(self, prefix: str) -> float | None:
        """Static activation scale of a linear (code = round(x / scale)); None unless activations are static."""
        if self.activations(prefix) != "static":
            return None
        return float(self._read(f"{prefix}.input_scale").reshape(-1)[0])

    def kv_scales(self) -> dict[str, tuple[float, float]]:
        """(k_scale, v_scale) by the full prefix of each block's attention module."""
        found: dict[str, tuple[float, float]] = {}
        for name in self.checkpoint.tensors:
            if name.endswith(".k_scale"):
                module = name.removesuffix(".k_scale").removesuffix(".k_proj")
                value = name.removesuffix("k_scale").replace(f"{module}.k_proj.", f"{module}.v_proj.") + "v_scale"
                if value not in self.checkpoint.tensors:
                    raise LlmoptError(f"the checkpoint has `{name}` and no `{value}`", hint="is a shard missing?")
                found[module] = (float(self._read(name).reshape(-1)[0]), float(self._read(value).reshape(-1)[0]))
        return found

    def _layout(self, prefix: str, shape: tuple[int, int], scheme: Scheme) -> Layout:
        """That of a linear; an error of the encoding is told with the linear's name."""
        try:
            return self.encoding.layout(shape, scheme, self._suffixes.get(prefix, ()))
        except LlmoptError as error:
            raise LlmoptError(f"`{prefix}`: {error.message}", hint=error.hint) from None

    @cached_property
    def _suffixes(self) -> dict[str, set[str]]:
        """The last part of every tensor's name, by what comes before it."""
        found: dict[str, set[str]] = {}
        for name in self.checkpoint.tensors:
            prefix, _, suffix = name.rpartition(".")
            found.setdefault(prefix, set()).add(suffix)
        return found

    def _read(self, name: str) -> np.ndarray:
        floats = self.checkpoint.tensors[name].dtype in FLOATS
        return self.checkpoint.float_array(name) if floats else self.checkpoint.array(name)


def pack_bits(codes_RC: np.ndarray, bits: int) -> np.ndarray:
    """Pack rows of `bits`-wide codes (uint8) into int32 words, least significant first, without gaps.

    [R, C] -> int32 [R, ceil(C * bits / 32)]: 32 codes take exactly `bits` words.
    """
    rows, columns = codes_RC.shape
    words = -(-columns * bits // 32)
    packed = np.zeros((rows, words * 4), np.uint8)
    if 8 % bits == 0:  # no code lies in two bytes
        for place in range(8 // bits):
            part = (codes_RC[:, place :: 8 // bits] & np.uint8((1 << bits) - 1)) << np.uint8(bits * place)
            packed[:, : part.shape[1]] |= part
        return packed.view("<i4")
    for start in range(0, rows, _ROWS_AT_ONCE):
        chunk = codes_RC[start : start + _ROWS_AT_ONCE]
        stream = np.unpackbits(chunk[:, :, None], axis=2, count=bits, bitorder="little").reshape(len(chunk), -1)
        stream = np.pad(stream, ((0, 0), (0, words * 32 - columns * bits)))
        packed[start : start + len(chunk)] = np.packbits(stream, axis=1, bitorder="little")
    return packed.view("<i4")


def unpack_bits(packed_RW: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The inverse of `pack_bits`: uint8 [R, columns]."""
    codes = np.empty((len(packed_RW), columns), np.uint8)
    packed = np.ascontiguousarray(packed_RW, "<i4").view(np.uint8)
    if 8 % bits == 0:
        for place in range(8 // bits):
            part = codes[:, place :: 8 // bits]
            part[:] = packed[:, : part.shape[1]] >> np.uint8(bits * place) & np.uint8((1 << bits) - 1)
        return codes
    for start in range(0, len(packed), _ROWS_AT_ONCE):
        chunk = packed[start : start + _ROWS_AT_ONCE]
        stream = np.unpackbits(chunk, axis=1, count=columns * bits, bitorder="little")
        stream = stream.reshape(len(chunk), columns, bits)
        codes[start : start + len(chunk)] = np.packbits(stream, axis=2, bitorder="little")[:, :, 0]
    return codes


_ROWS_AT_ONCE = 256  # keeps the unpacked bits (8 bytes a code) small beside the matrix


def store_float(values: np.ndarray, dtype: str) -> Stored:
    """Float32 values in `dtype`; scales are chosen so that BF16 and F16 both hold them exactly (`exact_scale`)."""
    if dtype == "BF16":
        return Stored(dtype, float32_to_bfloat16(values))
    return Stored(dtype, np.asarray(values, {"F16": np.float16, "F32": np.float32}[dtype], order="C"))


def as_float(stored: Stored) -> np.ndarray:
    """Floats as a reader sees them, float32."""
    return bfloat16_to_float32(stored.array) if stored.dtype == "BF16" else stored.array.astype(np.float32)


def store_codes(codes: np.ndarray) -> Stored:
    """E4M3 bit patterns; NaN is no weight, so one is a mistake of whoever rounded."""
    if ((codes & 0x7F) == 0x7F).any():
        raise ValueError("FP8 codes hold NaN")
    return Stored("F8_E4M3", np.ascontiguousarray(codes))


def scale_part(shape: tuple[int, int], scheme: Scheme) -> Part:
    """The scales of a weight [O, I]: a group's [O, G], a row's [O, 1], the tensor's [1], or those of FP8 blocks."""
    out_features, in_features = shape
    if scheme.group_size > 0 and in_features % scheme.group_size:
        raise LlmoptError(
            f"{in_features} in-features in groups of {scheme.group_size} are not supported",
            hint="the group size must divide the in-features",
        )
    if scheme.group_size == 0:
        return Part(HALVES, ((1,), (), (1, 1)))
    if scheme.group_size == -1:
        return Part(HALVES, ((out_features, 1), (out_features,)))
    rows = -(-out_features // scheme.group_size) if scheme.kind == "float" else out_features
    return Part(HALVES, ((rows, scheme.groups(in_features)),))


def spread(scale: np.ndarray, shape: tuple[int, int], scheme: Scheme) -> np.ndarray:
    """scale_OG from what `scale_part` describes; FP8 blocks are as many rows as columns."""
    if scheme.group_size == 0:
        return np.full((shape[0], 1), scale.reshape(-1)[0], np.float32)
    if scheme.kind == "float" and scheme.group_size > 0:
        return np.repeat(scale, scheme.group_size, axis=0)[: shape[0]]
    return scale.reshape(shape[0], -1)


def of_tensor(scale_OG: np.ndarray) -> np.ndarray:
    """The one scale of a whole tensor, float32 [1]."""
    if (scale_OG != scale_OG[0, 0]).any():
        raise ValueError("a scale of the whole tensor has several values")
    return scale_OG[0, :1]


def regroup(group_I: np.ndarray, groups: int) -> np.ndarray | None:
    """The order that makes groups of columns consecutive, None where they are; LlmoptError unless all are as large.

    group_I: the group of each in-feature.
    """
    size = len(group_I) // groups
    if np.array_equal(group_I, np.arange(len(group_I)) // size):
        return None
    order_I = np.argsort(group_I, kind="stable")
    if not np.array_equal(group_I[order_I], np.arange(len(group_I)) // size):
        raise LlmoptError(
            "groups of columns (`g_idx`) that are not equally large are not supported",
            hint="quantize the original with `llmopt quantize --act-order`, which keeps groups consecutive",
        )
    return order_I


def exact_scale(scale: np.ndarray) -> np.ndarray:
    """Round scales to values that BF16 and F16 both hold, so that no encoding and no runtime dtype changes them.

    BF16 has 8 significant bits and F16 has 11 down to 2**-14, fewer below: rounding to the first and then to the
    second lands on a number of both. The range is F16's, so zero becomes its smallest step.
    """
    rounded = bfloat16_to_float32(float32_to_bfloat16(scale)).clip(2.0**-24, 65280.0)
    return rounded.astype(np.float16).astype(np.float32)
