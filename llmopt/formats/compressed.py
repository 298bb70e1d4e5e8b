"""compressed-tensors: `pack-quantized` for weights alone, `int-quantized` for W8A8. vLLM's and transformers' own.

Source: vllm-project/compressed-tensors 0.20, compressors/pack_quantized and naive_quantized. Codes are stored as
signed integers; packing adds 2**(bits - 1) back, so the packed bits are ours. Packing is dense (32 codes in `bits`
words), which for 3, 5, 6 and 7 bits differs from compressed-tensors before dense packing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llmopt.errors import LlmoptError
from llmopt.formats.base import Layout, QuantizedWeight, Stored, pack_bits, store_float, unpack_bits
from llmopt.formats.scheme import Scheme

_SCALES = ("BF16", "F16", "F32")


class CompressedTensors:
    name = "compressed-tensors"

    def layout(self, shape: tuple[int, int], scheme: Scheme) -> Layout:
        out_features, in_features = shape
        groups = scheme.groups(in_features)
        scale: Layout = {"weight_scale": (_SCALES, (out_features, groups))}
        if scheme.activations != "none":
            weight: Layout = {"weight": (("I8",), shape)}
            static: Layout = {"input_scale": (_SCALES, (1,))} if scheme.activations == "static" else {}
            return {**weight, **scale, **static}
        packed: Layout = {
            "weight_packed": (("I32",), (out_features, -(-in_features * scheme.bits // 32))),
            "weight_shape": (("I64", "I32"), (2,)),
        }
        zero: Layout = {"weight_zero_point": (("I32",), (-(-out_features * scheme.bits // 32), groups))}
        return {**packed, **scale, **({} if scheme.symmetric else zero)}

    def encode(
        self, weight: QuantizedWeight, scheme: Scheme, dtype: str, input_scale: float | None
    ) -> dict[str, Stored]:
        scale = {"weight_scale": store_float(weight.scale_OG, dtype)}
        if scheme.activations != "none":
            signed = (weight.codes_OI ^ np.uint8(128)).view(np.int8)
            static = {} if input_scale is None else {"input_scale": store_float(np.array([input_scale]), dtype)}
            return {"weight": Stored("I8", signed), **scale, **static}
        tensors = {
            "weight_packed": Stored("I32", pack_bits(weight.codes_OI, weight.bits)),
            "weight_shape": Stored("I64", np.array(weight.codes_OI.shape, np.int64)),
            **scale,
        }
        if weight.zero_OG is not None:
            packed_GW = pack_bits(np.ascontiguousarray(weight.zero_OG.T), weight.bits)
            tensors["weight_zero_point"] = Stored("I32", np.ascontiguousarray(packed_GW.T))
        return tensors

    def decode(self, tensors: Mapping[str, np.ndarray], shape: tuple[int, int], scheme: Scheme) -> QuantizedWeight:
        scale_OG, zero_OG = tensors["weight_scale"], None
        if "weight" in tensors:
            codes_OI = tensors["weight"].view(np.uint8) ^ np.uint8(128)
            return QuantizedWeight(codes_OI=codes_OI, scale_OG=scale_OG, zero_OG=None, bits=8)
        codes_OI = unpack_bits(tensors["weight_packed"], scheme.bits, shape[1])
        if not scheme.symmetric:
            packed_GW = np.ascontiguousarray(tensors["weight_zero_point"].T)
            zero_OG = np.ascontiguousarray(unpack_bits(packed_GW, scheme.bits, shape[0]).T)
        return QuantizedWeight(codes_OI=codes_OI, scale_OG=scale_OG, zero_OG=zero_OG, bits=scheme.bits)

    def config(self, scheme: Scheme, *, head: bool) -> dict[str, Any]:
        packed = scheme.activations == "none"
        kind = "pack-quantized" if packed else "int-quantized"
        weights = _args(scheme.bits, scheme.symmetric, "channel" if scheme.group_size == -1 else "group")
        if scheme.group_size != -1:
            weights["group_size"] = scheme.group_size
        inputs = None
        if not packed:
            dynamic = scheme.activations == "dynamic"
            inputs = _args(8, True, "token" if dynamic else "tensor") | {"dynamic": dynamic}
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
            "format": kind,
        }
        return {
            "quant_method": self.name,
            "quantization_status": "compressed",
            "format": kind,
            "config_groups": {"group_0": group},
            "ignore": [] if head else ["lm_head"],
            "kv_cache_scheme": None,
        }

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        groups = list(config.get("config_groups", {}).values())
        if len(groups) != 1 or groups[0].get("targets") != ["Linear"]:
            raise LlmoptError("a compressed-tensors checkpoint with several config groups is not supported")
        if config.get("format") not in ("pack-quantized", "int-quantized"):
            raise LlmoptError(f"the compressed-tensors format `{config.get('format')}` is not supported")
        weights, inputs = groups[0]["weights"], groups[0].get("input_activations")
        if weights.get("type", "int") != "int" or weights.get("strategy") not in ("channel", "group"):
            raise LlmoptError(f"compressed-tensors weights of `{weights.get('strategy')}` are not supported")
        size = weights.get("group_size")
        return Scheme(
            bits=int(weights["num_bits"]),
            group_size=-1 if weights["strategy"] == "channel" or size is None else int(size),
            symmetric=bool(weights.get("symmetric", True)),
            activations="none" if inputs is None else "dynamic" if inputs.get("dynamic") else "static",
        )


def _args(bits: int, symmetric: bool, strategy: str) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": None,
        "dynamic": False,
    }
