"""Open a checkpoint, plain or quantized in any format that we know."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from llmopt.errors import LlmoptError, SettingsError, nearest
from llmopt.formats.base import Encoding, Format, QuantizedReader
from llmopt.formats.scheme import FORMATS, READERS, Scheme, Schemes
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

    Raises LlmoptError when the encoding is none that we read.
    """
    config = checkpoint.config.get("quantization_config")
    if config is None:
        return None
    method = str(config.get("quant_method"))
    if method not in READERS:
        known = ", ".join(f"`{name}`" for name in READERS)
        raise LlmoptError(f"the checkpoint is quantized as `{method}`, which is not supported", hint=f"{known} are")
    module, attribute = READERS[method].split(":")
    encoding: Encoding = getattr(importlib.import_module(module), attribute)(config)
    return QuantizedReader(checkpoint, encoding)


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that a stage can read: its sizes, and a reader of its codes where it is quantized."""

    checkpoint: Checkpoint
    config: DecoderConfig
    reader: QuantizedReader | None


def open_model(path: Path) -> Source:
    """Open a plain or quantized checkpoint and check from its headers that every tensor is there and fits."""
    checkpoint = Checkpoint.open(path)
    config, reader = DecoderConfig.read(checkpoint), open_quantized(checkpoint)
    if reader is not None:
        for prefix, shape in linears(config).items():
            reader.check(prefix, shape)
    return Source(checkpoint, config, reader)


def linears(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """(O, I) of every linear that can be quantized, by its full prefix: those of the blocks, and an untied head."""
    found = {
        f"{config.block(index)}.{linear}": shape
        for index in range(config.layers)
        for linear, shape in config.linear_shapes(index).items()
    }
    return found if config.tie_embeddings else found | {config.family.head: (config.vocab_size, config.hidden_size)}


def all_modules(config: DecoderConfig, schemes: Schemes) -> dict[str, Scheme | None]:
    """`schemes` with every other linear module that there is: an output head that is tied, routers.

    The head goes by two names where the one on disk is not that of the module.
    """
    head = schemes.get(config.family.head)
    plain = {
        f"{config.block(index)}.{name}": None for index in range(config.layers) for name in config.plain_linears(index)
    }
    return {**schemes, **plain, config.family.head: head, "lm_head": head}
