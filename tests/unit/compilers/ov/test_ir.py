"""The graph computes what transformers computes, and its constants are the checkpoint's integers."""

from __future__ import annotations

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmopt.formats.scheme import Scheme

PROMPT = [5, 17, 300, 42, 99, 7, 8, 250, 1, 2, 3]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
PLAIN = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama without grouped queries": ("llama", {"num_key_value_heads": 4}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "linear rope": ("llama", {"rope_parameters": LINEAR}),
    "llama in float16": ("llama", {"dtype": "float16"}),
    "llama in float32": ("llama", {"dtype": "float32"}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
}
W4 = Scheme(bits=4, group_size=32, symmetric=True)
W4_ASYMMETRIC = Scheme(bits=4, group_size=32, symmetric=False)
W8A8_DYNAMIC = Scheme(bits=8, group_size=-1, symmetric=True, activations="dynamic")
FP8 = Scheme(bits=8, group_size=-1, symmetric=True, kind="float")
W8A8_STATIC = Scheme(bits=8, group_size=-1, symmetric=True, activations="static")


@pytest.mark.parametrize("case", PLAIN)
def test_exact_engine_says_what_transformers_says(
    case: str, make_checkpoint: Any, compiled: Any, engine: Any, reference: Any, batched_greedy: Any
) -> None:
    model_type, config = PLAIN[case]
    model = make_checkpoint(model_type, **config)
    folder, expected = compiled(model), reference(model)
    assert expected.error(engine(folder)(PROMPT), PROMPT) < 1e-5
    tokens = expected.greedy(PROMPT, 64)
    assert engine(folder).greedy(PROMPT, 64) == tokens
    assert batched_greedy(folder, [PROMPT, PROMPT[:4]], 64) == [tokens, expected.greedy(PROMPT[:4], 64)]


@pytest.mark.parametrize("scheme", [W4, W4_ASYMMETRIC, W8A8_DYNAMIC], ids=str)
def test_exact_engine_of_a_quantized_model_says_what_transformers_says_on_the_dequantized_weights(
    scheme: Scheme,
    make_checkpoint: Any,
    quantize: Any,
    compiled: Any,
    engine: Any,
    reference: Any,
    batched_greedy: Any,
) -> None:
    plain = make_checkpoint("llama", tie_word_embeddings=True)
    quantized = quantize(plain, scheme)
    folder, expected = compiled(quantized), reference(plain, quantized)
    assert expected.error(engine(folder)(PROMPT), PROMPT) < 1e-5
    tokens = expected.greedy(PROMPT, 64)
    assert engine(folder).greedy(PROMPT, 64) == tokens
    assert batched_greedy(folder, [PROMPT], 64) == [tokens]


def mixture(prefix: str) -> Scheme | None:
    """Four kinds of linears, and plain ones."""
    kinds = {"down_proj": replace(W4, bits=8), "o_proj": None, "up_proj": W4_ASYMMETRIC, "v_proj": FP8}
    return kinds.get(prefix.rsplit(".", 1)[-1], W4)


@pytest.mark.parametrize("scheme", [mixture, FP8, replace(FP8, group_size=0, activations="static")])
def test_exact_engine_of_mixed_precision_and_of_fp8(
    scheme: Any, make_checkpoint: Any, quantize: Any, compiled: Any, engine: Any, reference: Any, batched_greedy: Any
) -> None:
    """FP8 inputs stay as they are: the CPU has no arithmetic in FP8."""
    plain = make_checkpoint("llama")
    quantized = quantize(plain, scheme, head=True)
    folder, expected = compiled(quantized), reference(plain, quantized)
    assert expected.error(engine(folder)(PROMPT), PROMPT) < 1e-5
    tokens = expected.greedy(PROMPT, 16)
    assert engine(folder).greedy(PROMPT, 16) == tokens
    assert batched_greedy(folder, [PROMPT], 16) == [tokens]


def test_fp8_is_written_in_two_bytes_and_nothing_of_it_is_left_to_every_call(
    make_checkpoint: Any, quantize: Any, compiled: Any, engine: Any, read_constant: Any
) -> None:
    folder = compiled(quantize(make_checkpoint("llama", tie_word_embeddings=True), FP8))
    assert read_constant(folder, "model.layers.1.mlp.down_proj.weight")[:2] == ("bf16", (64, 1, 96))
    ops = engine(folder).compiled.get_runtime_model().get_ops()
    weights = [op.input(1) for op in ops if op.get_rt_info()["layerType"].astype(str) == "FullyConnected"]
    assert {
        port.get_node().get_rt_info()["layerType"].astype(str) for port in [p.get_source_output() for p in weights]
    } == {"Const"}


def test_exact_engine_of_fp8_in_blocks(
    make_checkpoint: Any, compiled: Any, engine: Any, reference: Any, tmp_path: Path
) -> None:
    import torch

    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    plain = make_checkpoint("llama", tie_word_embeddings=True, **sizes)
    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

    def blocks(prefix: str, weight: Any) -> dict[str, Any]:
        rows, columns = (-(-size // 128) for size in weight.shape)
        scale = torch.full((rows, columns), 0.002) * torch.arange(1, rows * columns + 1).reshape(rows, columns)
        spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: len(weight)]
        values = (weight.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"weight": values, "weight_scale_inv": scale}

    quantized = _rewritten(plain, tmp_path / "q", blocks, said)
    assert reference(plain, quantized).error(engine(compiled(quantized))(PROMPT), PROMPT) < 1e-5


@pytest.mark.parametrize("encoding", ["gptq", "modelopt"])
def test_exact_engine_of_scattered_columns_and_of_scaled_inputs(
    encoding: str,
    make_checkpoint: Any,
    quantize: Any,
    compiled: Any,
    engine: Any,
    reference: Any,
    read_constant: Any,
    tmp_path: Path,
) -> None:
    """As other tools write them (`desc_act`, `pre_quant_scale`); the integers stay 4-bit constants."""
    import torch
    from safetensors.torch import load_file, save_file

    plain = make_checkpoint("llama", tie_word_embeddings=True)
    quantized = quantize(plain, W4, encoding)
    tensors, random = load_file(quantized / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith(".g_idx"):
            tensors[name] = tensor[torch.randperm(len(tensor), generator=random)]
        elif name.endswith(".pre_quant_scale"):
            tensors[name] = tensor * (0.5 + torch.rand(len(tensor), generator=random)).bfloat16()
    save_file(tensors, quantized / "model.safetensors")
    if encoding == "modelopt":
        said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "W4A16_AWQ", "group_size": 32}}
        (quantized / "hf_quant_config.json").write_text(json.dumps(said))
    folder, expected = compiled(quantized), reference(plain, quantized)
    assert expected.error(engine(folder)(PROMPT), PROMPT) < 1e-5
    assert read_constant(folder, "model.layers.1.mlp.down_proj.weight")[0] == "i4"


def _rewritten(plain: Path, out: Path, encode: Any, said: dict[str, Any]) -> Path:
    """A copy of a checkpoint whose linears are what `encode(prefix, weight)` makes of them."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(plain, out)
    tensors = load_file(plain / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        prefix = name.removesuffix(".weight")
        made = encode(prefix, tensors.pop(name))
        tensors |= {f"{prefix}.{suffix}": tensor for suffix, tensor in made.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((plain / "config.json").read_text()) | {"quantization_config": said}
    (out / "config.json").write_text(json.dumps(values))
    return out


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_constants_hold_the_integers_of_the_checkpoint(
    bits: int,
    symmetric: bool,
    group_size: int,
    make_checkpoint: Any,
    quantize: Any,
    compiled: Any,
    engine: Any,
    reference: Any,
    read_constant: Any,
) -> None:
    plain = make_checkpoint("llama", tie_word_embeddings=True)
    quantized = quantize(plain, Scheme(bits=bits, group_size=group_size, symmetric=symmetric))
    folder, expected = compiled(quantized), reference(plain, quantized)
    prefix = "model.layers.1.mlp.down_proj"
    weight, middle = expected.weights[prefix], (1 << (bits - 1)) * symmetric
    element, shape, raw = read_constant(folder, f"{prefix}.weight")
    assert element == ("i" if symmetric else "u") + ("4" if bits <= 4 else "8")
    assert shape == ((64, 3, 32) if group_size == 32 else (64, 96))
    assert np.array_equal(_integers(raw, element), weight.codes_OI.reshape(-1).astype(np.int64) - middle)
    if not symmetric:
        element, _, raw = read_constant(folder, f"{prefix}.zero_point")
        assert np.array_equal(_integers(raw, element), weight.zero_OG.reshape(-1))
    element, _, raw = read_constant(folder, f"{prefix}.scale")
    scale = raw.view({"f16": np.float16, "f32": np.float32}[element])
    assert np.array_equal(scale.astype(np.float32), weight.scale_OG.reshape(-1))
    assert expected.error(engine(folder)(PROMPT), PROMPT) < 1e-5


def _integers(raw: np.ndarray, element: str) -> np.ndarray:
    """The integers of a constant, as int64."""
    if element.endswith("8"):
        return raw.view({"i8": np.int8, "u8": np.uint8}[element]).astype(np.int64)
    nibbles = np.stack([raw & 15, raw >> 4], axis=-1).reshape(-1).astype(np.int64)
    return np.where(nibbles > 7, nibbles - 16, nibbles) if element == "i4" else nibbles


@pytest.mark.parametrize(("encoding", "symmetric"), [("gptq", True), ("gptq", False), ("awq", False)])
def test_encoding_on_disk_changes_nothing(
    encoding: str, symmetric: bool, make_checkpoint: Any, quantize: Any, compiled: Any
) -> None:
    plain = make_checkpoint("llama", tie_word_embeddings=True)
    scheme = Scheme(bits=4, group_size=32, symmetric=symmetric)
    folder, other = compiled(quantize(plain, scheme)), compiled(quantize(plain, scheme, encoding))
    assert (folder / "openvino_model.bin").read_bytes() == (other / "openvino_model.bin").read_bytes()
    assert (folder / "openvino_model.xml").read_bytes() == (other / "openvino_model.xml").read_bytes()


def test_static_activations_run_as_int8_by_int8(
    make_checkpoint: Any, quantize: Any, compiled: Any, engine: Any, reference: Any, batched_greedy: Any
) -> None:
    plain = make_checkpoint("llama", tie_word_embeddings=True)
    quantized = quantize(plain, W8A8_STATIC)
    folder, expected = compiled(quantized), reference(plain, quantized)
    unrounded = expected(PROMPT)
    expected.round_activations()
    assert expected.error(unrounded, PROMPT) > 1e-2
    running = engine(folder)
    assert expected.error(running(PROMPT), PROMPT) < 1e-3
    ops = running.compiled.get_runtime_model().get_ops()
    linears = [op for op in ops if op.get_rt_info()["layerType"].astype(str) == "FullyConnected"]
    types = [[port.get_element_type().get_type_name() for port in op.inputs()[:2]] for op in linears]
    assert types.count(["i8", "i8"]) == 14  # all but the head
    assert batched_greedy(folder, [PROMPT], 16) == [expected.greedy(PROMPT, 16)]


@pytest.mark.parametrize("scheme", [W4, W4_ASYMMETRIC, W8A8_DYNAMIC, W8A8_STATIC], ids=str)
def test_default_engine_is_near_the_exact_one(
    scheme: Scheme, make_checkpoint: Any, quantize: Any, compiled: Any, engine: Any, reference: Any
) -> None:
    plain = make_checkpoint("llama", tie_word_embeddings=True)
    quantized = quantize(plain, scheme)
    expected = reference(plain, quantized)
    if scheme.activations == "static":
        expected.round_activations()
    assert expected.error(engine(compiled(quantized, exact=False))(PROMPT), PROMPT) < 0.04


def test_tied_head_is_stored_once(make_checkpoint: Any, compiled: Any) -> None:
    tied = compiled(make_checkpoint("llama", tie_word_embeddings=True))
    untied = compiled(make_checkpoint("llama"))
    table_bytes = 320 * 64 * 2
    sizes = [(folder / "openvino_model.bin").stat().st_size for folder in (tied, untied)]
    assert sizes[1] - sizes[0] >= table_bytes


@pytest.mark.parametrize("tied", [True, False])
def test_int8_head_is_rounded_by_rows_and_leaves_the_embedding(
    tied: bool, make_checkpoint: Any, quantize: Any, compiled: Any, read_constant: Any
) -> None:
    from llmopt.models.checkpoint import Checkpoint

    plain = make_checkpoint("llama", tie_word_embeddings=tied)
    folder = compiled(quantize(plain, W4), exact=False)
    checkpoint = Checkpoint.open(plain)
    head = checkpoint.float_array("model.embed_tokens.weight" if tied else "lm_head.weight")
    element, shape, codes = read_constant(folder, "lm_head.weight")
    _, _, scale = read_constant(folder, "lm_head.scale")
    assert (element, shape) == ("i8", (320, 64))
    back = codes.view(np.int8).reshape(shape) * scale.view(np.float32)[:, None]
    assert np.all(np.abs(back - head) <= 0.5001 * scale.view(np.float32)[:, None])
    element, _, table = read_constant(folder, "model.embed_tokens.weight")
    assert element == "bf16"
    assert np.array_equal(table.view(np.uint16).reshape(320, 64), checkpoint.array("model.embed_tokens.weight"))


@pytest.mark.parametrize("scheme", [W4, W8A8_DYNAMIC], ids=str)
def test_head_that_is_quantized_stays_as_it_is(
    scheme: Scheme,
    make_checkpoint: Any,
    quantize: Any,
    compiled: Any,
    engine: Any,
    reference: Any,
    read_constant: Any,
) -> None:
    plain = make_checkpoint("llama")
    quantized = quantize(plain, scheme, head=True)
    expected = reference(plain, quantized)
    codes = expected.weights["lm_head"].codes_OI.reshape(-1).astype(np.int64) - (1 << (scheme.bits - 1))
    exact, default = compiled(quantized), compiled(quantized, exact=False)
    for folder in (exact, default):
        element, _, raw = read_constant(folder, "lm_head.weight")
        assert np.array_equal(_integers(raw, element), codes)
    assert expected.error(engine(exact)(PROMPT), PROMPT) < 1e-5


def test_matrices_in_bfloat16_are_not_widened_by_the_plugin(make_checkpoint: Any, compiled: Any, engine: Any) -> None:
    running = engine(compiled(make_checkpoint("llama", tie_word_embeddings=True)))
    ops = running.compiled.get_runtime_model().get_ops()
    weights = [op.input(1) for op in ops if op.get_rt_info()["layerType"].astype(str) == "FullyConnected"]
    assert {port.get_element_type().get_type_name() for port in weights} == {"bf16"}


def test_constants_outlive_everything_but_the_scratch(
    make_checkpoint: Any, quantize: Any, compiled: Any, tmp_path: Path
) -> None:
    from llmopt.compilers.ov.constants import Constants, Scratch
    from llmopt.compilers.ov.ir import build_decoder
    from llmopt.compilers.ov.save import save
    from llmopt.formats.reading import open_quantized
    from llmopt.models.checkpoint import Checkpoint
    from llmopt.models.config import DecoderConfig

    quantized = quantize(make_checkpoint("llama", tie_word_embeddings=True), W4_ASYMMETRIC)
    with Scratch.open(tmp_path) as scratch:
        checkpoint = Checkpoint.open(quantized)
        constants = Constants(checkpoint, open_quantized(checkpoint), scratch)
        model = build_decoder(DecoderConfig.read(checkpoint), checkpoint, constants, round_head=False)
        checkpoint.release()
        del checkpoint, constants
        gc.collect()
        churn = [np.full(size, 255, np.uint8) for size in range(64, 8192, 64)]
        save(model, tmp_path / "openvino_model.xml")
        del churn
    assert sorted(p.name for p in tmp_path.iterdir()) == ["openvino_model.bin", "openvino_model.xml"]
    for name in ("openvino_model.bin", "openvino_model.xml"):
        assert (tmp_path / name).read_bytes() == (compiled(quantized) / name).read_bytes()


def test_engine_reads_no_further_than_the_sliding_window(make_checkpoint: Any, compiled: Any) -> None:
    for window, expected in ((128, 128), (1024, 256), (None, 256)):
        folder = compiled(make_checkpoint("mistral", sliding_window=window))
        assert json.loads((folder / "engine.json").read_text())["max_context_tokens"] == expected
