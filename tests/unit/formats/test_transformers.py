"""The judge: transformers and compressed-tensors load what we write and compute what it stands for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_targets
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmopt.formats.reading import open_model
from llmopt.formats.scheme import Scheme

W4 = Scheme(bits=4, group_size=32, symmetric=True)
W8 = Scheme(bits=8, group_size=-1, symmetric=True)
FP8 = Scheme(bits=8, group_size=-1, symmetric=True, kind="float")
FP8_TENSOR = replace(FP8, group_size=0)
SCALES = (0.03125, 0.125)  # of keys and values, in conftest.py

pytestmark = pytest.mark.filterwarnings("default")


def load(folder: Path) -> Any:
    """The model in float32; nothing of it is missing from the checkpoint, and nothing there is left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def logits(folder: Path) -> torch.Tensor:
    ids = torch.randint(0, 320, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = load(folder)(ids).logits
    return found


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def mixture(prefix: str) -> Scheme | None:
    """Five kinds of linears in one checkpoint, plain ones among them."""
    kinds = {"down": W8, "up": FP8_TENSOR, "o": None}
    if prefix == "model.layers.1.mlp.gate_proj":
        return replace(W4, bits=3)
    return kinds.get(prefix.rsplit(".", 1)[-1].removesuffix("_proj"), W4)


@pytest.mark.parametrize("scheme", [FP8, FP8_TENSOR], ids=["channel", "tensor"])
@pytest.mark.parametrize("activations", ["none", "dynamic", "static"])
def test_fp8_computes_as_it_says(
    make_checkpoint: Any, encoded: Any, twin: Any, scheme: Scheme, activations: Any
) -> None:
    """Rounded inputs move the logits a little; where inputs stay, only the order of sums does."""
    plain = make_checkpoint("llama")
    folder = encoded(plain, "compressed-tensors", lambda _: replace(scheme, activations=activations))
    assert apart(logits(folder), logits(twin(plain, folder))) < (1e-5 if activations == "none" else 0.1)


def test_mixed_precision_computes_as_it_says(make_checkpoint: Any, encoded: Any, twin: Any) -> None:
    plain = make_checkpoint("llama")
    folder = encoded(plain, "compressed-tensors", mixture)
    reader = open_model(folder).reader
    assert reader is not None
    assert reader.scheme("model.layers.0.mlp.gate_proj") == W4
    assert reader.scheme("model.layers.1.mlp.gate_proj") == replace(W4, bits=3)
    assert reader.scheme("model.layers.0.self_attn.o_proj") is None
    assert apart(logits(folder), logits(twin(plain, folder))) < 1e-5


def test_compressed_tensors_decompresses_mixed_precision_to_our_weights(
    make_checkpoint: Any, encoded: Any, dequantized: Any
) -> None:
    """Zero points too, which transformers 5.23 does not load beside other schemes."""
    folder = encoded(
        make_checkpoint("llama"),
        "compressed-tensors",
        lambda prefix: replace(W4, symmetric=False) if "q_proj" in prefix else mixture(prefix),
    )
    config = QuantizationConfig(**json.loads((folder / "config.json").read_text())["quantization_config"])
    targets = {target: group for group in config.config_groups.values() for target in group.targets}
    tensors, weights = load_file(folder / "model.safetensors"), dequantized(folder)
    assert len(weights) == 13
    for prefix, weight in weights.items():
        linear = torch.nn.Linear(1, 1)
        assert not match_targets(prefix, linear, config.ignore)
        group = targets[match_targets(prefix, linear, targets)[0]]
        state = {n.removeprefix(f"{prefix}."): t for n, t in tensors.items() if n.startswith(f"{prefix}.")}
        state["weight_scale"] = state["weight_scale"].float()
        theirs = BaseCompressor.get_value_from_registry(group.format).decompress(state, group)["weight"]
        assert torch.equal(theirs, torch.from_numpy(weight.copy()))


@pytest.mark.parametrize("kv_cache", ["fp8", "int8"])
def test_scales_of_the_kv_cache_arrive(make_checkpoint: Any, encoded: Callable[..., Path], kv_cache: str) -> None:
    folder = encoded(make_checkpoint("llama"), "compressed-tensors", lambda _: W4, kv_cache=kv_cache)
    attention = load(folder).model.layers[1].self_attn
    assert (attention.k_scale.item(), attention.v_scale.item()) == SCALES
    assert attention.quantization_scheme.input_activations.type == ("float" if kv_cache == "fp8" else "int")
    assert torch.isfinite(logits(folder)).all()
    reader = open_model(folder).reader
    assert reader is not None
    assert reader.encoding.kv_cache == kv_cache
    assert reader.kv_scales() == {f"model.layers.{i}.self_attn": SCALES for i in range(2)}
