"""Small checkpoints of which both ModelOpt and we make TensorRT-LLM's checkpoint, and the manifests that compare them.

Weights come from the bits of PCG64, which are the same on every machine and in every version of numpy (NEP 19), so what
ModelOpt made of them can be kept (modelopt-0.47.json) for the day its exporter goes. A scheme is rounded to nearest as
ModelOpt does it, by amax / 7, 127 or 448.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from llmopt.artifacts.outcome import silent
from llmopt.formats.base import QuantizedWeight
from llmopt.formats.dequantized import to_torch
from llmopt.formats.modelopt import ALGORITHMS
from llmopt.formats.reading import get_format, open_model
from llmopt.formats.scheme import Scheme
from llmopt.models.checkpoint import read_header

GOLDEN = Path(__file__).with_name("modelopt-0.47.json")

_LAYERS, _HEADS, _HIDDEN, _INTERMEDIATE, _VOCABULARY = 2, 4, 256, 512, 320


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """preset: ModelOpt's own name of the method. algorithm: of `ALGORITHMS`, None where plain.

    same_bytes: whether the method only rounds to nearest; what others search for is their own.
    """

    model_type: str = "llama"
    dtype: str = "bfloat16"
    preset: str | None = None
    algorithm: str | None = None
    kv_cache: bool = False
    kv_heads: int = 2
    tied: bool = False
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    same_bytes: bool = True

    @property
    def scheme(self) -> Scheme | None:
        return None if self.algorithm is None else ALGORITHMS[self.algorithm]


_FP8: Mapping[str, Any] = {"preset": "FP8_DEFAULT_CFG", "algorithm": "FP8"}
_W4: Mapping[str, Any] = {"preset": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "algorithm": "W4A16_AWQ"}
_W8A8: Mapping[str, Any] = {"preset": "INT8_DEFAULT_CFG", "algorithm": "W8A8_SQ_PER_CHANNEL"}
_AWQ: Mapping[str, Any] = {"preset": "INT4_AWQ_CFG", "algorithm": "W4A16_AWQ", "same_bytes": False}
_SQ: Mapping[str, Any] = {"preset": "INT8_SMOOTHQUANT_CFG", "algorithm": "W8A8_SQ_PER_CHANNEL", "same_bytes": False}
_TP2: Mapping[str, Any] = {"tensor_parallel": 2}
_PP2: Mapping[str, Any] = {"pipeline_parallel": 2}

CASES: Mapping[str, Case] = {
    "llama-bf16": Case(),
    "llama-fp16-tp2": Case(dtype="float16", **_TP2),
    "llama-bf16-tp2-pp2": Case(**_TP2, **_PP2),
    "llama-bf16-one-kv-head-tp2": Case(kv_heads=1, **_TP2),
    "llama-fp8": Case(**_FP8),
    "llama-fp8-tp2": Case(**_FP8, **_TP2),
    "llama-fp8-fp8-cache-pp2": Case(**_FP8, kv_cache=True, **_PP2),
    "llama-w4": Case(**_W4),
    "llama-w4-fp16-tp2": Case(dtype="float16", **_W4, **_TP2),
    "llama-w8a8": Case(**_W8A8),
    "llama-w8a8-tp2": Case(**_W8A8, **_TP2),
    "llama-awq": Case(**_AWQ),
    "llama-awq-tp2": Case(**_AWQ, **_TP2),
    "llama-smoothquant": Case(**_SQ),
    "llama-smoothquant-tp2": Case(**_SQ, **_TP2),
    "qwen2-bf16-tp2": Case(model_type="qwen2", **_TP2),
    "qwen2-tied-bf16": Case(model_type="qwen2", tied=True),
    "qwen2-fp8-tp2": Case(model_type="qwen2", **_FP8, **_TP2),
    "qwen2-w4-pp2": Case(model_type="qwen2", **_W4, **_PP2),
    "qwen2-smoothquant-tp2": Case(model_type="qwen2", **_SQ, **_TP2),
    "mistral-bf16": Case(model_type="mistral"),
    "mistral-fp8-tp2": Case(model_type="mistral", **_FP8, **_TP2),
    "mistral-w4-tp2": Case(model_type="mistral", **_W4, **_TP2),
}


def config(case: Case) -> dict[str, Any]:
    """The config.json of Hugging Face."""
    architecture = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "mistral": "MistralForCausalLM"}
    return {
        "architectures": [architecture[case.model_type]],
        "model_type": case.model_type,
        "hidden_size": _HIDDEN,
        "intermediate_size": _INTERMEDIATE,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": case.kv_heads,
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": case.tied,
        "dtype": case.dtype,
        "bos_token_id": None,
        "eos_token_id": 0,
    }


def weights(case: Case) -> dict[str, np.ndarray]:
    """Every tensor of the plain checkpoint, float32 of values that BF16 and F16 both hold.

    Linears have largest weights of their own, hence FP8 scales; but those that share an input have the same, for
    ModelOpt takes the largest of their scales before it rounds, while we would have to round again.
    """
    kv = case.kv_heads * _HIDDEN // _HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_VOCABULARY, _HIDDEN)}
    for index in range(_LAYERS):
        block = f"model.layers.{index}"
        shapes |= {f"{block}.{norm}.weight": (_HIDDEN,) for norm in ("input_layernorm", "post_attention_layernorm")}
        for linear, shape in {
            "self_attn.q_proj": (_HIDDEN, _HIDDEN),
            "self_attn.k_proj": (kv, _HIDDEN),
            "self_attn.v_proj": (kv, _HIDDEN),
            "self_attn.o_proj": (_HIDDEN, _HIDDEN),
            "mlp.gate_proj": (_INTERMEDIATE, _HIDDEN),
            "mlp.up_proj": (_INTERMEDIATE, _HIDDEN),
            "mlp.down_proj": (_HIDDEN, _INTERMEDIATE),
        }.items():
            shapes[f"{block}.{linear}.weight"] = shape
            if case.model_type == "qwen2" and linear in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                shapes[f"{block}.{linear}.bias"] = shape[:1]
    shapes["model.norm.weight"] = (_HIDDEN,)
    if not case.tied:
        shapes["lm_head.weight"] = (_VOCABULARY, _HIDDEN)
    found = {name: _values(name, shape) for name, shape in shapes.items()}
    for prefix in linears():
        block, _, linear = prefix.rpartition(".")
        shared = prefix if linear in ("o_proj", "down_proj") else block
        found[f"{prefix}.weight"][0, 0] = (64 + _code(shared) % 64) / 128
    return found


def _values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """-255 to 255 by a power of two from 2**-13 to 2**-10; norms lie around one."""
    raw = np.random.PCG64(_code(name)).random_raw(int(np.prod(shape)))
    size = ((raw >> np.uint64(8)) % np.uint64(511)).astype(np.float32) - 255
    values = np.ldexp(size, -10 - (raw >> np.uint64(60)).astype(np.int32) % 4).astype(np.float32)
    return (values if "norm" not in name else 1 + np.rint(values * 64) / 64).reshape(shape)


def _code(name: str) -> int:
    return zlib.crc32(name.encode())


def input_amax(prefix: str) -> float:
    """The largest input of a linear, which decides its static scale; of fused linears the largest of theirs counts."""
    return (64 + _code(prefix) % 64) / 32


def kv_scales(index: int) -> tuple[float, float]:
    """Of a block's keys and values; at least one, which ModelOpt makes the least of FP8."""
    return 1.25 + index, 1.5


def linears() -> list[str]:
    """The prefixes of what a scheme is for."""
    names = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    return [f"model.layers.{index}.{name}" for index in range(_LAYERS) for name in names]


def last_step(scheme: Scheme) -> int:
    """The largest code of a scheme's grid, as ModelOpt has it."""
    return 448 if scheme.kind == "float" else (1 << (scheme.bits - 1)) - 1


def nearest(weight_OI: np.ndarray, scheme: Scheme) -> QuantizedWeight:
    """ModelOpt's rounding in its TensorRT-LLM exporter, all in float32."""
    grouped = weight_OI.reshape(len(weight_OI), scheme.groups(weight_OI.shape[1]), -1)
    largest = np.abs(grouped).max(axis=2)
    if scheme.group_size == 0:
        largest = np.full_like(largest, largest.max())
    last = last_step(scheme)
    scale = largest / np.float32(last)
    steps = grouped / scale[:, :, None]
    if scheme.kind == "float":
        codes = torch.from_numpy(steps).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    else:
        codes = (np.rint(steps) + last + 1).clip(0, 2 * last + 1).astype(np.uint8)
    return QuantizedWeight(
        codes_OI=codes.reshape(weight_OI.shape), scale_OG=scale, zero_OG=None, bits=scheme.bits, kind=scheme.kind
    )


def write_source(case: Case, folder: Path) -> None:
    """The checkpoint as `llmopt compile` gets it: plain, or in our ModelOpt format, which keeps scales in float32."""
    values, scheme, form = config(case), case.scheme, get_format("modelopt")
    plain, torch_dtype = weights(case), getattr(torch, case.dtype)
    tensors = {name: torch.from_numpy(array).to(torch_dtype) for name, array in plain.items()}
    if scheme is not None:
        dtype, last = {"bfloat16": "BF16", "float16": "F16"}[case.dtype], last_step(scheme)
        for prefix in linears():
            rounded = nearest(plain[f"{prefix}.weight"], scheme)
            scale = float(np.float32(input_amax(prefix)) / np.float32(last)) if scheme.activations == "static" else None
            del tensors[f"{prefix}.weight"]
            stored = form.encode(rounded, scheme, dtype, scale)
            tensors |= {f"{prefix}.{suffix}": to_torch(each) for suffix, each in stored.items()}
        schemes = {**dict.fromkeys(linears(), scheme), "lm_head": None}
        kv_cache = "fp8" if case.kv_cache else "none"
        for index in range(_LAYERS if case.kv_cache else 0):
            stored = form.encode_kv(*kv_scales(index))
            tensors |= {f"model.layers.{index}.self_attn.{name}": to_torch(each) for name, each in stored.items()}
        values["quantization_config"] = form.config(schemes, kv_cache=kv_cache)
        for file, content in form.extra_files(schemes, kv_cache).items():
            (folder / file).write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def manifest(checkpoint: Path, *, digests: bool) -> dict[str, Any]:
    """config.json, and of each rank every tensor's dtype and shape, with the digest of its bytes where they count."""
    ranks = []
    for rank in range(len(list(checkpoint.glob("rank*.safetensors")))):
        file = checkpoint / f"rank{rank}.safetensors"
        data = file.read_bytes()
        ranks.append(
            {
                name: f"{info.dtype} {'x'.join(map(str, info.shape))}"
                + (" " + sha256(data[info.offset : info.offset + info.size]).hexdigest()[:16] if digests else "")
                for name, info in sorted(read_header(file).items())
            }
        )
    return {"config": json.loads((checkpoint / "config.json").read_text()), "ranks": ranks}


def write_ours(case: Case, folder: Path) -> Path:
    """Our TensorRT-LLM checkpoint of a case."""
    from llmopt.compilers.trt_llm import checkpoint
    from llmopt.compilers.trt_llm.settings import Settings

    source, out = folder / "source", folder / "checkpoint"
    source.mkdir()
    write_source(case, source)
    settings = Settings(mode="engine", tensor_parallel=case.tensor_parallel, pipeline_parallel=case.pipeline_parallel)
    opened = open_model(source)
    checkpoint.write(opened, checkpoint.check(opened, settings), out, silent)
    return out


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What of two manifests differs beyond what is meant to (`MEANT`, `MORE`), in words; none is as it must be."""
    found = []
    for key, value in theirs["config"].items():
        if ours["config"].get(key, "nothing") != value:
            found.append(f"config: `{key}` is {ours['config'].get(key, 'nothing')}, theirs is {value}")
    for key in ours["config"].keys() - theirs["config"].keys() - MORE_CONFIG:
        found.append(f"config: `{key}` is {ours['config'][key]}, and they have none")
    for rank, (one, other) in enumerate(zip(theirs["ranks"], ours["ranks"], strict=True)):
        for name in one.keys() | other.keys():
            their, our = one.get(name, "nothing"), other.get(name, "nothing")
            if their == "nothing" and name.endswith(MORE_TENSORS):
                continue
            if not our.startswith(their):
                found.append(f"rank {rank}: `{name}` is {our}, theirs is {their}")
    return sorted(found)


#: What only we write. TensorRT-LLM asks for `prequant_scaling_factor` wherever the algorithm can have it; ModelOpt
#: leaves it out where it did not search for one. Ours are ones.
MORE_TENSORS = (".prequant_scaling_factor",)
MORE_CONFIG = {"rotary_base", "attn_bias", "mlp_bias", "qwen_type", "seq_length"}
