"""AWQ `gemm`: qweight int32 [I, O / 8] and qzeros int32 [G, O / 8], packed along the out-features and interleaved.

Source: casper-hansen/AutoAWQ, WQLinear_GEMM: nibble i of a word holds the column ORDER[i] of its eight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llmopt.errors import LlmoptError
from llmopt.formats.base import Layout, QuantizedWeight, Stored, pack_bits, store_float, unpack_bits
from llmopt.formats.scheme import Scheme

ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
_INVERSE = np.argsort(ORDER)


class AWQGemm:
    name = "awq"

    def layout(self, shape: tuple[int, int], scheme: Scheme) -> Layout:
        out_features, in_features = shape
        if out_features % 8:
            raise LlmoptError(
                f"the format `awq` cannot hold a linear of {out_features} out-features",
                hint="they must be a multiple of 8; use the format `compressed-tensors`",
            )
        groups = scheme.groups(in_features)
        return {
            "qweight": (("I32",), (in_features, out_features // 8)),
            "qzeros": (("I32",), (groups, out_features // 8)),
            "scales": (("F16", "BF16", "F32"), (groups, out_features)),
        }

    def encode(
        self, weight: QuantizedWeight, scheme: Scheme, dtype: str, input_scale: float | None
    ) -> dict[str, Stored]:
        rows, groups = weight.scale_OG.shape
        zero_GO = np.broadcast_to(weight.zeros().T, (groups, rows)).astype(np.uint8)
        return {
            "qweight": Stored("I32", _pack(np.ascontiguousarray(weight.codes_OI.T))),
            "qzeros": Stored("I32", _pack(zero_GO)),
            "scales": store_float(np.ascontiguousarray(weight.scale_OG.T), "F16"),
        }

    def decode(self, tensors: Mapping[str, np.ndarray], shape: tuple[int, int], scheme: Scheme) -> QuantizedWeight:
        zero_OG = np.ascontiguousarray(_unpack(tensors["qzeros"], shape[0]).T)
        return QuantizedWeight(
            codes_OI=np.ascontiguousarray(_unpack(tensors["qweight"], shape[0]).T),
            scale_OG=np.ascontiguousarray(tensors["scales"].T),
            # The encoding always has zero points; where all are the middle, nothing is lost by leaving them out.
            zero_OG=None if (zero_OG == 8).all() else zero_OG,
            bits=4,
        )

    def config(self, scheme: Scheme, *, head: bool) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "zero_point": True,
            "modules_to_not_convert": None if head else ["lm_head"],
        }

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        version, bits = str(config.get("version", "gemm")).lower(), config.get("bits")
        if version != "gemm" or bits != 4:
            raise LlmoptError(f"the AWQ version `{version}` at {bits} bits is not supported")
        return Scheme(bits=4, group_size=config["group_size"], symmetric=False)


def _pack(codes_RO: np.ndarray) -> np.ndarray:
    return pack_bits(codes_RO.reshape(len(codes_RO), -1, 8)[:, :, ORDER].reshape(codes_RO.shape), 4)


def _unpack(packed_RW: np.ndarray, out_features: int) -> np.ndarray:
    codes_RO = unpack_bits(packed_RW, 4, out_features)
    return codes_RO.reshape(len(codes_RO), -1, 8)[:, :, _INVERSE].reshape(codes_RO.shape)
