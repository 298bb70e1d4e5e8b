"""What the layouts that we write mean to a machine's own products.

Weights are made of known codes and scales, written by us, read back by the layouts' documentation alone, and multiplied
as TensorRT-LLM's kernels do: FP8 with FP8, INT8 with INT8, 4-bit weights unpacked to halves. The reference is the
product of the known weights in float64 on the CPU.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llmopt.artifacts.outcome import silent
from llmopt.compilers.trt_llm import checkpoint
from llmopt.compilers.trt_llm.settings import Settings
from llmopt.formats.base import QuantizedWeight, exact_scale
from llmopt.formats.dequantized import to_torch
from llmopt.formats.reading import get_format, open_model
from llmopt.formats.scheme import KVCache, Scheme

Tensors: TypeAlias = Mapping[str, torch.Tensor]

TOKENS = 32  # cuBLAS's INT8 product wants more than 16
INPUT_SCALE = 2.0**-5
KV_SCALES = (2.0, 4.0)  # of k and v
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
AWQ = Scheme(bits=4, group_size=64, symmetric=True)
W8A16 = Scheme(bits=8, group_size=-1, symmetric=True)
W8A8 = Scheme(bits=8, group_size=-1, symmetric=True, activations="static")
W8A8_TOKENS = Scheme(bits=8, group_size=-1, symmetric=True, activations="dynamic")
FP8 = Scheme(bits=8, group_size=0, symmetric=True, activations="static", kind="float")
FP8_ROWS = Scheme(bits=8, group_size=-1, symmetric=True, activations="dynamic", kind="float")


@dataclass(frozen=True)
class Known:
    """A checkpoint on disk, and the weights [O, I] that its codes stand for, float64 by their prefix."""

    path: Path
    weights: Mapping[str, np.ndarray]


MakeKnown: TypeAlias = Callable[..., Known]


@pytest.fixture(scope="session")
def known(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> MakeKnown:
    """known(scheme, format, kv_cache="none", smooth=False) -> a Llama of two blocks whose linears have random codes.

    smooth: the input of each is multiplied by one or two, as another tool's AWQ or SmoothQuant would have it.
    """
    plain = make_checkpoint("llama")

    def make(scheme: Scheme | None, encoding: str, kv_cache: KVCache = "none", *, smooth: bool = False) -> Known:
        return _known(plain, tmp_path_factory.mktemp("known"), scheme, encoding, kv_cache, smooth)

    return make


def _known(plain: Path, out: Path, scheme: Scheme | None, encoding: str, kv_cache: KVCache, smooth: bool) -> Known:
    shutil.copytree(plain, out, dirs_exist_ok=True)
    tensors = read(plain / "model.safetensors")
    weights = {name.removesuffix(".weight"): value.double().numpy() for name, value in tensors.items()}
    if scheme is None:
        return Known(out, weights)
    config = json.loads((plain / "config.json").read_text())
    form, random = get_format(encoding), np.random.default_rng(0)
    prefixes = [f"model.layers.{index}.{linear}" for index in range(2) for linear in LINEARS]
    shared = exact_scale(random.uniform(0.001, 0.01, 2 * len(LINEARS)).astype(np.float32))
    for number, prefix in enumerate(prefixes):
        if prefix.rpartition(".")[2] in ("k_proj", "v_proj", "up_proj"):
            shared[number] = shared[number - 1]  # linears that are multiplied as one have one scale in FP8
        codes, weight = _random(random, tensors.pop(f"{prefix}.weight").shape, scheme, shared[number])
        weights[prefix] = weight
        stored = form.encode(codes, scheme, "BF16", INPUT_SCALE if scheme.activations == "static" else None)
        tensors |= {f"{prefix}.{suffix}": to_torch(part) for suffix, part in stored.items()}
        if smooth:
            smooth_I = torch.arange(weight.shape[1]) % 64 % 3 % 2 + 1  # one where `inputs` has its largest
            tensors[f"{prefix}.pre_quant_scale"] = smooth_I.to(torch.bfloat16)
            weights[prefix] = weight * smooth_I.numpy()
    if kv_cache != "none":
        for index in range(2):
            scales = form.encode_kv(*KV_SCALES).items()
            tensors |= {f"model.layers.{index}.self_attn.{name}": to_torch(part) for name, part in scales}
    save_file(tensors, out / "model.safetensors")
    schemes = {**dict.fromkeys(prefixes, scheme), "lm_head": None}
    config["quantization_config"] = form.config(schemes, kv_cache=kv_cache)
    for name, text in {"config.json": config, **form.extra_files(schemes, kv_cache)}.items():
        (out / name).write_text(json.dumps(text))
    return Known(out, weights)


def _random(
    random: np.random.Generator, shape: tuple[int, int], scheme: Scheme, shared: float
) -> tuple[QuantizedWeight, np.ndarray]:
    """Any codes that the scheme has, and what they stand for by its definition."""
    codes = random.integers(0, 1 << scheme.bits, shape).astype(np.uint8)
    if scheme.kind == "float":
        codes[(codes & 0x7F) == 0x7F] = 0  # NaN
        numbers = torch.from_numpy(codes).view(torch.float8_e4m3fn).double().numpy()
    else:
        numbers = codes.astype(np.float64) - (1 << (scheme.bits - 1))
    scale = exact_scale(random.uniform(0.001, 0.01, (shape[0], scheme.groups(shape[1]))).astype(np.float32))
    if scheme.group_size == 0:
        scale[:] = shared
    weight = QuantizedWeight(codes_OI=codes, scale_OG=scale, zero_OG=None, bits=scheme.bits, kind=scheme.kind)
    return weight, numbers * np.repeat(scale.astype(np.float64), shape[1] // scale.shape[1], axis=1)


def read(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def part_of(tensors: Tensors, prefix: str, device: str) -> dict[str, torch.Tensor]:
    """The tensors of one linear, by the suffix after its name."""
    start = f"{prefix}."
    found = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
    assert found, f"no tensors of {prefix}"
    return {name: value.to(device) for name, value in found.items()}


# Products. x_TI is float32 on the device; its numbers are such that rounding it changes none.


def half_product(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    return x_TI.to(weight_OI.dtype) @ weight_OI.T


def fp8_product(
    x_TI: torch.Tensor, weight_OI: torch.Tensor, x_scale: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """scale: of the tensor (), or of rows [1, O] with x_scale of tokens [T, 1]."""
    codes = (x_TI / x_scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    dtype = torch.float32 if scale.ndim == 0 else torch.bfloat16  # all that cuBLAS has for rows
    return torch._scaled_mm(codes, weight_OI.T, scale_a=x_scale, scale_b=scale, out_dtype=dtype)


def int8_product(
    x_TI: torch.Tensor, weight_OI: torch.Tensor, x_scale: torch.Tensor, scale_O: torch.Tensor
) -> torch.Tensor:
    codes = (x_TI / x_scale).round().clamp(-128, 127).to(torch.int8)
    return torch._int_mm(codes, weight_OI.T) * x_scale * scale_O


def unpacked(packed: torch.Tensor, scale_OG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Two's-complement nibbles of two consecutive rows in a byte, the even one low, times their groups' scales."""
    bytes_ = packed.view(torch.uint8).int()
    nibbles = torch.stack([bytes_ & 15, bytes_ >> 4], dim=1).reshape(-1, bytes_.shape[1])
    codes_OI = torch.where(nibbles > 7, nibbles - 16, nibbles)
    group_size = codes_OI.shape[1] // scale_OG.shape[1]
    return (codes_OI * scale_OG.repeat_interleave(group_size, dim=1)).to(dtype)


def per_token(x_TI: torch.Tensor, largest: float) -> torch.Tensor:
    return x_TI.abs().amax(dim=1, keepdim=True) / largest


def skip_without_kernels(device: str, scheme: Scheme | None) -> None:
    """FP8 products begin with Ada (8.9), those with a scale for each row with Hopper."""
    if device == "cuda" and scheme is not None and scheme.kind == "float":
        needed = (8, 9) if scheme.group_size == 0 else (9, 0)
        if (here := torch.cuda.get_device_capability()) < needed:
            pytest.skip(f"FP8 products need capability {needed}, and this GPU has {here}")


def error(found: torch.Tensor, x_TI: torch.Tensor, weight_OI: np.ndarray) -> float:
    """The largest difference to the product in float64, as a share of its largest number."""
    expected = x_TI.cpu().double().numpy() @ weight_OI.T
    assert found.shape == expected.shape
    return float(np.abs(found.cpu().double().numpy() - expected).max() / np.abs(expected).max())


def inputs(width: int, device: str, *, largest: int = 15) -> torch.Tensor:
    """Whole multiples of INPUT_SCALE up to `largest` of them, which every row reaches: nothing has to be rounded.

    Up to 15 are numbers of E4M3; 127 makes INPUT_SCALE the scale of every token that is rounded to INT8, 448 to FP8.
    """
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(-15, 16, (TOKENS, width), generator=generator)
    steps[:, 0] = largest
    return (steps * INPUT_SCALE).to(device)


# ModelOpt's format, which bundles have: every linear by its Hugging Face name, scales are F32.


def modelopt_awq(tensors: Tensors, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    smooth_I = tensors["pre_quant_scale"]
    x_TI = inputs(len(smooth_I), device)
    weight_OI = unpacked(tensors["weight"], tensors["weight_scale"], torch.float16)
    return x_TI, half_product(x_TI * smooth_I, weight_OI)


def modelopt_w8a16(tensors: Tensors, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    weight_OI = (tensors["weight"] * tensors["weight_scale"][:, None]).to(torch.bfloat16)
    x_TI = inputs(weight_OI.shape[1], device)
    return x_TI, half_product(x_TI, weight_OI)


def modelopt_w8a8(tensors: Tensors, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    x_TI = inputs(tensors["weight"].shape[1], device, largest=127)
    return x_TI, int8_product(x_TI, tensors["weight"], tensors["input_scale"], tensors["weight_scale"])


def modelopt_fp8(tensors: Tensors, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    x_TI = inputs(tensors["weight"].shape[1], device)
    return x_TI, fp8_product(x_TI, tensors["weight"], tensors["input_scale"], tensors["weight_scale"])


def modelopt_fp8_rows(tensors: Tensors, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    x_TI = inputs(tensors["weight"].shape[1], device, largest=448)
    return x_TI, fp8_product(x_TI, tensors["weight"], per_token(x_TI, 448), tensors["weight_scale"][None])


Product: TypeAlias = Callable[[Tensors, str], tuple[torch.Tensor, torch.Tensor]]

#: By ModelOpt's `quant_algo`: the scheme, the product, and how far it may be off, as a share of the largest number.
#: Halves are rounded at the end (2**-11 of F16, 2**-8 of BF16), partial sums too on some GPUs; W8A16's weights are
#: rounded to BF16 before. INT8 products add up whole numbers, FP8 products in fewer bits than F32 on some GPUs.
MODELOPT: Mapping[str, tuple[Scheme, Product, float]] = {
    "W4A16_AWQ": (AWQ, modelopt_awq, 2e-3),
    "W8A16": (W8A16, modelopt_w8a16, 1.6e-2),
    "W8A8_SQ_PER_CHANNEL": (W8A8, modelopt_w8a8, 1e-6),
    "FP8": (FP8, modelopt_fp8, 2e-3),
    "FP8_PER_CHANNEL_PER_TOKEN": (FP8_ROWS, modelopt_fp8_rows, 1.6e-2),
}


@pytest.mark.parametrize("algorithm", MODELOPT)
def test_modelopts_layout_multiplies_as_the_weights_it_stands_for(
    known: MakeKnown, device: str, algorithm: str
) -> None:
    scheme, product, allowed = MODELOPT[algorithm]
    skip_without_kernels(device, scheme)
    source = known(scheme, "modelopt")
    tensors = read(source.path / "model.safetensors")
    assert json.loads((source.path / "config.json").read_text())["quantization_config"]["quant_algo"] == algorithm
    found = {}
    for linear in LINEARS:
        x_TI, y_TO = product(part_of(tensors, f"model.layers.1.{linear}", device), device)
        found[linear] = error(y_TO, x_TI, source.weights[f"model.layers.1.{linear}"])
    tell(f"ModelOpt {algorithm}", device, found)
    assert max(found.values()) < allowed


# TensorRT-LLM's unified checkpoint, which engines are built of: q, k and v are one linear, `mlp.fc` is the gate of
# Hugging Face, and each rank has a part. Every scale that is one number has the shape (1,).


def engine_plain(tensors: Tensors, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    x_TI = inputs(tensors["weight"].shape[1], device)
    return x_TI, half_product(x_TI, tensors["weight"])


def engine_awq(tensors: Tensors, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    smooth_I = tensors["prequant_scaling_factor"]
    x_TI = inputs(len(smooth_I), device)
    weight_OI = unpacked(tensors["weight"], tensors["weights_scaling_factor"], torch.float16)
    return x_TI, half_product(x_TI * smooth_I, weight_OI)


def engine_w8a8(tensors: Tensors, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    x_TI = inputs(tensors["weight"].shape[1], device, largest=127)
    smoothed = x_TI * tensors["prequant_scaling_factor"]
    x_scale, scale_O = tensors["activation_scaling_factor"], tensors["weights_scaling_factor"]
    return x_TI, int8_product(smoothed, tensors["weight"], x_scale, scale_O)


def engine_w8a8_tokens(tensors: Tensors, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    x_TI = inputs(tensors["weight"].shape[1], device, largest=127)
    smoothed = x_TI / tensors["smoother"] if "smoother" in tensors else x_TI
    scale = tensors["per_channel_scale"]
    return x_TI, int8_product(smoothed, tensors["weight"], per_token(smoothed, 127), scale)


def engine_fp8(tensors: Tensors, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    x_TI = inputs(tensors["weight"].shape[1], device)
    x_scale, scale = tensors["activation_scaling_factor"][0], tensors["weights_scaling_factor"][0]
    return x_TI, fp8_product(x_TI, tensors["weight"], x_scale, scale)


#: By TensorRT-LLM's `quant_algo`, as in MODELOPT.
ENGINE: Mapping[str | None, tuple[Scheme | None, Product, float]] = {
    None: (None, engine_plain, 1.6e-2),
    "W4A16_AWQ": (AWQ, engine_awq, 2e-3),
    "W8A8_SQ_PER_CHANNEL": (W8A8, engine_w8a8, 1e-6),
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": (W8A8_TOKENS, engine_w8a8_tokens, 1e-6),
    "FP8": (FP8, engine_fp8, 2e-3),
}


def rank_weights(weights: Mapping[str, np.ndarray], layer: int, rank: int, ranks: int) -> dict[str, np.ndarray]:
    """What tensor-parallel rank `rank` of `ranks` has of a block, by the engine's names."""

    def rows(name: str) -> np.ndarray:
        return np.split(weights[f"model.layers.{layer}.{name}"], ranks)[rank]

    def columns(name: str) -> np.ndarray:
        return np.split(weights[f"model.layers.{layer}.{name}"], ranks, axis=1)[rank]

    return {
        "attention.qkv": np.concatenate([rows(f"self_attn.{name}_proj") for name in "qkv"]),
        "attention.dense": columns("self_attn.o_proj"),
        "mlp.fc": rows("mlp.gate_proj"),
        "mlp.gate": rows("mlp.up_proj"),
        "mlp.proj": columns("mlp.down_proj"),
    }


def engine_checkpoint(source: Known, out: Path, tensor_parallel: int, pipeline_parallel: int) -> list[Tensors]:
    """The tensors of every rank, written by us, with config.json's `quant_algo` checked elsewhere."""
    settings = Settings(
        version="1.2.1", mode="engine", tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel
    )
    opened = open_model(source.path)
    checkpoint.write(opened, checkpoint.check(opened, settings), out, silent)
    return [read(out / f"rank{rank}.safetensors") for rank in range(tensor_parallel * pipeline_parallel)]


@pytest.mark.parametrize(("tensor_parallel", "pipeline_parallel"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("algorithm", ENGINE)
def test_each_rank_of_an_engine_multiplies_as_its_part_of_the_weights(
    known: MakeKnown,
    device: str,
    tmp_path: Path,
    algorithm: str | None,
    tensor_parallel: int,
    pipeline_parallel: int,
) -> None:
    source = known(ENGINE[algorithm][0], "compressed-tensors")
    check_ranks(source, device, tmp_path, algorithm, tensor_parallel, pipeline_parallel)


@pytest.mark.parametrize("algorithm", ["W4A16_AWQ", "W8A8_SQ_PER_CHANNEL"])
def test_inputs_that_are_scaled_first_are_scaled_on_each_rank(
    known: MakeKnown, device: str, tmp_path: Path, algorithm: str
) -> None:
    source = known(ENGINE[algorithm][0], "modelopt", smooth=True)
    check_ranks(source, device, tmp_path, algorithm, 2, 1)


def check_ranks(
    source: Known, device: str, out: Path, algorithm: str | None, tensor_parallel: int, pipeline_parallel: int
) -> None:
    scheme, product, allowed = ENGINE[algorithm]
    skip_without_kernels(device, scheme)
    ranks = engine_checkpoint(source, out, tensor_parallel, pipeline_parallel)
    assert json.loads((out / "config.json").read_text())["quantization"]["quant_algo"] == algorithm
    each, found = 2 // pipeline_parallel, {}
    for rank, tensors in enumerate(ranks):
        stage, part = divmod(rank, tensor_parallel)
        for layer in range(each):
            wanted = rank_weights(source.weights, stage * each + layer, part, tensor_parallel)
            for linear, weight_OI in wanted.items():
                x_TI, y_TO = product(part_of(tensors, f"transformer.layers.{layer}.{linear}", device), device)
                found[f"{rank} {layer} {linear}"] = error(y_TO, x_TI, weight_OI)
    tell(f"engine {algorithm} TP {tensor_parallel} PP {pipeline_parallel}", device, found)
    assert len(found) == 2 * 5 * tensor_parallel
    assert max(found.values()) < allowed


def test_the_heads_of_the_ranks_are_the_logits_in_order(known: MakeKnown, device: str, tmp_path: Path) -> None:
    source = known(None, "compressed-tensors")
    ranks = engine_checkpoint(source, tmp_path, 2, 1)
    parts = [engine_plain(part_of(tensors, "lm_head", device), device) for tensors in ranks]
    logits = torch.cat([y_TO for _, y_TO in parts], dim=1)
    assert error(logits, parts[0][0], source.weights["lm_head"]) < 1.6e-2
    table = torch.cat([tensors["transformer.vocab_embedding.weight"] for tensors in ranks])
    assert torch.equal(table, read(source.path / "model.safetensors")["model.embed_tokens.weight"])


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_kv_cache_gives_back_what_was_put_into_it(
    known: MakeKnown, device: str, tmp_path: Path, kind: KVCache
) -> None:
    """Each scale is the size of a step: keys that are whole steps come back as they were."""
    source = known(W8A8 if kind == "int8" else FP8, "compressed-tensors", kind)
    (tensors,) = engine_checkpoint(source, tmp_path / "engine", 1, 1)
    scales = part_of(tensors, "transformer.layers.1.attention", device)
    assert scales["k_cache_scaling_factor"].tolist() == [KV_SCALES[0]]
    assert scales["v_cache_scaling_factor"].tolist() == [KV_SCALES[1]]
    assert scales["kv_cache_scaling_factor"].tolist() == [max(KV_SCALES)]
    for name in ("k", "v"):
        scale = scales[f"{name}_cache_scaling_factor"]
        values = torch.arange(-15.0, 16.0, device=device) * scale
        dtype = torch.float8_e4m3fn if kind == "fp8" else torch.int8
        assert torch.equal((values / scale).to(dtype).float() * scale, values)


#: How a family stores q, k and v: the name of their linear, and from its rows, seen as heads, to those of each.
FUSED: Mapping[str, tuple[str, Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray, np.ndarray]]]] = {
    # Each head's q, k and v follow each other (GPTNeoXAttention).
    "gpt_neox": (
        "gpt_neox.layers.0.attention.query_key_value",
        lambda heads, _: (heads[0::3], heads[1::3], heads[2::3]),
    ),
    # All heads of q, then the one of k and the one of v (FalconAttention with `multi_query`).
    "falcon": (
        "transformer.h.0.self_attention.query_key_value",
        lambda heads, _: (heads[:-2], heads[-2:-1], heads[-1:]),
    ),
    # Each KV head after the heads of q that share it (FalconAttention with `new_decoder_architecture`).
    "falcon-new": (
        "transformer.h.0.self_attention.query_key_value",
        lambda heads, kv: tuple(
            part.reshape(-1, *heads.shape[1:])
            for part in np.split(heads.reshape(kv, -1, *heads.shape[1:]), [-2, -1], axis=1)
        ),
    ),
}


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("family", FUSED)
def test_heads_that_a_family_stores_together_go_to_their_ranks(
    make_checkpoint: Callable[..., Path], device: str, tmp_path: Path, family: str, tensor_parallel: int
) -> None:
    own_config: Mapping[str, Any] = {
        "gpt_neox": {"intermediate_size": 512},  # TensorRT-LLM has no other than four times the hidden size
        "falcon-new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    }
    path = make_checkpoint(family.partition("-")[0], **own_config.get(family, {}))
    prefix, split = FUSED[family]
    weight_OI = read(path / "model.safetensors")[f"{prefix}.weight"].double().numpy()
    q, k, v = split(weight_OI.reshape(-1, 32, weight_OI.shape[1]), 2)
    ranks = engine_checkpoint(Known(path, {}), tmp_path, tensor_parallel, 1)
    found = {}
    for rank, tensors in enumerate(ranks):
        # Where there are fewer KV heads than ranks, every rank has all of them.
        own = [
            np.split(heads, tensor_parallel)[rank] if len(heads) >= tensor_parallel else heads for heads in (q, k, v)
        ]
        x_TI, y_TO = engine_plain(part_of(tensors, "transformer.layers.0.attention.qkv", device), device)
        found[str(rank)] = error(y_TO, x_TI, np.concatenate(own).reshape(-1, weight_OI.shape[1]))
    tell(f"engine {family} qkv TP {tensor_parallel}", device, found)
    assert max(found.values()) < 1.6e-2


def tell(layout: str, device: str, errors: Mapping[str, float]) -> None:
    """The figure for the documentation: `pytest -s`."""
    name = torch.cuda.get_device_name() if device == "cuda" else device
    print(f"{layout} on {name}: relative error {max(errors.values()):.1e} over {len(errors)} linears")


@pytest.mark.parametrize("wrong", ["odd rows low", "unsigned", "scales of the next group"])
def test_a_wrong_reading_of_four_bits_would_show(known: MakeKnown, wrong: str) -> None:
    source = known(AWQ, "modelopt")
    tensors: dict[str, Any] = part_of(read(source.path / "model.safetensors"), "model.layers.0.self_attn.q_proj", "cpu")
    packed = tensors["weight"].view(torch.uint8)
    if wrong == "odd rows low":
        tensors["weight"] = packed >> 4 | packed << 4
    elif wrong == "unsigned":
        tensors["weight"] = packed ^ 0x88
    else:
        tensors["weight_scale"] = tensors["weight_scale"].roll(1, dims=1)
    x_TI, y_TO = modelopt_awq(tensors, "cpu")
    assert error(y_TO, x_TI, source.weights["model.layers.0.self_attn.q_proj"]) > 0.05


def test_every_fp8_code_is_the_number_that_its_definition_gives(device: str) -> None:
    """Micikevicius et al., arXiv:2209.05433: four bits of exponent with bias 7, three of mantissa, no infinities."""
    found = torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float().cpu()
    for code, value in enumerate(found.tolist()):
        exponent, mantissa = code >> 3 & 15, code & 7
        size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        if (exponent, mantissa) == (15, 7):
            assert np.isnan(value)
        else:
            assert value == (-size if code > 127 else size)
