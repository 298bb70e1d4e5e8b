"""The unified checkpoint: what its ranks say together is what the source says.

The judge of names and shapes is ModelOpt (tests/judges); here the ranks are put together again, and run as
TensorRT-LLM's classes would run them, against transformers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmopt.artifacts.outcome import silent
from llmopt.compilers.trt_llm.checkpoint import check, check_grids, write
from llmopt.compilers.trt_llm.config import EngineConfig
from llmopt.compilers.trt_llm.layout import layout
from llmopt.compilers.trt_llm.settings import Settings
from llmopt.compilers.trt_llm.sources import PROJ, QKV
from llmopt.errors import LlmoptError, SettingsError
from llmopt.formats.base import QuantizedWeight, exact_scale
from llmopt.formats.dequantized import to_torch
from llmopt.formats.reading import get_format, linears, open_model
from llmopt.formats.scheme import KVCache, Scheme
from llmopt.models.checkpoint import Checkpoint
from llmopt.models.config import DecoderConfig

VOCABULARY = 322  # 4 ranks do not divide it
SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GATED = {"num_key_value_heads": 2, "intermediate_size": 512}
OWN_SHAPE: dict[str, dict[str, Any]] = {
    "gpt_neox": {"intermediate_size": 1024, "layer_norm_eps": 1e-5},
    "falcon": {"ffn_hidden_size": 512},
    "qwen3": GATED | {"head_dim": 64},
}
NEW_FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2}

AWQ = Scheme(bits=4, group_size=64, symmetric=True)
FP8 = Scheme(bits=8, group_size=0, symmetric=True, activations="static", kind="float")
STATIC = Scheme(bits=8, group_size=-1, symmetric=True, activations="static")
DYNAMIC = replace(STATIC, activations="dynamic")

Make = Callable[..., Path]
Ranks = list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """plain("llama", dtype="bfloat16", **config) -> a random checkpoint; the same arguments give the same folder."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    made: dict[str, Path] = {}

    def make(model_type: str = "llama", dtype: str = "bfloat16", **config: Any) -> Path:
        key = json.dumps([model_type, dtype, config], sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(model_type)
            torch.manual_seed(0)
            shape = SHAPE | OWN_SHAPE.get(model_type, GATED) | config
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape))
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.data.normal_(1.0, 0.3)
                else:
                    parameter.data.mul_(3)
            model.to(getattr(torch, dtype)).save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """quantized(plain, scheme, format, head=None, kv_cache="none") -> every linear of the blocks rounded to nearest.

    `scheme` may be a function of a linear's prefix; None leaves one plain.
    """
    made: dict[str, Path] = {}

    def make(
        folder: Path,
        scheme: Scheme | Callable[[str], Scheme | None],
        name: str = "compressed-tensors",
        *,
        head: Scheme | None = None,
        kv_cache: KVCache = "none",
    ) -> Path:
        key = repr((folder, scheme, name, head, kv_cache))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("quantized")
            scheme_of = (lambda _: scheme) if isinstance(scheme, Scheme) else scheme
            _quantize(
                folder, made[key], lambda p: head if p in ("lm_head", "embed_out") else scheme_of(p), name, kv_cache
            )
        return made[key]

    return make


def _quantize(folder: Path, out: Path, scheme_of: Callable[[str], Scheme | None], name: str, kv_cache: KVCache) -> None:
    shutil.copytree(folder, out, dirs_exist_ok=True)
    checkpoint, form = Checkpoint.open(folder), get_format(name)
    config = DecoderConfig.read(checkpoint)
    schemes = {prefix: scheme_of(prefix) for prefix in linears(config)}
    tensors = {each: checkpoint.tensor(each) for each in checkpoint.tensors}
    for number, (prefix, scheme) in enumerate(schemes.items()):
        if scheme is not None:
            weight = _rounded(checkpoint.float_array(f"{prefix}.weight"), scheme)
            del tensors[f"{prefix}.weight"]
            scale = 0.0625 * (1 + number % 3) if scheme.activations == "static" else None
            for suffix, stored in form.encode(weight, scheme, config.dtype, scale).items():
                tensors[f"{prefix}.{suffix}"] = to_torch(stored)
    if kv_cache != "none":
        for index in range(config.layers):
            for suffix, stored in form.encode_kv(0.03125 * (index + 1), 0.125).items():
                tensors[f"{config.block(index)}.self_attn.{suffix}"] = to_torch(stored)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    schemes.setdefault("lm_head", None)
    values = dict(checkpoint.config) | {"quantization_config": form.config(schemes, kv_cache=kv_cache)}
    (out / "config.json").write_text(json.dumps(values))
    for file, content in form.extra_files(schemes, kv_cache).items():
        (out / file).write_text(json.dumps(content))


def _rounded(weight_OI: np.ndarray, scheme: Scheme) -> QuantizedWeight:
    """To nearest, symmetric or not."""
    rows, columns = weight_OI.shape
    grouped = weight_OI.reshape(rows, scheme.groups(columns), -1)
    if scheme.kind == "float":
        largest = np.abs(grouped).max(axis=2)
        scale = (largest if scheme.group_size else np.full_like(largest, largest.max())) / np.float32(448)
        steps = torch.from_numpy(grouped / scale[:, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
        codes, zero = steps.view(torch.uint8).numpy(), None
    else:
        middle = 1 << (scheme.bits - 1)
        scale = exact_scale(np.abs(grouped).max(axis=2) / middle)
        zero = None if scheme.symmetric else np.full(scale.shape, middle - 1, np.uint8)
        offset = middle if zero is None else middle - 1
        codes = (np.rint(grouped / scale[:, :, None]) + offset).clip(0, 2 * middle - 1).astype(np.uint8)
    return QuantizedWeight(
        codes_OI=codes.reshape(weight_OI.shape), scale_OG=scale, zero_OG=zero, bits=scheme.bits, kind=scheme.kind
    )


def written(model: Path, out: Path, **settings: Any) -> tuple[EngineConfig, tuple[str, ...]]:
    source = open_model(model)
    config = check(source, Settings(**settings))
    return config, write(source, config, out, silent)


def ranks_of(folder: Path) -> tuple[dict[str, Any], Ranks]:
    config = json.loads((folder / "config.json").read_text())
    return config, [load_file(folder / f"rank{n}.safetensors") for n in range(config["mapping"]["world_size"])]


def read_weight(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """A rank's part of a linear in float32, its input's scale worked in: TensorRT-LLM's layers, in torch."""
    weight, algorithm = tensors[f"{name}.weight"], config["quantization"]["quant_algo"]
    if weight.dtype in (torch.bfloat16, torch.float16):
        return weight.float()
    if algorithm == "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN":
        found = weight.float() * tensors[f"{name}.per_channel_scale"].T
        smoother = tensors.get(f"{name}.smoother")
        return found if smoother is None else found / smoother
    scale = tensors[f"{name}.weights_scaling_factor"]
    if algorithm == "FP8":
        return weight.float() * scale
    if algorithm == "W4A16_AWQ":
        unpacked = torch.empty(2 * weight.shape[0], weight.shape[1])
        unpacked[0::2], unpacked[1::2] = (weight << 4 >> 4).float(), (weight >> 4).float()
        found = unpacked * scale.repeat_interleave(config["quantization"]["group_size"], dim=1)
    else:
        found = weight.float() * scale[:, None]
    return found * tensors[f"{name}.prequant_scaling_factor"].float()


def reassembled(config: Mapping[str, Any], ranks: Ranks) -> dict[str, torch.Tensor]:
    """Weights of the whole model by Hugging Face's names, for a family with q, k, v, gate and up apart."""
    tp, size = config["mapping"]["tp_size"], config["head_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    stages = [ranks[start : start + tp] for start in range(0, len(ranks), tp)]
    each = config["num_hidden_layers"] // len(stages)
    vocabulary = config["vocab_size"]
    found = {
        "model.embed_tokens": torch.cat([rank["transformer.vocab_embedding.weight"] for rank in stages[0]])[
            :vocabulary
        ],
        "lm_head": torch.cat([rank["lm_head.weight"] for rank in stages[-1]])[:vocabulary],
    }
    for index in range(config["num_hidden_layers"]):
        local, block, stage = f"transformer.layers.{index % each}", f"model.layers.{index}", stages[index // each]

        def parts(name: str, local: str = local, stage: Ranks = stage) -> list[torch.Tensor]:
            return [read_weight(config, rank, f"{local}.{name}") for rank in stage]

        q_rows, kv_rows = heads // tp * size, max(kv_heads // tp, 1) * size
        split = [part.split([q_rows, kv_rows, kv_rows]) for part in parts("attention.qkv")]
        once = slice(None, None, max(tp // kv_heads, 1))  # ranks that share a KV head have the same
        found[f"{block}.self_attn.q_proj"] = torch.cat([q for q, _, _ in split])
        found[f"{block}.self_attn.k_proj"] = torch.cat([k for _, k, _ in split[once]])
        found[f"{block}.self_attn.v_proj"] = torch.cat([v for _, _, v in split[once]])
        found[f"{block}.self_attn.o_proj"] = torch.cat(parts("attention.dense"), dim=1)
        found[f"{block}.mlp.gate_proj"] = torch.cat(parts("mlp.fc"))
        found[f"{block}.mlp.up_proj"] = torch.cat(parts("mlp.gate"))
        found[f"{block}.mlp.down_proj"] = torch.cat(parts("mlp.proj"), dim=1)
    return found


def source_weights(folder: Path) -> dict[str, torch.Tensor]:
    """float32 weights of the linears of a checkpoint, and its embedding."""
    source = open_model(folder)
    found = {}
    for prefix, shape in linears(source.config).items():
        weight = None if source.reader is None else source.reader.linear(prefix, shape)
        floats = source.checkpoint.float_array(f"{prefix}.weight") if weight is None else weight.dequantize()
        found[prefix] = torch.from_numpy(np.array(floats))
    embedding = source.config.family.embedding
    found[embedding] = torch.from_numpy(source.checkpoint.float_array(f"{embedding}.weight"))
    return found


class Engine:
    """TensorRT-LLM's decoder in float32 torch, all ranks in turn; partial results are added as its all-reduce does."""

    def __init__(self, folder: Path) -> None:
        self.config, self.ranks = ranks_of(folder)
        tp = self.config["mapping"]["tp_size"]
        self.stages = [self.ranks[start : start + tp] for start in range(0, len(self.ranks), tp)]

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [T, vocabulary] of one sequence."""
        c, first, last = self.config, self.stages[0], self.stages[-1]
        x = torch.cat([rank["transformer.vocab_embedding.weight"] for rank in first]).float()[ids]
        for stage in self.stages:
            for index in range(c["num_hidden_layers"] // len(self.stages)):
                x = self.block(x, stage, f"transformer.layers.{index}")
        x = self.norm(x, last[0], "transformer.ln_f")
        return (x @ torch.cat([rank["lm_head.weight"] for rank in last]).float().T)[:, : c["vocab_size"]]

    def block(self, x: torch.Tensor, stage: Ranks, name: str) -> torch.Tensor:
        normed = self.norm(x, stage[0], f"{name}.input_layernorm")
        parts = [self.attention(normed, rank, f"{name}.attention") for rank in stage]
        attention = self.reduced(parts, stage, f"{name}.attention.dense")
        if self.config["architecture"] == "GPTNeoXForCausalLM":
            return x + attention + self.mlp(self.norm(x, stage[0], f"{name}.post_attention_layernorm"), stage, name)
        if self.config.get("new_decoder_architecture"):
            return x + attention + self.mlp(self.norm(x, stage[0], f"{name}.mlp_layernorm"), stage, name)
        if self.config.get("parallel_attention"):
            return x + attention + self.mlp(normed, stage, name)
        x = x + attention
        return x + self.mlp(self.norm(x, stage[0], f"{name}.post_layernorm"), stage, name)

    def mlp(self, x: torch.Tensor, stage: Ranks, name: str) -> torch.Tensor:
        act = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}[self.config["hidden_act"]]
        parts = []
        for rank in stage:
            inner = act(self.linear(x, rank, f"{name}.mlp.fc"))
            if f"{name}.mlp.gate.weight" in rank:
                inner = inner * self.linear(x, rank, f"{name}.mlp.gate")
            parts.append(inner @ read_weight(self.config, rank, f"{name}.mlp.proj").T)
        return self.reduced(parts, stage, f"{name}.mlp.proj")

    def attention(self, x: torch.Tensor, rank: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        c = self.config
        tp, size, tokens = c["mapping"]["tp_size"], c["head_size"], len(x)
        heads, kv_heads = c["num_attention_heads"] // tp, max(c["num_key_value_heads"] // tp, 1)
        qkv = self.linear(x, rank, f"{name}.qkv").view(tokens, -1, size).transpose(0, 1)
        q, k, v = qkv.split([heads, kv_heads, kv_heads])
        if f"{name}.q_layernorm.weight" in rank:
            q, k = self.norm(q, rank, f"{name}.q_layernorm"), self.norm(k, rank, f"{name}.k_layernorm")
        q, k = self.rotated(q), self.rotated(k).repeat_interleave(heads // kv_heads, dim=0)
        v = v.repeat_interleave(heads // kv_heads, dim=0)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        joined = out.transpose(0, 1).reshape(tokens, -1)
        return joined @ read_weight(c, rank, f"{name}.dense").T

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        channels = int(x.shape[-1] * self.config["rotary_pct"])
        frequencies = 1 / self.config["rotary_base"] ** (torch.arange(0, channels, 2) / channels)
        scaling = self.config.get("rotary_scaling") or {"factor": 1.0}
        angles = torch.arange(x.shape[1])[:, None] * frequencies / scaling["factor"]
        cos, sin = angles.cos(), angles.sin()
        one, other, rest = x.split([channels // 2, channels // 2, x.shape[-1] - channels], dim=-1)
        return torch.cat([one * cos - other * sin, other * cos + one * sin, rest], dim=-1)

    def linear(self, x: torch.Tensor, rank: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        y = x @ read_weight(self.config, rank, name).T
        return y + rank[f"{name}.bias"].float() if f"{name}.bias" in rank else y

    def reduced(self, parts: list[torch.Tensor], stage: Ranks, name: str) -> torch.Tensor:
        bias = stage[0].get(f"{name}.bias")
        return sum(parts[1:], parts[0]) + (0 if bias is None else bias.float())

    def norm(self, x: torch.Tensor, rank: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        weight, epsilon = rank[f"{name}.weight"].float(), self.config["norm_epsilon"]
        if self.config["rmsnorm"]:
            return x * (x.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt() * weight
        return torch.nn.functional.layer_norm(x, weight.shape, weight, rank[f"{name}.bias"].float(), epsilon)


def reference_logits(folder: Path, ids: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """transformers in float32, with some of its weights replaced."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = dict(model.named_modules())
    for prefix, weight in weights.items():
        if ".layers." in prefix or ".h." in prefix:  # the rest is as it was, and the head not always by this name
            found[prefix].weight.data = weight
    with torch.no_grad():
        logits: torch.Tensor = model(ids[None]).logits[0]
    return logits


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


IDS = torch.arange(3, 35) * 7 % VOCABULARY


@pytest.mark.parametrize(
    ("model_type", "options", "tp", "pp"),
    [
        ("llama", {"tie_word_embeddings": True}, 1, 1),
        ("llama", {"attention_bias": True, "mlp_bias": True, "rope_theta": 3e4}, 2, 1),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, 4, 2),
        ("mistral", {"sliding_window": None, "head_dim": 128}, 2, 2),
        ("qwen2", {}, 4, 1),
        ("qwen3", {"head_dim": 128}, 2, 1),
        ("gpt_neox", {}, 1, 1),
        ("gpt_neox", {"num_attention_heads": 8}, 4, 1),
        ("falcon", {}, 4, 1),
        ("falcon", {"multi_query": False, "bias": True}, 1, 2),
        ("falcon", {"parallel_attn": False, "multi_query": False, "bias": True}, 2, 1),
        ("falcon", NEW_FALCON, 4, 1),
        ("falcon", NEW_FALCON | {"num_ln_in_parallel_attn": 1}, 2, 2),
    ],
)
def test_the_ranks_together_give_the_logits_of_transformers(
    plain: Make, tmp_path: Path, model_type: str, options: dict[str, Any], tp: int, pp: int
) -> None:
    folder = plain(model_type, **options)
    _, events = written(folder, tmp_path / "out", tensor_parallel=tp, pipeline_parallel=pp)
    assert events == ()
    assert relative_error(Engine(tmp_path / "out")(IDS), reference_logits(folder, IDS, {})) < 1e-5


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 2)])
@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (AWQ, "compressed-tensors"),
        (AWQ, "gptq"),
        (AWQ, "awq"),
        (AWQ, "modelopt"),
        (STATIC, "compressed-tensors"),
        (STATIC, "modelopt"),
        (DYNAMIC, "compressed-tensors"),
        (None, "plain"),
    ],
    ids=str,
)
def test_what_was_written_is_the_source_to_the_bit(
    plain: Make, quantized: Make, tmp_path: Path, scheme: Scheme | None, name: str, tp: int, pp: int
) -> None:
    folder = plain("llama")
    model = folder if scheme is None else quantized(folder, scheme, name)
    written(model, tmp_path / "out", tensor_parallel=tp, pipeline_parallel=pp)
    expected, found = source_weights(model), reassembled(*ranks_of(tmp_path / "out"))
    assert found.keys() == expected.keys()
    for prefix, weight in expected.items():
        assert torch.equal(found[prefix].float(), weight), prefix


@pytest.mark.parametrize("tp", [1, 2])
def test_fp8_linears_that_are_fused_share_the_largest_scale(
    plain: Make, quantized: Make, tmp_path: Path, tp: int
) -> None:
    model = quantized(plain("llama"), FP8, "modelopt")
    _, events = written(model, tmp_path / "out", tensor_parallel=tp)
    config, ranks = ranks_of(tmp_path / "out")
    expected, found = source_weights(model), reassembled(config, ranks)
    changed = 0
    for block in ("model.layers.0", "model.layers.1"):
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            checkpoint = Checkpoint.open(model)
            scales = [float(checkpoint.float_array(f"{block}.{name}.weight_scale")) for name in names]
            for name, scale in zip(names, scales, strict=True):
                own, other = expected[f"{block}.{name}"], found[f"{block}.{name}"]
                steps = (own / max(scales)).to(torch.float8_e4m3fn).float() * max(scales)
                assert torch.equal(other, steps)
                assert torch.equal(other, own) == (scale == max(scales))
                changed += int((other != own).sum())
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            assert torch.equal(found[f"{block}.{name}"], expected[f"{block}.{name}"])
    assert any(f"{changed} weights were rounded again" in event for event in events)
    assert any("different static scales of one input" in event for event in events)
    inputs = [ranks[0][f"transformer.layers.0.{name}.activation_scaling_factor"] for name in ("mlp.fc", "mlp.gate")]
    assert inputs[0] == inputs[1] == 0.1875


def test_equal_fp8_scales_change_nothing(plain: Make, quantized: Make, tmp_path: Path) -> None:
    model = tmp_path / "same"
    shutil.copytree(quantized(plain("llama"), FP8, "modelopt"), model)
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("weight_scale", "input_scale")):
            tensor.fill_(0.03125)
    save_file(tensors, model / "model.safetensors")
    _, events = written(model, tmp_path / "out")
    assert events == ()
    expected, found = source_weights(model), reassembled(*ranks_of(tmp_path / "out"))
    assert all(torch.equal(found[prefix], weight) for prefix, weight in expected.items() if "layers" in prefix)


@pytest.mark.parametrize("scheme", [AWQ, FP8, STATIC, DYNAMIC], ids=str)
def test_quantized_ranks_give_the_logits_of_the_dequantized_model(
    plain: Make, quantized: Make, tmp_path: Path, scheme: Scheme
) -> None:
    """With biases, copied KV heads, and a table that the ranks do not divide."""
    folder = plain("qwen2")
    model = quantized(folder, scheme)
    written(model, tmp_path / "out", tensor_parallel=4)
    expected = reference_logits(folder, IDS, source_weights(model))
    assert relative_error(Engine(tmp_path / "out")(IDS), expected) < (0.1 if scheme is FP8 else 1e-5)


def test_codes_of_fused_linears_are_reordered_with_their_scales(plain: Make, quantized: Make, tmp_path: Path) -> None:
    for model_type, options in (("gpt_neox", {}), ("falcon", NEW_FALCON)):
        folder = plain(model_type, **options)
        model = quantized(folder, AWQ)
        written(model, tmp_path / model_type, tensor_parallel=2)
        expected = reference_logits(folder, IDS, source_weights(model))
        assert relative_error(Engine(tmp_path / model_type)(IDS), expected) < 1e-5


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("scheme", [AWQ, STATIC], ids=str)
def test_scales_of_inputs_are_carried_over(
    plain: Make, quantized: Make, tmp_path: Path, scheme: Scheme, tp: int
) -> None:
    model = smoothed(quantized(plain("llama"), AWQ, "modelopt"), tmp_path / "smooth")
    written(model, tmp_path / "out", tensor_parallel=tp)
    expected, found = source_weights(model), reassembled(*ranks_of(tmp_path / "out"))
    assert all(torch.equal(found[prefix], weight) for prefix, weight in expected.items() if "layers" in prefix)


def smoothed(folder: Path, out: Path) -> Path:
    """A ModelOpt checkpoint with scales of inputs that BF16 holds, alike for linears that read the same."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("pre_quant_scale"):
            tensor.copy_(1 + torch.arange(len(tensor)) % 3)
    save_file(tensors, out / "model.safetensors")
    return out


def test_inputs_scaled_differently_are_refused(plain: Make, quantized: Make, tmp_path: Path) -> None:
    model = smoothed(quantized(plain("llama"), AWQ, "modelopt"), tmp_path / "smooth")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.pre_quant_scale"][5] = 7.0
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(LlmoptError, match=r"k_proj` and .*q_proj` scale their one input differently"):
        check(open_model(model), Settings())


def test_groups_of_scattered_columns_are_refused(plain: Make, quantized: Make, tmp_path: Path) -> None:
    model = tmp_path / "scattered"
    shutil.copytree(quantized(plain("llama"), AWQ, "gptq"), model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.g_idx"] = (torch.arange(256) % 4).int()
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(LlmoptError, match=r"up_proj` has groups of scattered columns") as caught:
        check(open_model(model), Settings())
    assert "`llmopt quantize --act-order`" in (caught.value.hint or "")


@pytest.mark.parametrize("scheme", [FP8, DYNAMIC], ids=str)
def test_scales_of_inputs_that_an_algorithm_has_no_room_for_are_refused(
    plain: Make, quantized: Make, tmp_path: Path, scheme: Scheme
) -> None:
    """FP8 has none; per token, only inputs that no norm makes have one."""
    config = EngineConfig.of(open_model(quantized(plain("llama"), scheme)), Settings())
    source = open_model(smoothed(quantized(plain("llama"), AWQ, "modelopt"), tmp_path / "smooth"))
    with pytest.raises(LlmoptError, match=f"`pre_quant_scale`, which `{config.algorithm}` does not"):
        check_grids(source, config, 0, QKV, ("self_attn.q_proj",))
    if scheme is DYNAMIC:
        check_grids(source, config, 0, PROJ, ("mlp.down_proj",))


@pytest.mark.parametrize("kv_cache", ["fp8", "int8"])
def test_the_scales_of_the_kv_cache_are_on_every_rank(
    plain: Make, quantized: Make, tmp_path: Path, kv_cache: KVCache
) -> None:
    model = quantized(plain("llama"), AWQ, kv_cache=kv_cache)
    _, events = written(model, tmp_path / "out", tensor_parallel=2, pipeline_parallel=2)
    config, ranks = ranks_of(tmp_path / "out")
    assert events == ()
    assert config["quantization"]["kv_cache_quant_algo"] == kv_cache.upper()
    for rank, k_scale in zip(ranks, (0.03125, 0.03125, 0.0625, 0.0625), strict=True):
        names = [f"transformer.layers.0.attention.{name}_cache_scaling_factor" for name in ("k", "v", "kv")]
        assert [rank[name].tolist() for name in names] == [[k_scale], [0.125], [0.125]]


def test_an_fp8_kv_cache_without_scales_has_ones_and_that_is_told(plain: Make, tmp_path: Path) -> None:
    _, events = written(plain("llama"), tmp_path / "out", kv_cache="fp8")
    assert ranks_of(tmp_path / "out")[1][0]["transformer.layers.1.attention.kv_cache_scaling_factor"].tolist() == [1.0]
    assert events == ("the KV cache in FP8 has the scale 1 everywhere: the checkpoint has no scales for it",)


def test_scales_of_a_kv_cache_that_is_not_wanted_are_left_out(plain: Make, quantized: Make, tmp_path: Path) -> None:
    model = quantized(plain("llama"), AWQ, kv_cache="fp8")
    _, events = written(model, tmp_path / "out", kv_cache="none")
    assert not any("cache" in name for name in ranks_of(tmp_path / "out")[1][0])
    assert events == ("the checkpoint's scales for a KV cache in fp8 are left out, as asked",)


def test_modules_left_plain_are_excluded_by_name(plain: Make, quantized: Make, tmp_path: Path) -> None:
    folder = plain("llama")
    model = quantized(folder, lambda prefix: None if ".0.mlp." in prefix else AWQ)
    config, _ = written(model, tmp_path / "out", tensor_parallel=2)
    excluded = ["lm_head", *(f"transformer.layers.0.mlp.{name}" for name in ("fc", "proj", "gate"))]
    assert config.to_json()["quantization"]["exclude_modules"] == excluded
    expected, found = source_weights(model), reassembled(*ranks_of(tmp_path / "out"))
    assert all(torch.equal(found[prefix].float(), weight) for prefix, weight in expected.items())


def test_a_quantized_head_is_turned_into_floats_and_that_is_told(plain: Make, quantized: Make, tmp_path: Path) -> None:
    model = quantized(plain("llama"), AWQ, head=AWQ)
    _, events = written(model, tmp_path / "out", tensor_parallel=4)
    found = reassembled(*ranks_of(tmp_path / "out"))["lm_head"]
    assert torch.equal(found, source_weights(model)["lm_head"].bfloat16())
    assert events == ("the quantized output head was turned into bfloat16: the engine has it unquantized",)


def test_rows_beyond_the_vocabulary_are_zeros(plain: Make, tmp_path: Path) -> None:
    written(plain("llama"), tmp_path / "out", tensor_parallel=4)
    _, ranks = ranks_of(tmp_path / "out")
    for name in ("lm_head.weight", "transformer.vocab_embedding.weight"):
        assert all(rank[name].shape == (81, 256) for rank in ranks)
        assert not ranks[3][name][-2:].any()
        assert ranks[3][name][-3].any()


def test_floats_are_rounded_to_the_dtype_asked_for_and_counted(plain: Make, tmp_path: Path) -> None:
    folder = plain("llama", dtype="float32")
    _, events = written(folder, tmp_path / "half")
    _, wide = written(folder, tmp_path / "brain", dtype="bfloat16")
    found = reassembled(*ranks_of(tmp_path / "half"))
    expected = source_weights(folder)
    assert all(torch.equal(found[prefix], weight.half()) for prefix, weight in expected.items())
    rounded = sum(
        int((tensor != tensor.half().float()).sum()) for tensor in load_file(folder / "model.safetensors").values()
    )
    assert events == (f"{rounded} values that are not quantized were rounded to float16",)
    assert wide[0].endswith("were rounded to bfloat16")


def test_values_that_float16_does_not_hold_are_an_error(plain: Make, tmp_path: Path) -> None:
    model = tmp_path / "large"
    shutil.copytree(plain("llama"), model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(LlmoptError, match=r"up_proj\.weight` has values that float16 does not hold") as caught:
        written(model, tmp_path / "out", dtype="float16")
    assert caught.value.hint == "set `compile.dtype: bfloat16`"
    assert not list((tmp_path / "out").iterdir())


def test_scales_that_the_loader_will_round_are_counted(plain: Make, quantized: Make, tmp_path: Path) -> None:
    model = tmp_path / "fine"
    shutil.copytree(quantized(plain("llama"), AWQ, "modelopt"), model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale"][:7, 0] *= 1.001
    save_file(tensors, model / "model.safetensors")
    _, events = written(model, tmp_path / "out")
    assert [event.split(";")[0] for event in events] == [
        "TensorRT-LLM will round 7 scales of weights to bfloat16 as it loads them"
    ]


def test_a_window_that_the_engine_does_not_have_is_told(plain: Make, tmp_path: Path) -> None:
    _, events = written(plain("mistral", sliding_window=16), tmp_path / "out")
    assert len(events) == 1
    assert "the model to 16 tokens" in events[0]


def test_the_same_input_gives_the_same_bytes(plain: Make, quantized: Make, tmp_path: Path) -> None:
    model = quantized(plain("llama"), FP8)
    for name in ("one", "two"):
        written(model, tmp_path / name, tensor_parallel=2)
    digests = [
        {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    ]
    assert digests[0] == digests[1]
    assert sorted(digests[0]) == ["config.json", "rank0.safetensors", "rank1.safetensors"]


def test_every_tensor_lies_as_safetensors_itself_would_put_it(plain: Make, quantized: Make, tmp_path: Path) -> None:
    written(quantized(plain("llama"), AWQ, kv_cache="fp8"), tmp_path / "out")
    file = tmp_path / "out" / "rank0.safetensors"
    save_file(load_file(file), tmp_path / "library.safetensors", metadata={"format": "pt"})
    assert file.read_bytes() == (tmp_path / "library.safetensors").read_bytes()


def test_the_files_hold_what_the_layout_says_and_nothing_else(plain: Make, quantized: Make, tmp_path: Path) -> None:
    config, _ = written(quantized(plain("llama"), DYNAMIC), tmp_path / "out", tensor_parallel=2, pipeline_parallel=2)
    _, ranks = ranks_of(tmp_path / "out")
    for number, rank in enumerate(ranks):
        assert {name: tuple(tensor.shape) for name, tensor in rank.items()} == {
            name: part.shapes[0] for name, part in layout(config, number).items()
        }


def test_memory_is_that_of_a_module_not_of_the_model(plain: Make, quantized: Make, tmp_path: Path) -> None:
    """More blocks need no more memory."""
    peaks = []
    for layers in (2, 8):
        model = quantized(plain("llama", num_hidden_layers=layers), AWQ)
        source = open_model(model)
        config = check(source, Settings())
        tracemalloc.start()
        write(source, config, tmp_path / str(layers), silent)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize(
    ("model_type", "options", "settings", "message", "hint"),
    [
        ("llama", {}, {"tensor_parallel": 3}, "3 tensor-parallel ranks do not divide 4 attention heads", "1, 2 or 4"),
        ("llama", {"intermediate_size": 510}, {"tensor_parallel": 4}, "do not divide 510 inner features", "1 or 2"),
        (
            "llama",
            {"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 384, "intermediate_size": 384},
            {"tensor_parallel": 6},
            "4 KV heads can be neither split over nor copied to 6",
            "1, 2, 4 or 12",
        ),
        ("llama", {}, {"pipeline_parallel": 3}, "3 pipeline stages do not divide 2 layers", "divide the layers"),
        ("gpt_neox", {}, {"pipeline_parallel": 2}, "`GPTNeoXForCausalLM` has no pipeline stages", "tensor_parallel"),
        ("gpt_neox", {"use_parallel_residual": False}, {}, "attention that does not run beside the MLP", "bundle"),
        ("gpt_neox", {"layer_norm_eps": 1e-6}, {}, "norms with an epsilon of 1e-06", "bundle"),
        ("gpt_neox", {"intermediate_size": 512}, {}, "an MLP of 512 features", "bundle"),
        ("gpt_neox", {"attention_bias": False}, {}, "attention without biases", "bundle"),
        ("qwen3", {"attention_bias": True}, {}, "a bias of the output projection", "bundle"),
        ("qwen3", {}, {"version": "0.21.0"}, "0.21.0 builds no engines of `qwen3`", "1.0.0 was the first"),
        ("llama", {}, {"expert_parallel": 2, "tensor_parallel": 2}, "no mixtures of experts", "`expert_parallel` to 1"),
        ("llama", {}, {"mode": "engine", "kv_cache": "int8"}, "the checkpoint has no scales", "--kv-cache int8"),
        ("gemma2", {}, {}, "does not have the model type `gemma2`", "it has `llama`"),
        (
            "falcon",
            {"multi_query": False, "bias": True},
            {"tensor_parallel": 2},
            "would add Falcon's biases 2 times",
            "`tensor_parallel` to 1",
        ),
    ],
)
def test_what_the_ranks_or_the_classes_do_not_have_is_refused(
    plain: Make, model_type: str, options: dict[str, Any], settings: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(LlmoptError) as caught:
        check(open_model(plain(model_type, **options)), Settings(**settings))
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")
    assert isinstance(caught.value, SettingsError) == ("bundle" not in hint and model_type != "gemma2")


def only_first_query(prefix: str) -> Scheme | None:
    return None if prefix.endswith("0.self_attn.q_proj") else AWQ


@pytest.mark.parametrize(
    ("scheme", "settings", "message", "hint"),
    [
        (replace(AWQ, group_size=32), {}, "have no weights with groups of 32", "--group-size 128"),
        (replace(AWQ, group_size=-1), {}, "have no weights with one scale a row", "--group-size 128"),
        (replace(AWQ, symmetric=False), {}, "has zero points", "--symmetric"),
        (replace(STATIC, activations="none"), {}, "cannot hold 8-bit weights", "TensorRT-LLM rounds itself"),
        (replace(FP8, group_size=-1, activations="dynamic"), {}, "FP8 weights with a scale for a row", "--method fp8"),
        (replace(AWQ, bits=3), {}, "cannot hold 3-bit weights", "4 bits in symmetric groups"),
        (replace(AWQ, group_size=128), {"tensor_parallel": 4}, "is no multiple of 512: groups of 128 on 4", "fewer"),
        (only_first_query, {}, "which TensorRT-LLM fuses, are not quantized alike", "skip"),
        (lambda p: None if p.endswith("gate_proj") else FP8, {}, "gate_proj` and `", "read one input"),
        (lambda p: FP8 if "down" in p else AWQ, {}, "mixes 2 schemes", "bundle"),
        (lambda p: None if "down" in p else DYNAMIC, {}, "mlp.proj` is not quantized", "static scales"),
        (lambda p: None if "down" in p else AWQ, {"pipeline_parallel": 2}, "a pipeline of 2 stages", "from 0"),
    ],
)
def test_what_the_kernels_do_not_have_is_refused(
    plain: Make, quantized: Make, scheme: Any, settings: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(LlmoptError) as caught:
        check(open_model(quantized(plain("llama"), scheme)), Settings(**settings))
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


def test_what_a_class_was_never_documented_to_have_is_refused(plain: Make, quantized: Make) -> None:
    with pytest.raises(LlmoptError, match="`FP8` is not supported for `gpt_neox`"):
        check(open_model(quantized(plain("gpt_neox"), FP8)), Settings())
    with pytest.raises(LlmoptError, match="PER_TOKEN_PLUGIN` is not supported for `qwen3`"):
        check(open_model(quantized(plain("qwen3"), DYNAMIC)), Settings())


@pytest.mark.parametrize(
    ("scheme", "name", "value", "message"),
    [
        (AWQ, "mlp.up_proj.weight_scale", 0.0, "positive numbers"),
        (AWQ, "self_attn.k_proj.k_scale", float("nan"), "positive numbers"),
        (FP8, "mlp.up_proj.input_scale", -1.0, "positive numbers"),
        (FP8, "mlp.up_proj.weight", float("nan"), "FP8 weights that are no numbers"),
        (FP8, "input_layernorm.weight", float("inf"), "values that are no numbers"),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scales_and_values_that_are_no_numbers_are_an_error(
    plain: Make, quantized: Make, tmp_path: Path, scheme: Scheme, name: str, value: float, message: str, dtype: str
) -> None:
    model = tmp_path / "wrong"
    shutil.copytree(quantized(plain("llama"), scheme, "modelopt", kv_cache="fp8"), model)
    tensors = load_file(model / "model.safetensors")
    tensors[f"model.layers.1.{name}"].fill_(value)
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(LlmoptError, match=message):
        written(model, tmp_path / "out", dtype=dtype)


def test_linears_of_one_module_may_be_stored_in_several_dtypes(plain: Make, tmp_path: Path) -> None:
    model = tmp_path / "mixed"
    shutil.copytree(plain("llama"), model)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].float()
    save_file(tensors, model / "model.safetensors")
    written(model, tmp_path / "out", tensor_parallel=2)
    assert torch.equal(reassembled(*ranks_of(tmp_path / "out"))[name], source_weights(plain("llama"))[name])
