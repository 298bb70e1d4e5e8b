"""ModelOpt's unified checkpoint: what TensorRT-LLM and vLLM read. hf_quant_config.json lies beside config.json.

Source: NVIDIA/Model-Optimizer 0.47, torch/export/quant_utils and convert_hf_config. Scales are F32. 4-bit codes are
two's complement, two of consecutive out-features in a byte, the even one low: uint8 [O / 2, I].

`pre_quant_scale`, which the input is multiplied by, is one wherever we write it: TensorRT-LLM asks for it in every
4-bit linear that it does not fuse with others, and passes over it in those that it does.
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
    of_tensor,
    scale_part,
    spread,
    store_codes,
    store_float,
)
from llmopt.formats.scheme import KVCache, Scheme, Schemes

#: `quant_algo` and the scheme it stands for; a group size is said beside it.
ALGORITHMS: Mapping[str, Scheme] = {
    "W4A16_AWQ": Scheme(bits=4, group_size=128, symmetric=True),
    "W8A16": Scheme(bits=8, group_size=-1, symmetric=True),
    "W8A8_SQ_PER_CHANNEL": Scheme(bits=8, group_size=-1, symmetric=True, activations="static"),
    "FP8": Scheme(bits=8, group_size=0, symmetric=True, activations="static", kind="float"),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme(bits=8, group_size=-1, symmetric=True, activations="dynamic", kind="float"),
}
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}  # whose layout it is; loaders look for the name


class ModelOpt:
    name = "modelopt"
    scale_dtype: str | None = "F32"

    def layout(self, shape: tuple[int, int], scheme: Scheme) -> Layout:
        extra: dict[str, Part] = {}
        if scheme.bits == 4:
            extra["pre_quant_scale"] = Part(HALVES, ((shape[1],),))
        if scheme.activations == "static":
            extra["input_scale"] = Part(("F32",), ((),))
        scale = {0: (), -1: (shape[0],)}.get(scheme.group_size, (shape[0], scheme.groups(shape[1])))
        return {**_layout(shape, scheme, ()), "weight_scale": Part(("F32",), (scale,)), **extra}

    def encode(
        self, weight: QuantizedWeight, scheme: Scheme, dtype: str, input_scale: float | None
    ) -> dict[str, Stored]:
        tensors = {"weight_scale": store_float(_stored_scale(weight.scale_OG, scheme), "F32")}
        if input_scale is not None:
            tensors["input_scale"] = store_float(np.array(input_scale, np.float32), "F32")
        if scheme.kind == "float":
            return tensors | {"weight": store_codes(weight.codes_OI)}
        if scheme.bits == 8:
            return tensors | {"weight": Stored("I8", (weight.codes_OI ^ np.uint8(128)).view(np.int8))}
        signed = weight.codes_OI ^ np.uint8(8)
        packed = signed[0::2] | signed[1::2] << np.uint8(4)
        ones = store_float(np.ones(weight.codes_OI.shape[1], np.float32), dtype)
        return tensors | {"weight": Stored("U8", packed), "pre_quant_scale": ones}

    def encode_kv(self, k_scale: float, v_scale: float) -> dict[str, Stored]:
        return {
            "k_proj.k_scale": Stored("F32", np.array(k_scale, np.float32)),
            "v_proj.v_scale": Stored("F32", np.array(v_scale, np.float32)),
        }

    def config(self, schemes: Schemes, *, kv_cache: KVCache = "none") -> dict[str, Any]:
        said = _quantization(schemes, kv_cache)
        config: dict[str, Any] = {
            "quant_method": "modelopt",
            "quant_algo": said["quant_algo"],
            "producer": _PRODUCER,
            "ignore": said.get("exclude_modules", []),
        }
        if said["quant_algo"] == "FP8":
            plain = {"dynamic": False, "num_bits": 8, "type": "float"}
            group = {"input_activations": plain, "weights": dict(plain), "targets": ["Linear"]}
            config["config_groups"] = {"group_0": group}
        if "quantized_layers" in said:
            config["quantized_layers"] = said["quantized_layers"]
        if kv_cache == "fp8":
            config["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
        return config

    def extra_files(self, schemes: Schemes, kv_cache: KVCache = "none") -> Mapping[str, dict[str, Any]]:
        return {"hf_quant_config.json": {"producer": _PRODUCER, "quantization": _quantization(schemes, kv_cache)}}


def _quantization(schemes: Schemes, kv_cache: KVCache) -> dict[str, Any]:
    cache = None if kv_cache == "none" else kv_cache.upper()
    layers = {prefix: _said(scheme) for prefix, scheme in schemes.items() if scheme is not None}
    first, *rest = layers.values()
    if any(other != first for other in rest):
        return {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": cache, "quantized_layers": layers}
    excluded = sorted(prefix for prefix, scheme in schemes.items() if scheme is None)
    return {**first, "kv_cache_quant_algo": cache, "exclude_modules": excluded}


def _said(scheme: Scheme) -> dict[str, Any]:
    if scheme.bits == 4:
        size = scheme.group_size
        return {"quant_algo": "W4A16_AWQ", "group_size": size, "has_zero_point": False, "pre_quant_scale": True}
    return {"quant_algo": next(name for name, other in ALGORITHMS.items() if other == scheme)}


def _stored_scale(scale_OG: np.ndarray, scheme: Scheme) -> np.ndarray:
    if scheme.group_size == 0:
        return of_tensor(scale_OG).reshape(())
    return scale_OG[:, 0] if scheme.group_size == -1 else scale_OG


def read(config: Mapping[str, Any]) -> Reading:
    """The encoding of a checkpoint, of hf_quant_config.json where there is one (the checkpoint has merged it in)."""
    said = config.get("quantization") or config
    cache = said.get("kv_cache_quant_algo") or ("FP8" if config.get("kv_cache_scheme") else None)
    if cache not in (None, "FP8"):
        raise LlmoptError(f"a ModelOpt checkpoint with a KV cache in `{cache}` is not supported", hint="`FP8` is")
    kv_cache: KVCache = "none" if cache is None else "fp8"
    if said.get("quant_algo") == "MIXED_PRECISION":
        layers = {prefix: _scheme(layer) for prefix, layer in said.get("quantized_layers", {}).items()}
        return Reading(None, layers, kv_cache)
    return Reading(_scheme(said), {}, kv_cache)


def _scheme(said: Mapping[str, Any]) -> Scheme:
    name = said.get("quant_algo")
    found = ALGORITHMS.get(str(name))
    if found is None or said.get("has_zero_point"):
        listed = ", ".join(f"`{known}`" for known in ALGORITHMS)
        raise LlmoptError(f"the ModelOpt algorithm `{name}` is not supported", hint=f"{listed}, without zero points")
    if found.bits == 8:
        return found
    return Scheme(bits=4, group_size=int(said.get("group_size") or found.group_size), symmetric=True)


@dataclass(frozen=True, slots=True)
class Reading:
    default: Scheme | None
    layers: Mapping[str, Scheme]
    kv_cache: KVCache

    def scheme(self, prefix: str) -> Scheme | None:
        return self.layers.get(prefix, self.default)

    def layout(self, shape: tuple[int, int], scheme: Scheme, present: Collection[str]) -> Layout:
        return _layout(shape, scheme, present)

    def grid(self, tensors: Tensors, shape: tuple[int, int], scheme: Scheme) -> Grid:
        smooth_I = tensors.get("pre_quant_scale")
        return Grid(
            scale_OG=spread(tensors["weight_scale"], shape, scheme),
            smooth_I=None if smooth_I is None or (smooth_I == 1).all() else smooth_I,
        )

    def codes(self, tensors: Tensors, shape: tuple[int, int], scheme: Scheme) -> np.ndarray:
        stored = tensors["weight"].view(np.uint8)
        if scheme.kind == "float":
            return stored
        if scheme.bits == 8:
            return stored ^ np.uint8(128)
        codes_OI = np.empty(shape, np.uint8)
        codes_OI[0::2], codes_OI[1::2] = stored & np.uint8(15), stored >> np.uint8(4)
        return codes_OI ^ np.uint8(8)


def _layout(shape: tuple[int, int], scheme: Scheme, present: Collection[str]) -> Layout:
    out_features, in_features = shape
    if scheme.bits == 4 and out_features % 2:
        raise LlmoptError(
            f"the format `modelopt` cannot hold 4-bit weights of {out_features} out-features",
            hint="they must be an even number; use the format `compressed-tensors`",
        )
    weight = Part(("F8_E4M3",), (shape,)) if scheme.kind == "float" else Part(("I8",), (shape,))
    if scheme.bits == 4:
        weight = Part(("U8", "I8"), ((out_features // 2, in_features),))
    layout = {"weight": weight, "weight_scale": scale_part(shape, scheme)}
    if "pre_quant_scale" in present:
        layout["pre_quant_scale"] = Part(HALVES, ((in_features,),))
    return layout
