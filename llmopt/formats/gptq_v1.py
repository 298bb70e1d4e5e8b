"""GPTQ v1 (`checkpoint_format: gptq`): what AutoGPTQ wrote and every GPU runtime reads.

qweight int32 [I * bits / 32, O], packed along the in-features; qzeros int32 [G, O * bits / 32], each zero point stored
minus one (modulo 2**bits); scales F16 [G, O]; g_idx int32 [I]. Groups are always consecutive columns here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llmopt.errors import LlmoptError
from llmopt.formats.base import Layout, QuantizedWeight, Stored, pack_bits, store_float, unpack_bits
from llmopt.formats.scheme import Scheme


class GPTQv1:
    name = "gptq"

    def layout(self, shape: tuple[int, int], scheme: Scheme) -> Layout:
        out_features, in_features = shape
        if out_features * scheme.bits % 32 or in_features * scheme.bits % 32:
            raise LlmoptError(
                f"the format `gptq` cannot hold a linear of {out_features} x {in_features} at {scheme.bits} bits",
                hint="its sizes must be multiples of 32; use the format `compressed-tensors`",
            )
        groups = scheme.groups(in_features)
        return {
            "qweight": (("I32",), (in_features * scheme.bits // 32, out_features)),
            "qzeros": (("I32",), (groups, out_features * scheme.bits // 32)),
            "scales": (("F16", "BF16", "F32"), (groups, out_features)),
            "g_idx": (("I32",), (in_features,)),
        }

    def encode(
        self, weight: QuantizedWeight, scheme: Scheme, dtype: str, input_scale: float | None
    ) -> dict[str, Stored]:
        rows, groups = weight.scale_OG.shape
        zero_GO = np.broadcast_to(weight.zeros().T, (groups, rows)).astype(np.uint8)
        stored_GO = (zero_GO - np.uint8(1)) & np.uint8((1 << weight.bits) - 1)
        g_idx = np.arange(weight.codes_OI.shape[1], dtype=np.int32) // np.int32(weight.group_size)
        return {
            "qweight": Stored("I32", np.ascontiguousarray(pack_bits(weight.codes_OI, weight.bits).T)),
            "qzeros": Stored("I32", pack_bits(stored_GO, weight.bits)),
            "scales": store_float(np.ascontiguousarray(weight.scale_OG.T), "F16"),
            "g_idx": Stored("I32", g_idx),
        }

    def decode(self, tensors: Mapping[str, np.ndarray], shape: tuple[int, int], scheme: Scheme) -> QuantizedWeight:
        out_features, in_features = shape
        size = in_features // scheme.groups(in_features)
        if not np.array_equal(tensors["g_idx"], np.arange(in_features) // size):
            raise LlmoptError(
                "a GPTQ checkpoint whose groups are not consecutive columns (`desc_act`) is not supported",
                hint="quantize the original with `llmopt quantize --act-order`, which keeps groups consecutive",
            )
        packed_OW = np.ascontiguousarray(tensors["qweight"].T)
        stored_GO = unpack_bits(tensors["qzeros"], scheme.bits, out_features)
        zero_OG = np.ascontiguousarray(((stored_GO + np.uint8(1)) & np.uint8((1 << scheme.bits) - 1)).T)
        return QuantizedWeight(
            codes_OI=unpack_bits(packed_OW, scheme.bits, in_features),
            scale_OG=np.ascontiguousarray(tensors["scales"].T),
            zero_OG=None if scheme.symmetric else zero_OG,
            bits=scheme.bits,
        )

    def config(self, scheme: Scheme, *, head: bool) -> dict[str, Any]:
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "sym": scheme.symmetric,
            "desc_act": False,
            "lm_head": head,
        }

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        if config.get("checkpoint_format", "gptq") != "gptq":
            raise LlmoptError(f"the GPTQ checkpoint format `{config['checkpoint_format']}` is not supported")
        return Scheme(bits=config["bits"], group_size=config["group_size"], symmetric=config.get("sym", True))
