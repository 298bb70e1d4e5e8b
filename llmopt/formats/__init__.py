"""Quantized tensors on disk: the same integers in the encodings that runtimes read."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from llmopt.errors import LlmoptError, SettingsError, nearest
from llmopt.formats.base import Format, QuantizedReader
from llmopt.models.checkpoint import Checkpoint

#: By the name a user gives, which is also `quant_method` in config.json.
FORMATS: Mapping[str, str] = {
    "compressed-tensors": "llmopt.formats.compressed:CompressedTensors",
    "gptq": "llmopt.formats.gptq_v1:GPTQv1",
    "awq": "llmopt.formats.awq_gemm:AWQGemm",
}


def get_format(name: str) -> Format:
    if name not in FORMATS:
        raise SettingsError(f"unknown format `{name}`", hint=nearest(name, FORMATS))
    module, attribute = FORMATS[name].split(":")
    found: Format = getattr(importlib.import_module(module), attribute)()
    return found


def open_quantized(checkpoint: Checkpoint) -> QuantizedReader | None:
    """A reader of the checkpoint's quantized linears, None for a plain checkpoint; reads only headers.

    Raises LlmoptError when the encoding is not one of ours.
    """
    config = checkpoint.config.get("quantization_config")
    if config is None:
        return None
    method = config.get("quant_method")
    if method not in FORMATS:
        raise LlmoptError(
            f"the checkpoint is quantized as `{method}`, which is not supported", hint=nearest(str(method), FORMATS)
        )
    found = get_format(method)
    return QuantizedReader(checkpoint, found, found.scheme(config))
