"""Blocks of any checkpoint compute with the weights, and round the inputs, that the checkpoint says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmopt import evaluate
from llmopt.artifacts.outcome import silent
from llmopt.formats.dequantized import load_block
from llmopt.formats.reading import open_model
from llmopt.formats.scheme import Scheme

W4 = Scheme(bits=4, group_size=32, symmetric=True)
W8A8 = Scheme(bits=8, group_size=-1, symmetric=True, activations="static")
FP8 = Scheme(bits=8, group_size=-1, symmetric=True, activations="dynamic", kind="float")
INPUT_SCALE = 0.0625  # of static activations, in conftest.py


def test_each_linear_rounds_its_own_input(make_checkpoint: Any, encoded: Any, dequantized: Any) -> None:
    kinds = {"down_proj": W8A8, "up_proj": FP8, "o_proj": None}
    folder = encoded(make_checkpoint("llama"), "compressed-tensors", lambda p: kinds.get(p.rsplit(".", 1)[-1], W4))
    source, weights = open_model(folder), dequantized(folder)
    block = load_block(source.checkpoint, source.config, source.reader, 1)
    for name in ("mlp.down_proj", "mlp.up_proj", "self_attn.q_proj"):
        expected = torch.from_numpy(weights[f"model.layers.1.{name}"].copy())
        assert torch.equal(block.tensors[f"{name}.weight"], expected)
    assert set(block.input_transform) == {"mlp.down_proj", "mlp.up_proj"}
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    eighths = block.input_transform["mlp.down_proj"](x.clone()) / INPUT_SCALE
    assert torch.equal(eighths, eighths.round())
    assert len(block.input_transform["mlp.up_proj"](x.clone()).unique()) > len(eighths.unique())


def test_an_input_is_multiplied_before_it_is_rounded(make_checkpoint: Any, encoded: Any) -> None:
    """ModelOpt's SmoothQuant; the weight stays without the scale then."""
    folder = encoded(make_checkpoint("llama"), "modelopt", lambda prefix: None if prefix == "lm_head" else W8A8)
    name = "model.layers.0.mlp.down_proj"
    tensors = load_file(folder / "model.safetensors")
    before = open_model(folder)
    weight = load_block(before.checkpoint, before.config, before.reader, 0).tensors["mlp.down_proj.weight"]
    smooth = torch.arange(1, 257).bfloat16() / 64
    save_file(tensors | {f"{name}.pre_quant_scale": smooth}, folder / "model.safetensors")
    source = open_model(folder)
    block = load_block(source.checkpoint, source.config, source.reader, 0)
    assert torch.equal(block.tensors["mlp.down_proj.weight"], weight)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    expected = (x * smooth.float() / INPUT_SCALE).round().clamp(-128, 127) * INPUT_SCALE
    assert torch.equal(block.input_transform["mlp.down_proj"](x.clone()), expected)


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "awq", "modelopt"])
def test_a_model_evaluates_as_its_dequantized_twin(
    make_checkpoint: Any, encoded: Any, twin: Any, text: Path, tmp_path: Path, name: str
) -> None:
    """With what other tools have besides: scattered columns in GPTQ, scaled inputs in ModelOpt."""
    plain = make_checkpoint("llama")
    mixed = {"down_proj": replace(W4, bits=8), "up_proj": replace(W4, symmetric=False), "lm_head": None, "o_proj": None}
    one = {"lm_head": None}
    kinds = mixed if name == "compressed-tensors" else one
    folder = encoded(plain, name, lambda prefix: kinds.get(prefix.rsplit(".", 1)[-1], W4))
    tensors = load_file(folder / "model.safetensors")
    for each, tensor in tensors.items():
        if each.endswith("g_idx"):
            tensors[each] = tensor.flip(0).contiguous()
        elif each.endswith("pre_quant_scale"):
            tensors[each] = tensor * torch.linspace(0.5, 2, len(tensor)).bfloat16()
    save_file(tensors, folder / "model.safetensors")
    settings = evaluate.resolve({"windows": 2, "seq_len": 32})
    twin_folder = twin(plain, folder)
    (twin_folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    evaluate.check(folder, twin_folder, text, settings)
    outcome = evaluate.evaluate(folder, twin_folder, text, settings, tmp_path, silent)
    assert outcome.metrics["kl_mean"] == 0
    assert json.loads((tmp_path / "eval.json").read_text())["top1_agreement"] == 1
