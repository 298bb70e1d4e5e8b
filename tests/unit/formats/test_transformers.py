"""The judge: transformers and compressed-tensors load what we write and compute what it stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from llmopt.formats.reading import open_model
from llmopt.formats.scheme import Scheme

W4 = Scheme(bits=4, group_size=32, symmetric=True)
W8 = Scheme(bits=8, group_size=-1, symmetric=True)
FP8 = Scheme(bits=8, group_size=-1, symmetric=True, kind="float")
FP8_TENSOR = replace(FP8, group_size=0)
SCALES = (0.03125, 0.125)  # of keys and values, in conftest.py

pytestmark = pytest.mark.filterwarnings("default")


def load(folder: Path, **options: Any) -> Any:
    """The model in float32; nothing of it is missing from the checkpoint, and nothing there is left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def logits(folder: Path, **options: Any) -> torch.Tensor:
    ids = torch.randint(0, 320, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = load(folder, **options)(ids).logits
    return found


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def mixture(prefix: str) -> Scheme | None:
    """Five kinds of linears in one checkpoint."""
    kinds = {"down": W8, "up": FP8_TENSOR, "q": replace(W4, symmetric=False), "o": None}
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


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_mixed_precision_computes_as_it_says(make_checkpoint: Any, encoded: Any, twin: Any) -> None:
    plain = make_checkpoint("llama")
    folder = encoded(plain, "compressed-tensors", mixture)
    reader = open_model(folder).reader
    assert reader is not None
    assert reader.scheme("model.layers.0.mlp.gate_proj") == W4
    assert reader.scheme("model.layers.1.mlp.gate_proj") == replace(W4, bits=3)
    assert reader.scheme("model.layers.0.self_attn.o_proj") is None
    widened = CompressedTensorsConfig(dequantize=True)  # packed zero points are not loaded otherwise
    assert apart(logits(folder, quantization_config=widened), logits(twin(plain, folder))) < 1e-5


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
