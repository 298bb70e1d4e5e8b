"""The judge is transformers: our forward pass gives its logits, for every family and feature in the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmopt.formats.dequantized import load_block, load_head
from llmopt.models.checkpoint import Checkpoint
from llmopt.models.config import DecoderConfig
from llmopt.models.decoder import State, embed, final_norm, position_tables
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


@pytest.mark.parametrize("model_type", ["llama", "phi3", "falcon", "gpt_neox", "gemma3_text", "mixtral"])
@torch.no_grad()
def test_watched_peaks_are_those_of_the_cache_of_transformers(
    make_checkpoint: Callable[..., Path], model_type: str
) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(model_type))
    config = DecoderConfig.read(checkpoint)
    ids = torch.randint(0, 320, (2, 16), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    cache = model(ids, use_cache=True).past_key_values
    x, tables = embed(checkpoint, config, ids), position_tables(config, 16)
    for index in range(config.layers):
        block = load_block(checkpoint, config, None, index)
        block.watch_kv = True
        state, sites = State(x, x), config.sites(index)
        for site in sites[: [site.role for site in sites].index("o") + 1]:
            state = block.enter(site, state, tables)
        layer = cache.layers[index]
        peak = torch.stack((layer.keys.abs().max(), layer.values.abs().max()))
        assert torch.allclose(state.kept["kv_peak"], peak, rtol=1e-4)
        x = block.forward(x, tables)


@pytest.mark.parametrize("model_type", ["llama", "falcon", "qwen3_moe", "gemma2"])
@torch.no_grad()
def test_a_walk_leaves_earlier_states_as_they_were(make_checkpoint: Callable[..., Path], model_type: str) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(model_type))
    config = DecoderConfig.read(checkpoint)
    ids = torch.randint(0, 320, (2, 16), generator=torch.Generator().manual_seed(1))
    x, tables = embed(checkpoint, config, ids), position_tables(config, 16)
    block = load_block(checkpoint, config, None, 0)
    states = [State(x, x)]
    for site in config.sites(0):
        states.append(block.enter(site, states[-1], tables))
    copies = [State(s.residual_BTH.clone(), s.site_input.clone(), clone(s.kept)) for s in states]
    out = block.leave(states[-1])
    for site, before, copy in zip(config.sites(0), states, copies, strict=False):
        after = block.enter(site, copy, tables)
        assert torch.equal(block.enter(site, before, tables).site_input, after.site_input)
        assert torch.equal(before.residual_BTH, copy.residual_BTH)
    assert torch.equal(block.leave(copies[-1]), out)


def clone(kept: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in kept.items()}


@torch.no_grad()
def test_a_walk_over_many_experts_keeps_no_more_than_twice_the_stream(make_checkpoint: Callable[..., Path]) -> None:
    """Neither the outputs that wait nor the number of times they are added up grows with the number of experts."""
    options = {"num_experts": 64, "num_experts_per_tok": 4, "num_hidden_layers": 1, "mlp_only_layers": []}
    checkpoint = Checkpoint.open(make_checkpoint("qwen3_moe", **options))
    config = DecoderConfig.read(checkpoint)
    ids = torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(1))
    x, tables = embed(checkpoint, config, ids), position_tables(config, 32)
    block, state, sums = load_block(checkpoint, config, None, 0), State(x, x), []
    seen = 0
    for site in config.sites(0):
        before, state = state, block.enter(site, state, tables)
        if site.expert is None:
            continue
        waiting = sum(len(tensor) for name, tensor in state.kept.items() if name.startswith("out."))
        assert waiting < ids.numel()
        if site.expert and "mixed" in state.kept and state.kept["mixed"] is not before.kept.get("mixed"):
            sums.append(site.name)
        if site.expert:
            assert state.kept["normed"] is before.kept["normed"]
        seen += len(state.site_input) if site.role == "up" else 0
    assert seen == 4 * ids.numel()
    assert len(sums) <= 4
    assert torch.equal(block.leave(state), block.forward(x, tables))


@pytest.mark.parametrize("model_type", ["llama", "falcon", "gemma2", "mixtral"])
def test_gradients_are_those_of_finite_differences(make_checkpoint: Callable[..., Path], model_type: str) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(model_type, dtype="float32"))
    config = DecoderConfig.read(checkpoint)
    ids = torch.randint(0, 320, (1, 24), generator=torch.Generator().manual_seed(1))
    tables, block = position_tables(config, 24), load_block(checkpoint, config, None, 0)
    block.tensors = {name: tensor.double().requires_grad_() for name, tensor in block.tensors.items()}
    x = embed(checkpoint, config, ids).double()
    steps = {name: torch.randn_like(tensor) for name, tensor in block.tensors.items() if "gate.weight" not in name}

    def loss() -> torch.Tensor:
        return block.forward(x, tables).square().mean()

    names = list(steps)
    gradients = torch.autograd.grad(loss(), [block.tensors[name] for name in names])
    slope = sum(float((g * steps[n]).sum()) for n, g in zip(names, gradients, strict=True))
    values, original = [], dict(block.tensors)
    with torch.no_grad():
        for sign in (1, -1):
            moved = {name: original[name] + sign * 1e-6 * step for name, step in steps.items()}
            block.tensors = original | moved
            values.append(float(loss()))
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-3)
