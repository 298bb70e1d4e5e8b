"""The judge is transformers: our forward pass gives its logits, for every family and feature in the table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmopt.formats.dequantized import load_block, load_float, load_head
from llmopt.models.checkpoint import Checkpoint
from llmopt.models.config import DecoderConfig
from llmopt.models.decoder import rms_norm, rotary_tables

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    ("llama", {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    ("mistral", {"sliding_window": 20}),
    ("mistral", {"sliding_window": None, "head_dim": 64}),
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0}),
    ("qwen3", {"head_dim": 32}),
    ("qwen3", {"head_dim": 64, "attention_bias": True}),
]


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    checkpoint = Checkpoint.open(folder)
    config = DecoderConfig.read(checkpoint)
    x = checkpoint.tensor(f"{config.family.embedding}.weight")[ids].float()
    rotary = rotary_tables(config, ids.shape[1])
    for index in range(config.layers):
        x = load_block(checkpoint, config, None, index).forward(x, rotary)
    norm = load_float(checkpoint, f"{config.family.final_norm}.weight")
    return rms_norm(x, norm, config.norm_eps) @ load_head(checkpoint, config, None).T


@pytest.mark.parametrize(("model_type", "options"), CASES)
@torch.no_grad()
def test_logits_are_those_of_transformers(
    make_checkpoint: Callable[..., Path], model_type: str, options: dict[str, Any]
) -> None:
    folder = make_checkpoint(model_type, **options)
    ids = torch.randint(0, 320, (2, 50), generator=torch.Generator().manual_seed(1))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
    got = logits(folder, ids)
    assert float((got - expected).norm() / expected.norm()) < 1e-5
