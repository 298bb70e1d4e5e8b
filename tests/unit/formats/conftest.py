"""Checkpoints of a tiny Llama in every format, rounded to nearest, and what they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llmopt.formats.base import QuantizedWeight, exact_scale
from llmopt.formats.dequantized import to_torch
from llmopt.formats.reading import get_format, linears, open_model
from llmopt.formats.scheme import KVCache, Scheme
from llmopt.models.checkpoint import Checkpoint
from llmopt.models.config import DecoderConfig

INPUT_SCALE = 0.0625
KV_SCALES = (0.03125, 0.125)

Rounded = Callable[[np.ndarray, Scheme], QuantizedWeight]
Encoded = Callable[..., Path]


@pytest.fixture(scope="session")
def rounded() -> Rounded:
    """rounded(weight_OI, scheme): to nearest; asymmetric zero points lie off the middle."""
    return _rounded


def _rounded(weight_OI: np.ndarray, scheme: Scheme) -> QuantizedWeight:
    rows, columns = weight_OI.shape
    grouped = weight_OI.reshape(rows, scheme.groups(columns), -1)
    top, middle = (1 << scheme.bits) - 1, 1 << (scheme.bits - 1)
    zero = None
    if scheme.kind == "float":
        largest = np.abs(grouped).max(axis=2)
        scale = exact_scale((largest if scheme.group_size else np.full_like(largest, largest.max())) / 448)
        steps = torch.from_numpy(grouped / scale[:, :, None]).clamp(-448, 448)
        codes = steps.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    elif scheme.symmetric:
        scale = exact_scale(np.abs(grouped).max(axis=2) / middle)
        codes = (np.rint(grouped / scale[:, :, None]) + middle).clip(0, top).astype(np.uint8)
    else:
        low, high = np.minimum(grouped.min(axis=2), 0), np.maximum(grouped.max(axis=2), 0)
        scale = exact_scale((high - low) / np.float32(top))
        zero = np.rint(-low / scale).clip(0, top).astype(np.uint8)
        codes = (np.rint(grouped / scale[:, :, None]) + zero[:, :, None]).clip(0, top).astype(np.uint8)
    return QuantizedWeight(
        codes_OI=codes.reshape(weight_OI.shape), scale_OG=scale, zero_OG=zero, bits=scheme.bits, kind=scheme.kind
    )


@pytest.fixture(scope="session")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    """encoded(plain, format, scheme_of, kv_cache="none") -> folder; scheme_of(prefix) is None for a plain linear."""

    def make(plain: Path, name: str, scheme_of: Callable[[str], Scheme | None], *, kv_cache: KVCache = "none") -> Path:
        out = tmp_path_factory.mktemp(name)
        shutil.copytree(plain, out, dirs_exist_ok=True)
        checkpoint, form = Checkpoint.open(plain), get_format(name)
        config = DecoderConfig.read(checkpoint)
        schemes = {prefix: scheme_of(prefix) for prefix in linears(config)}
        schemes.setdefault(config.family.head, None)
        tensors = {each: checkpoint.tensor(each) for each in checkpoint.tensors}
        for prefix, scheme in schemes.items():
            if scheme is not None:
                weight = _rounded(checkpoint.float_array(f"{prefix}.weight"), scheme)
                del tensors[f"{prefix}.weight"]
                scale = INPUT_SCALE if scheme.activations == "static" else None
                for suffix, stored in form.encode(weight, scheme, config.dtype, scale).items():
                    tensors[f"{prefix}.{suffix}"] = to_torch(stored)
        if kv_cache != "none":
            for index in range(config.layers):
                for suffix, stored in form.encode_kv(*KV_SCALES).items():
                    tensors[f"{config.block(index)}.self_attn.{suffix}"] = to_torch(stored)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        values = dict(checkpoint.config) | {"quantization_config": form.config(schemes, kv_cache=kv_cache)}
        (out / "config.json").write_text(json.dumps(values))
        for file, content in form.extra_files(schemes, kv_cache).items():
            (out / file).write_text(json.dumps(content))
        return out

    return make


@pytest.fixture(scope="session")
def dequantized() -> Callable[[Path], dict[str, np.ndarray]]:
    """The float32 weight of every quantized linear of a checkpoint, by its prefix."""

    def read(folder: Path) -> dict[str, np.ndarray]:
        source = open_model(folder)
        assert source.reader is not None
        weights = {prefix: source.reader.linear(prefix, shape) for prefix, shape in linears(source.config).items()}
        return {prefix: weight.dequantize() for prefix, weight in weights.items() if weight is not None}

    return read


@pytest.fixture(scope="session")
def twin(dequantized: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, Path], Path]:
    """twin(plain, quantized): a plain float32 checkpoint with the weights that `quantized` stands for."""

    def make(plain: Path, quantized: Path) -> Path:
        out = tmp_path_factory.mktemp("twin")
        checkpoint, weights = Checkpoint.open(plain), dequantized(quantized)
        tensors = {name: checkpoint.tensor(name).float() for name in checkpoint.tensors}
        tensors |= {f"{prefix}.weight": torch.from_numpy(weight.copy()) for prefix, weight in weights.items()}
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        shutil.copyfile(plain / "config.json", out / "config.json")
        return out

    return make
