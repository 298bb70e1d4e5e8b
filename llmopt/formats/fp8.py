"""The encoding that vLLM and transformers call `fp8`: E4M3 weights with a scale a tensor, or one a block of 128 x 128.

Source: deepseek-ai/DeepSeek-V3 (`weight_scale_inv`, which is the factor to multiply by) and neuralmagic/AutoFP8
(`weight_scale`, `input_scale`). Read only: what we write as FP8 is compressed-tensors or modelopt.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmopt.errors import LlmoptError
from llmopt.formats.base import Grid, Layout, Part, Tensors, scale_part, spread
from llmopt.formats.scheme import KVCache, Scheme


def read(config: Mapping[str, Any]) -> Reading:
    """The encoding of a checkpoint by any tool; raises LlmoptError naming what is not supported."""
    block, inputs = config.get("weight_block_size"), config.get("activation_scheme", "dynamic")
    if block is not None and (list(block) != [128, 128] or inputs != "dynamic"):
        raise LlmoptError(
            f"FP8 weights in blocks of `{block}` with `{inputs}` activations are not supported",
            hint="blocks of 128 x 128 with dynamic activations are",
        )
    if inputs not in ("dynamic", "static") or config.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise LlmoptError(f"FP8 `{config.get('fmt', 'e4m3')}` with `{inputs}` activations is not supported")
    size = 0 if block is None else 128
    return Reading(Scheme(bits=8, group_size=size, symmetric=True, activations=inputs, kind="float"))


@dataclass(frozen=True, slots=True)
class Reading:
    quantized: Scheme
    kv_cache: KVCache = "none"

    def scheme(self, prefix: str) -> Scheme | None:
        return self.quantized

    def layout(self, shape: tuple[int, int], scheme: Scheme, present: Collection[str]) -> Layout:
        name = "weight_scale_inv" if "weight_scale_inv" in present else "weight_scale"
        return {"weight": Part(("F8_E4M3",), (shape,)), name: scale_part(shape, scheme)}

    def grid(self, tensors: Tensors, shape: tuple[int, int], scheme: Scheme) -> Grid:
        scale = tensors["weight_scale_inv"] if "weight_scale_inv" in tensors else tensors["weight_scale"]
        return Grid(scale_OG=spread(scale, shape, scheme))

    def codes(self, tensors: Tensors, shape: tuple[int, int], scheme: Scheme) -> np.ndarray:
        return tensors["weight"]
