"""AWQ `gemm`: qweight int32 [I, O / 8] and qzeros int32 [G, O / 8], packed along the out-features and interleaved.

Source: casper-hansen/AutoAWQ, WQLinear_GEMM: nibble i of a word holds the column ORDER[i] of its eight.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmopt.errors import LlmoptError
from llmopt.formats.base import (
    HALVES,
    Grid,
    Layout,
    Part,
    QuantizedWeight,
    Stored,
    Tensors,
    pack_bits,
    scale_part,
    store_float,
    unpack_bits,
)
from llmopt.formats.scheme import KVCache, Scheme, Schemes

ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
_INVERSE = np.argsort(ORDER)


class AWQGemm:
    name = "awq"
    scale_dtype: str | None = "F16"

    def layout(self, shape: tuple[int, int], scheme: Scheme) -> Layout:
        return _layout(shape, scheme)

    def encode(
        self, weight: QuantizedWeight, scheme: Scheme, dtype: str, input_scale: float | None
    ) -> dict[str, Stored]:
        return {
            "qweight": Stored("I32", _pack(np.ascontiguousarray(weight.codes_OI.T))),
            "qzeros": Stored("I32", _pack(np.ascontiguousarray(weight.stored_zeros().T))),
            "scales": store_float(np.ascontiguousarray(weight.scale_OG.T), "F16"),
        }

    def encode_kv(self, k_scale: float, v_scale: float) -> dict[str, Stored]:
        return {}

    def config(self, schemes: Schemes, *, kv_cache: KVCache = "none") -> dict[str, Any]:
        scheme = next(scheme for scheme in schemes.values() if scheme is not None)
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "zero_point": True,
            "modules_to_not_convert": [prefix for prefix, scheme in schemes.items() if scheme is None] or None,
        }

    def extra_files(self, schemes: Schemes, kv_cache: KVCache = "none") -> Mapping[str, dict[str, Any]]:
        return {}


def read(config: Mapping[str, Any]) -> Reading:
    """The encoding of a checkpoint by any tool; raises LlmoptError naming what is not supported."""
    version = str(config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm").lower()
    bits, size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
    if version != "gemm" or bits != 4 or not isinstance(size, int) or (size < 1 and size != -1):
        raise LlmoptError(
            f"the AWQ version `{version}` at {bits} bits in groups of {size} is not supported",
            hint="the version `gemm` at 4 bits is; the others are packed for one kernel",
        )
    return Reading(Scheme(bits=4, group_size=size, symmetric=False))


@dataclass(frozen=True, slots=True)
class Reading:
    quantized: Scheme
    kv_cache: KVCache = "none"

    def scheme(self, prefix: str) -> Scheme | None:
        return self.quantized

    def layout(self, shape: tuple[int, int], scheme: Scheme, present: Collection[str]) -> Layout:
        return _layout(shape, scheme)

    def grid(self, tensors: Tensors, shape: tuple[int, int], scheme: Scheme) -> Grid:
        zero_OG = np.ascontiguousarray(_unpack(tensors["qzeros"], shape[0]).T)
        # The encoding always has zero points; where all are the middle, nothing is lost by leaving them out.
        scale_OG = np.ascontiguousarray(tensors["scales"].T)
        return Grid(scale_OG=scale_OG, zero_OG=None if (zero_OG == 8).all() else zero_OG)

    def codes(self, tensors: Tensors, shape: tuple[int, int], scheme: Scheme) -> np.ndarray:
        return np.ascontiguousarray(_unpack(tensors["qweight"], shape[0]).T)


def _layout(shape: tuple[int, int], scheme: Scheme) -> Layout:
    out_features, in_features = shape
    if out_features % 8:
        raise LlmoptError(
            f"the format `awq` cannot hold a linear of {out_features} out-features",
            hint="they must be a multiple of 8; use the format `compressed-tensors`",
        )
    scale_part(shape, scheme)
    groups = scheme.groups(in_features)
    return {
        "qweight": Part(("I32",), ((in_features, out_features // 8),)),
        "qzeros": Part(("I32",), ((groups, out_features // 8),)),
        "scales": Part(HALVES, ((groups, out_features),)),
    }


def _pack(codes_RO: np.ndarray) -> np.ndarray:
    return pack_bits(codes_RO.reshape(len(codes_RO), -1, 8)[:, :, ORDER].reshape(codes_RO.shape), 4)


def _unpack(packed_RW: np.ndarray, out_features: int) -> np.ndarray:
    codes_RO = unpack_bits(packed_RW, 4, out_features)
    return codes_RO.reshape(len(codes_RO), -1, 8)[:, :, _INVERSE].reshape(codes_RO.shape)
