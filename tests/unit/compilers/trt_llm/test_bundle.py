"""A bundle is the same weights in a form that `trtllm-serve` loads, or a refusal with the way out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch_file

from llmopt.artifacts.outcome import silent
from llmopt.compilers.trt_llm import bundle
from llmopt.compilers.trt_llm.settings import Settings
from llmopt.compilers.trt_llm.validate import validate
from llmopt.errors import LlmoptError, SettingsError
from llmopt.formats.reading import linears, open_model
from llmopt.formats.scheme import Scheme

W4 = Scheme(bits=4, group_size=32, symmetric=True)
W8 = Scheme(bits=8, group_size=-1, symmetric=True)
FP8 = Scheme(bits=8, group_size=0, symmetric=True, activations="static", kind="float")
FP8_ROWS = replace(FP8, group_size=-1, activations="dynamic")
BUNDLE = Settings(mode="bundle")


def written(model: Path, out: Path, settings: Settings = BUNDLE) -> Path:
    out.mkdir()
    bundle.check(model, settings)
    assert bundle.write(model, out, settings, silent) == ()
    return out


def dequantized(model: Path) -> dict[str, np.ndarray]:
    source = open_model(model)
    assert source.reader is not None
    found = {prefix: source.reader.linear(prefix, shape) for prefix, shape in linears(source.config).items()}
    return {prefix: weight.dequantize() for prefix, weight in found.items() if weight is not None}


def test_a_plain_checkpoint_stays_as_it_is(make_checkpoint: Any, tmp_path: Path) -> None:
    model = make_checkpoint("llama")
    out = written(model, tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert not (out / "hf_quant_config.json").exists()


@pytest.mark.parametrize(
    ("scheme", "format"),
    [
        (W4, "compressed-tensors"),
        (W4, "gptq"),
        (W4, "awq"),
        (W8, "compressed-tensors"),
        (W8, "gptq"),
        (FP8, "compressed-tensors"),
        (FP8_ROWS, "compressed-tensors"),
        (FP8_ROWS, "modelopt"),
    ],
    ids=str,
)
def test_every_format_gives_the_same_weights(
    make_checkpoint: Any, quantize: Any, tmp_path: Path, scheme: Scheme, format: str
) -> None:
    model = quantize(make_checkpoint("llama"), scheme, format)
    out = written(model, tmp_path / "out")
    before, after = dequantized(model), dequantized(out)
    assert len(after) == 14
    assert all(np.array_equal(before[prefix], after[prefix]) for prefix in before)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "modelopt"
    assert "quant_algo" in json.loads((out / "hf_quant_config.json").read_text())["quantization"]


def test_four_bits_of_modelopt_get_the_ones_that_tensorrt_llm_asks_for(
    make_checkpoint: Any, quantize: Any, tmp_path: Path
) -> None:
    """ModelOpt leaves `pre_quant_scale` out where it has none; TensorRT-LLM ends with a KeyError without it."""
    model = written(quantize(make_checkpoint("llama"), W4), tmp_path / "model")
    tensors = {}
    for file in model.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (model / "model.safetensors.index.json").unlink()
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("pre_quant_scale")}
    save_torch_file(kept, model / "model.safetensors", metadata={"format": "pt"})
    out = written(model, tmp_path / "out")
    found = {name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert found == tensors.keys()
    assert all(np.array_equal(weight, dequantized(out)[prefix]) for prefix, weight in dequantized(model).items())


def test_mixed_algorithms_are_listed_where_older_versions_look(
    make_checkpoint: Any, quantize: Any, tmp_path: Path
) -> None:
    model = quantize(make_checkpoint("llama"), lambda prefix: FP8 if "mlp" in prefix else W8, "modelopt")
    out = written(model, tmp_path / "out")
    said = json.loads((out / "quant_cfg.json").read_text())
    assert said["quant_algo"] == "MIXED_PRECISION"
    assert said["quantized_layers"]["model.layers.0.mlp.up_proj"]["quant_algo"] == "FP8"
    assert said["quantized_layers"]["model.layers.0.self_attn.q_proj"]["quant_algo"] == "W8A16"


@pytest.fixture
def blocks(make_checkpoint: Any, tmp_path: Path) -> Path:
    """FP8 in blocks of 128 x 128, as DeepSeek and Qwen publish it."""
    model = tmp_path / "blocks"
    plain = make_checkpoint("llama", hidden_size=256, intermediate_size=512, head_dim=64)
    shutil.copytree(plain, model)
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if ".layers." in name and tensors[name].dim() == 2]:
        rows, columns = tensors[name].shape
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand(rows // 128, columns // 128) + 0.5
    save_torch_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((model / "config.json").read_text())
    said["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    said["quantization_config"]["weight_block_size"] = [128, 128]
    (model / "config.json").write_text(json.dumps(said))
    return model


def test_fp8_in_blocks_is_loaded_as_it_is(blocks: Path, tmp_path: Path) -> None:
    out = written(blocks, tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (blocks / "model.safetensors").read_bytes()
    assert bundle.algorithm(open_model(blocks)) == "FP8_BLOCK_SCALES"
    assert validate(out).tensors == len(load_file(out / "model.safetensors"))


def test_blocks_that_ranks_would_split_are_refused(blocks: Path) -> None:
    with pytest.raises(LlmoptError, match="k_proj` has 64 out-features on each of 2 GPUs, which groups of 128"):
        bundle.check(blocks, replace(BUNDLE, tensor_parallel=2))


def test_that_scales_of_the_kv_cache_stay_unused_is_told(make_checkpoint: Any, quantize: Any, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(quantize(make_checkpoint("llama"), FP8, "modelopt"), model)
    tensors = load_file(model / "model.safetensors")
    for index in range(2):
        tensors |= {f"model.layers.{index}.self_attn.{each}_proj.{each}_scale": torch.tensor(0.5) for each in "kv"}
    save_torch_file(tensors, model / "model.safetensors")
    said = json.loads((model / "config.json").read_text())
    said["quantization_config"]["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    (model / "config.json").write_text(json.dumps(said))
    with pytest.raises(SettingsError, match=r"`compile\.kv_cache` cannot be `none`"):
        bundle.check(model, replace(BUNDLE, kv_cache="none"))
    out = tmp_path / "out"
    out.mkdir()
    events = bundle.write(model, out, BUNDLE, silent)
    assert len(events) == 1
    assert "a scale of 1" in events[0]
    assert any(name.endswith("k_scale") for file in out.glob("*.safetensors") for name in load_file(file))


def test_a_stray_weight_file_is_left_behind(make_checkpoint: Any, tmp_path: Path) -> None:
    """TensorRT-LLM loads every *.safetensors of the folder, the last one to name a tensor wins."""
    model = tmp_path / "model"
    shutil.copytree(make_checkpoint("llama"), model)
    save_file({"model.norm.weight": np.zeros(64, np.float16)}, model / "other.safetensors")
    assert {file.name for file in written(model, tmp_path / "out").glob("*.safetensors")} == {"model.safetensors"}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500000.0},
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_the_rotary_base_is_said_as_transformers_4_reads_it(
    make_checkpoint: Any, tmp_path: Path, rope: dict[str, Any]
) -> None:
    from transformers import AutoConfig

    model = make_checkpoint("llama", rope_parameters=rope)
    out = written(model, tmp_path / "out")
    said = json.loads((out / "config.json").read_text())
    assert said["rope_theta"] == 500000.0
    assert (said.get("rope_scaling") or {}).get("factor") == rope.get("factor")
    assert said["torch_dtype"] == "bfloat16"
    assert AutoConfig.from_pretrained(out).rope_parameters == AutoConfig.from_pretrained(model).rope_parameters
    assert open_model(out).config.rope == open_model(model).config.rope


def test_the_local_rotary_base_of_gemma_3_is_said_too(make_checkpoint: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig

    model = make_checkpoint("gemma3_text", sliding_window=20, num_hidden_layers=6)
    out = written(model, tmp_path / "out")
    said, before = json.loads((out / "config.json").read_text()), AutoConfig.from_pretrained(model).rope_parameters
    assert said["rope_theta"] == before["full_attention"]["rope_theta"]
    assert said["rope_local_base_freq"] == before["sliding_attention"]["rope_theta"]
    assert AutoConfig.from_pretrained(out).rope_parameters == before


@pytest.mark.parametrize(
    ("scheme", "format", "message"),
    [
        (replace(W4, symmetric=False), "compressed-tensors", "cannot hold zero points"),
        (replace(W8, activations="static"), "modelopt", "`W8A8_SQ_PER_CHANNEL`, which TensorRT-LLM loads in engine"),
        (replace(W8, activations="dynamic"), "compressed-tensors", "cannot hold quantized activations"),
        (replace(W4, bits=3), "gptq", "cannot hold 3-bit weights"),
    ],
    ids=str,
)
def test_what_has_no_kernel_is_refused(
    make_checkpoint: Any, quantize: Any, scheme: Scheme, format: str, message: str
) -> None:
    model = quantize(make_checkpoint("llama"), scheme, format)
    with pytest.raises(LlmoptError, match=message) as caught:
        bundle.check(model, BUNDLE)
    assert caught.value.hint


def test_experts_in_four_bits_are_refused(make_checkpoint: Any, quantize: Any) -> None:
    plain = make_checkpoint("mixtral", num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(LlmoptError, match="no kernel for in experts"):
        bundle.check(quantize(plain, W4), BUNDLE)
    bundle.check(quantize(plain, FP8), BUNDLE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel": 3}, "4 attention heads cannot be split over 3"),
        ({"tensor_parallel": 4}, "24 in-features on each of 4 GPUs, which groups of 32"),
        ({"pipeline_parallel": 3}, "2 blocks cannot be split over 3"),
    ],
)
def test_sizes_that_parallelism_does_not_divide_are_refused(
    make_checkpoint: Any, quantize: Any, settings: dict[str, int], message: str
) -> None:
    model = quantize(make_checkpoint("llama"), W4)
    with pytest.raises(LlmoptError, match=message):
        bundle.check(model, replace(BUNDLE, **settings))


def test_fewer_kv_heads_than_gpus_are_repeated(make_checkpoint: Any) -> None:
    bundle.check(make_checkpoint("llama"), replace(BUNDLE, tensor_parallel=4))
    with pytest.raises(LlmoptError, match="3 KV heads can neither be split over 2 GPUs nor repeated"):
        bundle.check(
            make_checkpoint("llama", hidden_size=96, num_attention_heads=6, num_key_value_heads=3),
            replace(BUNDLE, tensor_parallel=2),
        )


def test_a_model_without_an_implementation_is_refused(make_checkpoint: Any) -> None:
    with pytest.raises(LlmoptError, match="no model of the type `gemma2`"):
        bundle.check(make_checkpoint("gemma2", sliding_window=20), BUNDLE)


def test_a_missing_tokenizer_is_told(make_checkpoint: Any, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(make_checkpoint("llama"), model)
    (model / "tokenizer.json").unlink()
    with pytest.raises(LlmoptError, match="no tokenizer in"):
        bundle.check(model, BUNDLE)


def test_a_dtype_that_it_would_not_get_is_refused(make_checkpoint: Any) -> None:
    with pytest.raises(SettingsError, match="cannot be `float16`"):
        bundle.check(make_checkpoint("llama"), replace(BUNDLE, dtype="float16"))
    with pytest.raises(LlmoptError, match="`F32` is none that TensorRT-LLM computes in"):
        bundle.check(make_checkpoint("llama", "float32"), BUNDLE)
