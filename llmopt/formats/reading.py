"""Open a checkpoint, plain or quantized in any format that we know."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from llmopt.errors import LlmoptError, SettingsError, nearest
from llmopt.formats.base import Format, QuantizedReader
from llmopt.formats.scheme import FORMATS
from llmopt.models.checkpoint import Checkpoint
from llmopt.models.config import DecoderConfig


def get_format(name: str) -> Format:
    if name not in FORMATS:
        raise SettingsError(f"unknown format `{name}`", hint=nearest(name, FORMATS))
    module, attribute = FORMATS[name].implementation.split(":")
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


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that a stage can read: its sizes, and a reader of its integers where it is quantized."""

    checkpoint: Checkpoint
    config: DecoderConfig
    reader: QuantizedReader | None


def open_model(path: Path) -> Source:
    """Open a plain or quantized checkpoint and check from its headers that every tensor is there and fits."""
    checkpoint = Checkpoint.open(path)
    config, reader = DecoderConfig.read(checkpoint), open_quantized(checkpoint)
    if reader is not None:
        for index in range(config.layers):
            for linear, shape in config.linear_shapes(index).items():
                reader.check(f"{config.block(index)}.{linear}", shape)
        if not config.tie_embeddings:
            reader.check(config.family.head, (config.vocab_size, config.hidden_size))
    return Source(checkpoint, config, reader)
