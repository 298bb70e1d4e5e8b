"""Decoder blocks of any checkpoint in float32: plain weights as they are, quantized ones dequantized."""

from __future__ import annotations

import torch

from llmopt.formats.base import QuantizedReader
from llmopt.models.checkpoint import Checkpoint
from llmopt.models.config import DecoderConfig
from llmopt.models.decoder import DecoderBlock, InputTransform


def load_block(
    checkpoint: Checkpoint, config: DecoderConfig, reader: QuantizedReader | None, index: int
) -> DecoderBlock:
    """One block in float32; where activations are quantized, inputs are rounded as the checkpoint says."""
    prefix = config.block(index)
    block = DecoderBlock(config, index, {})
    shapes = config.linear_shapes(index)
    for name in config.block_shapes(index):
        linear = name.removesuffix(".weight")
        weight = None
        if reader is not None and linear in shapes:
            weight = reader.linear(f"{prefix}.{linear}", shapes[linear])
        if weight is None or reader is None:
            block.tensors[name] = load_float(checkpoint, f"{prefix}.{name}")
            continue
        block.tensors[name] = torch.from_numpy(weight.dequantize())
        if reader.activations != "none":
            block.input_transform[linear] = int8_input(reader.input_scale(f"{prefix}.{linear}"))
    return block


def load_head(checkpoint: Checkpoint, config: DecoderConfig, reader: QuantizedReader | None) -> torch.Tensor:
    """lm_head's weight, float32 [V, H]; the embedding where the two are tied."""
    family = config.family
    if config.tie_embeddings:
        return load_float(checkpoint, f"{family.embedding}.weight")
    shape = (config.vocab_size, config.hidden_size)
    weight = None if reader is None else reader.linear(family.head, shape)
    if weight is None:
        return load_float(checkpoint, f"{family.head}.weight")
    return torch.from_numpy(weight.dequantize())


def load_float(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    return torch.from_numpy(checkpoint.float_array(name))


def int8_input(scale: float | None) -> InputTransform:
    """Round an input to int8 and back: per token where `scale` is None, else by the one static scale.

    The range is [-128, 127] steps of amax / 127.5, as compressed-tensors has it.
    """

    def per_token(x: torch.Tensor) -> torch.Tensor:
        step = x.abs().amax(dim=-1, keepdim=True).div_(127.5).clamp_(min=1e-10)
        return (x / step).round_().clamp_(-128, 127).mul_(step)

    def per_tensor(x: torch.Tensor) -> torch.Tensor:
        assert scale is not None
        return (x / scale).round_().clamp_(-128, 127).mul_(scale)

    return per_token if scale is None else per_tensor
