"""Tiny random checkpoints of every family, quantized by rounding, and how to run what was compiled from them."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmopt.backends import load
from llmopt.formats.base import QuantizedWeight, Scheme, exact_scale
from llmopt.formats.reading import get_format, open_quantized
from llmopt.models.checkpoint import Checkpoint
from llmopt.models.config import DecoderConfig

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
EXACT = {"lm_head": "keep", "activation_group": 0, "precision": "f32"}
INPUT_SCALE = 0.0625  # of static activations: clips a few of them


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog, then over the other"] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[0], bos_token=special[0], pad_token=special[0]
    )
    fast.chat_template = CHAT_TEMPLATE
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


Make = Callable[..., Path]
SchemeOf = Callable[[str], Scheme | None]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Make:
    """make(model_type, dtype="bfloat16", **config) -> folder; the same arguments give the same folder."""
    made: dict[str, Path] = {}

    def make(model_type: str = "llama", dtype: str = "bfloat16", **config: Any) -> Path:
        key = json.dumps([model_type, dtype, config], sort_keys=True)
        if key not in made:
            made[key] = _random_checkpoint(tmp_path_factory.mktemp(model_type), model_type, dtype, config)
            shutil.copytree(tokenizer_folder, made[key], dirs_exist_ok=True)
        return made[key]

    return make


def _random_checkpoint(folder: Path, model_type: str, dtype: str, config: dict[str, Any]) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SHAPE | config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def quantize(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """quantize(plain, scheme, encoding, head) -> folder with every linear of every block (and the head) rounded.

    `scheme` may be a function of the linear's prefix; None leaves one plain.
    """

    def make(
        plain: Path, scheme: Scheme | SchemeOf, encoding: str = "compressed-tensors", *, head: bool = False
    ) -> Path:
        scheme_of = (lambda _: scheme) if isinstance(scheme, Scheme) else scheme
        return _rounded_checkpoint(plain, tmp_path_factory.mktemp("quantized"), scheme_of, encoding, head)

    return make


def _rounded_checkpoint(plain: Path, out: Path, scheme_of: SchemeOf, encoding: str, head: bool) -> Path:
    from safetensors.torch import save_file

    from llmopt.formats.dequantized import to_torch

    shutil.copytree(plain, out, dirs_exist_ok=True)
    checkpoint, form = Checkpoint.open(plain), get_format(encoding)
    config = DecoderConfig.read(checkpoint)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.tensors}
    schemes = {prefix: scheme_of(prefix) for prefix in [*linears(config), *(["lm_head"] if head else [])]}
    for prefix, scheme in schemes.items():
        if scheme is None:
            continue
        input_scale = INPUT_SCALE if scheme.activations == "static" else None
        weight = rounded(checkpoint.float_array(f"{prefix}.weight"), scheme)
        del tensors[f"{prefix}.weight"]
        for suffix, stored in form.encode(weight, scheme, config.dtype, input_scale).items():
            tensors[f"{prefix}.{suffix}"] = to_torch(stored)
    save_file(tensors, out / "model.safetensors")
    schemes.setdefault("lm_head", None)
    values = dict(checkpoint.config) | {"quantization_config": form.config(schemes)}
    (out / "config.json").write_text(json.dumps(values))
    return out


def linears(config: DecoderConfig) -> list[str]:
    """The prefixes of every linear of every block."""
    return [f"{config.block(i)}.{linear}" for i in range(config.layers) for linear in config.linear_shapes(i)]


def rounded(weight_OI: np.ndarray, scheme: Scheme) -> QuantizedWeight:
    """Round to nearest; asymmetric zero points lie off the middle."""
    grouped = weight_OI.reshape(len(weight_OI), scheme.groups(weight_OI.shape[1]), -1)
    top = (1 << scheme.bits) - 1
    middle = np.uint8(1 << (scheme.bits - 1))
    if scheme.kind == "float":
        return _rounded_to_fp8(weight_OI, scheme)
    if scheme.symmetric:
        scale = exact_scale(np.abs(grouped).max(axis=2) / middle)
        zero = np.full(scale.shape, middle)
    else:
        low, high = np.minimum(grouped.min(axis=2), 0), np.maximum(grouped.max(axis=2), 0)
        scale = exact_scale((high - low) / np.float32(top))
        zero = np.rint(-low / scale).clip(0, top).astype(np.uint8)
    codes = (np.rint(grouped / scale[:, :, None]) + zero[:, :, None]).clip(0, top).astype(np.uint8)
    return QuantizedWeight(
        codes_OI=codes.reshape(weight_OI.shape),
        scale_OG=scale,
        zero_OG=None if scheme.symmetric else zero,
        bits=scheme.bits,
    )


def _rounded_to_fp8(weight_OI: np.ndarray, scheme: Scheme) -> QuantizedWeight:
    import torch

    largest = np.abs(weight_OI).max(axis=1, keepdims=True)
    scale = exact_scale((largest if scheme.group_size else np.full_like(largest, largest.max())) / 448)
    steps = torch.from_numpy(weight_OI / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    codes = steps.view(torch.uint8).numpy()
    return QuantizedWeight(codes_OI=codes, scale_OG=scale, zero_OG=None, bits=8, kind="float")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """compiled(model, **settings) -> engine folder; `exact=True` stands for the settings of exact arithmetic."""
    from llmopt import compilers
    from llmopt.artifacts.outcome import silent

    def make(model: Path, *, exact: bool = True, **settings: Any) -> Path:
        out = tmp_path_factory.mktemp("engine")
        target = compilers.resolve({"aot": False} | (EXACT if exact else {}) | settings)
        compilers.compile_model(model, target, out, silent)
        return out

    return make


class Engine:
    """An engine run as it is, without openvino-genai."""

    def __init__(self, folder: Path) -> None:
        self.description = json.loads((folder / "engine.json").read_text())
        core = load("openvino").Core()
        self.compiled = core.compile_model(folder / "openvino_model.xml", "CPU", self.description["properties"])
        self.request = self.compiled.create_infer_request()
        self.seen = 0

    def __call__(self, ids: list[int]) -> np.ndarray:
        """Logits [T, vocabulary] of the next tokens of one sequence."""
        positions = np.arange(self.seen, self.seen + len(ids), dtype=np.int64)[None]
        self.seen += len(ids)
        self.request.infer(
            {
                "input_ids": np.array([ids], np.int64),
                "attention_mask": np.ones((1, self.seen), np.int64),
                "position_ids": positions,
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        return self.request.get_tensor("logits").data[0].copy()

    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        logits, out = self(prompt), []
        for _ in range(tokens):
            out.append(int(logits[-1].argmax()))
            logits = self(out[-1:])
        return out


@pytest.fixture(scope="session")
def engine() -> type[Engine]:
    return Engine


class Reference:
    """transformers' model in float32, with the dequantized weights of `quantized` where given.

    Static activation scales are not applied unless `round_activations` is called.
    """

    def __init__(self, plain: Path, quantized: Path | None = None) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
        self.weights: dict[str, QuantizedWeight] = {}
        self._modules = dict(self.model.named_modules())
        if quantized is None:
            return
        checkpoint = Checkpoint.open(quantized)
        reader = open_quantized(checkpoint)
        for prefix in [*linears(DecoderConfig.read(checkpoint)), "lm_head"]:
            scales = ("weight_scale", "weight_scale_inv", "scales")
            if reader and any(f"{prefix}.{suffix}" in checkpoint.tensors for suffix in scales):
                weight = reader.linear(prefix, tuple(self._modules[prefix].weight.shape))
                assert weight is not None
                self.weights[prefix] = weight
                self._modules[prefix].weight.data = torch.from_numpy(weight.dequantize())

    def round_activations(self) -> None:
        """Round the input of every quantized linear to int8 with the static scale."""

        def rounded_input(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return ((inputs[0] / INPUT_SCALE).round().clamp(-128, 127) * INPUT_SCALE,)

        for prefix in self.weights:
            self._modules[prefix].register_forward_pre_hook(rounded_input)

    def __call__(self, ids: list[int]) -> np.ndarray:
        """Logits [T, vocabulary]."""
        import torch

        with torch.no_grad():
            found: np.ndarray = self.model(torch.tensor([ids])).logits[0].numpy()
        return found

    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        ids = list(prompt)
        for _ in range(tokens):
            ids.append(int(self(ids)[-1].argmax()))
        return ids[len(prompt) :]

    def error(self, found: np.ndarray, ids: list[int]) -> float:
        """The largest difference of `found` to the logits of `ids`, as a share of the largest logit."""
        expected = self(ids)
        return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="session")
def reference() -> type[Reference]:
    return Reference


@pytest.fixture(scope="session")
def batched_greedy() -> Callable[[Path, list[list[int]], int], list[list[int]]]:
    """Tokens that openvino-genai's continuous batching continues each prompt with."""

    def generate(folder: Path, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        genai, ov = load("openvino_genai"), load("openvino")
        scheduler = genai.SchedulerConfig()
        scheduler.num_kv_blocks = 64
        properties = json.loads((folder / "engine.json").read_text())["properties"]
        pipeline = genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties, {}, {})
        config = genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = tokens, False, True
        inputs = [ov.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        return [result.m_generation_ids[0] for result in pipeline.generate(inputs, [config] * len(inputs))]

    return generate


@pytest.fixture(scope="session")
def read_constant() -> Callable[[Path, str], tuple[str, tuple[int, ...], np.ndarray]]:
    """(element type, shape, bytes) of the constant `name` of an engine, read from its files without OpenVINO."""

    def read(folder: Path, name: str) -> tuple[str, tuple[int, ...], np.ndarray]:
        layer = ET.parse(folder / "openvino_model.xml").find(f"./layers/layer[@name='{name}']/data")
        assert layer is not None, f"no constant {name}"
        data = np.memmap(folder / "openvino_model.bin", np.uint8, "r")
        offset, size = int(layer.attrib["offset"]), int(layer.attrib["size"])
        shape = tuple(int(n) for n in layer.attrib["shape"].split(","))
        return layer.attrib["element_type"], shape, np.array(data[offset : offset + size])

    return read
