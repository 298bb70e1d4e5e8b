"""Decoder blocks of any checkpoint in float32: plain weights as they are, quantized ones dequantized."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from llmopt.formats.base import QuantizedReader, QuantizedWeight, Stored
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
        transform = input_transform(reader, f"{prefix}.{linear}", weight)
        if transform is not None:
            block.input_transform[linear] = transform
            weight = replace(weight, smooth_I=None)
        block.tensors[name] = torch.from_numpy(weight.dequantize())
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


def input_transform(reader: QuantizedReader, prefix: str, weight: QuantizedWeight) -> InputTransform | None:
    """What happens to the input of a quantized linear first, None where its activations stay as they are."""
    scheme = reader.scheme(prefix)
    if scheme is None or scheme.activations == "none":
        return None
    scale = reader.input_scale(prefix)
    rounding = int8_input(scale) if scheme.kind == "int" else fp8_input(scale, max(scheme.group_size, 0))
    if weight.smooth_I is None:
        return rounding
    smooth_I = torch.from_numpy(weight.smooth_I)
    return lambda x: rounding(x * smooth_I)


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


def fp8_input(scale: float | None, group_size: int = 0) -> InputTransform:
    """Round an input to FP8 E4M3 and back: per token where `scale` is None, else by the one static scale.

    `group_size` in-features of a token share a scale, 0: all of them. What is beyond 448 steps becomes 448 of them.
    """

    def per_token(x: torch.Tensor) -> torch.Tensor:
        grouped = x.reshape(*x.shape[:-1], -1, group_size or x.shape[-1])
        step = grouped.abs().amax(dim=-1, keepdim=True).div_(448).clamp_(min=1e-10)
        return _to_fp8(grouped / step).mul_(step).reshape(x.shape)

    def per_tensor(x: torch.Tensor) -> torch.Tensor:
        assert scale is not None
        return _to_fp8(x / scale).mul_(scale)

    return per_token if scale is None else per_tensor


def _to_fp8(x: torch.Tensor) -> torch.Tensor:
    """The nearest E4M3 values, as float32. Without the clamp, what is too large would be NaN."""
    return x.clamp_(-448, 448).to(torch.float8_e4m3fn).float()


def to_torch(stored: Stored) -> torch.Tensor:
    """A tensor for safetensors from the bits of an encoding."""
    tensor = torch.from_numpy(np.require(stored.array, requirements="W"))  # a memory map is read-only
    bits = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}.get(stored.dtype)
    return tensor if bits is None else tensor.view(bits)
