"""The judge is transformers: our forward pass gives its logits, for every family and feature in the table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmopt.formats.dequantized import load_block, load_head
from llmopt.models.checkpoint import Checkpoint
from llmopt.models.config import DecoderConfig
from llmopt.models.decoder import embed, final_norm, position_tables
from llmopt.models.decoder import logits as head_logits

TOKENS = 50
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * i for i in range(16)],
    "long_factor": [2.0 + i for i in range(16)],
}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
ALL_TURN = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
NEW_FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2}
CASES = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    ("llama", {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    ("mistral", {"sliding_window": 20}),
    ("mistral", {"sliding_window": None, "head_dim": 64}),
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    ("qwen3", {"head_dim": 32}),
    ("qwen3", {"head_dim": 64, "attention_bias": True}),
    ("phi3", {"tie_word_embeddings": True}),
    ("phi3", {"num_key_value_heads": 4, "sliding_window": 20}),
    ("phi3", {"rope_parameters": ALL_TURN | {"partial_rotary_factor": 0.5}}),
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": TOKENS}),
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": TOKENS - 1}),
    ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False}),
    ("gemma3_text", {}),
    ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"] * 2, "rope_parameters": TWO_ROPES}),
    ("gpt_neox", {}),
    ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True, "rope_parameters": ALL_TURN}),
    ("gpt_neox", {"attention_bias": False, "hidden_act": "gelu_new"}),
    ("falcon", {}),
    ("falcon", {"multi_query": False, "bias": True, "tie_word_embeddings": False}),
    ("falcon", {"parallel_attn": False}),
    ("falcon", {"parallel_attn": False, "multi_query": False, "bias": True}),
    ("falcon", NEW_FALCON),
    ("falcon", NEW_FALCON | {"num_ln_in_parallel_attn": 1, "bias": True}),
    ("opt", {}),
    ("opt", {"enable_bias": False, "activation_function": "gelu", "tie_word_embeddings": False}),
    ("mixtral", {}),
    ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 20, "head_dim": 64}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 2, "num_experts": 16}),
]


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    checkpoint = Checkpoint.open(folder)
    config = DecoderConfig.read(checkpoint)
    x, tables = embed(checkpoint, config, ids), position_tables(config, ids.shape[1])
    for index in range(config.layers):
        x = load_block(checkpoint, config, None, index).forward(x, tables)
    return head_logits(final_norm(checkpoint, config)(x), load_head(checkpoint, config, None), config)


@pytest.mark.parametrize(("model_type", "options"), CASES)
@torch.no_grad()
def test_logits_are_those_of_transformers(
    make_checkpoint: Callable[..., Path], model_type: str, options: dict[str, Any]
) -> None:
    folder = make_checkpoint(model_type, **options)
    ids = torch.randint(0, 320, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
    got = logits(folder, ids)
    assert float((got - expected).norm() / expected.norm()) < 1e-5
