"""peft is the judge of what an adapter means: our merged tensors are those of its own `merge_and_unload`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmopt.models.adapter import open_checkpoint
from llmopt.models.families import FAMILIES

pytestmark = [pytest.mark.judge, pytest.mark.filterwarnings("default")]

peft = pytest.importorskip("peft", reason="peft judges adapters: run `make bench-judges`")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "attention only": ("llama", {"target_modules": ATTENTION, "r": 4, "lora_alpha": 16}),
    "all linears": ("qwen3", {"target_modules": ALL, "r": 8, "lora_alpha": 4}),
    "all-linear": ("mistral", {"target_modules": "all-linear", "r": 2}),
    "rsLoRA": ("llama", {"target_modules": ALL, "r": 8, "lora_alpha": 4, "use_rslora": True}),
    "some layers": ("llama", {"target_modules": ALL, "layers_to_transform": [1]}),
    "patterns": (
        "llama",
        {
            "target_modules": ALL,
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 6},
            "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 3, "up_proj": 32},
        },
    ),
    "patterns, rsLoRA": (
        "llama",
        {"target_modules": ALL, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 5}, "use_rslora": True},
    ),
    "every bias": ("qwen2", {"target_modules": ATTENTION, "bias": "all"}),
    "biases of the adapted": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "a bias in the adapter": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "modules to save": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]}),
    "an embedding saved": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]}),
    "an embedding adapted": ("llama", {"target_modules": [*ATTENTION, "embed_tokens"]}),
    "a head adapted": ("llama", {"target_modules": [*ATTENTION, "lm_head"]}),
    "DoRA": ("qwen3", {"target_modules": ALL, "use_dora": True, "r": 4, "lora_alpha": 8}),
    "DoRA, rsLoRA": ("llama", {"target_modules": ALL, "use_dora": True, "use_rslora": True}),
    "DoRA of an embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "orthogonal": ("llama", {"target_modules": ALL, "init_lora_weights": "orthogonal", "r": 4}),
    "fused linears": ("phi3", {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
    "in x out": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "r": 4}),
    "in x out, DoRA": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "LayerNorm and biases": (
        "gpt_neox",
        {"target_modules": ["query_key_value", "dense_h_to_4h"], "bias": "lora_only", "modules_to_save": ["embed_out"]},
    ),
    "a router apart": ("mixtral", {"target_modules": ["q_proj", "v_proj"]}),
}
CASES = {name: case for name, case in CASES.items() if case[0] in FAMILIES}


def train(model: torch.nn.Module) -> None:
    """Stands in for a training: every value that it could have changed is another one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.05 * noise.to(parameter.dtype)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
def test_merged_tensors_are_those_of_peft(
    make_checkpoint: Callable[..., Path], tmp_path: Path, case: str, adapter_dtype: str
) -> None:
    from transformers import AutoModelForCausalLM

    model_type, settings = CASES[case]
    base = make_checkpoint(model_type, dtype="float32", tie_word_embeddings=False)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        peft.LoraConfig(task_type="CAUSAL_LM", **settings),
    )
    train(model)
    model.save_pretrained(tmp_path / "lora")
    if adapter_dtype == "bfloat16":  # as trainers save them
        from safetensors.torch import load_file, save_file

        file = tmp_path / "lora" / "adapter_model.safetensors"
        save_file({n: t.to(torch.bfloat16) for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "lora", autocast_adapter_dtype=True)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = open_checkpoint(tmp_path / "merged")
    ours, plain = open_checkpoint(base, tmp_path / "lora"), open_checkpoint(base)
    changed = 0
    for name in ours.tensors:
        found, expected = ours.float_array(name), merged.float_array(name)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * float(np.abs(expected).max()), err_msg=name)
        changed += not np.array_equal(found, plain.float_array(name))
    assert changed >= 1
    assert merged.tensors.keys() == ours.tensors.keys()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_changed_its_base_is_merged_once_peft_has_converted_it(
    make_checkpoint: Callable[..., Path], tmp_path: Path, init: str
) -> None:
    from transformers import AutoModelForCausalLM

    from llmopt.errors import LlmoptError

    base = make_checkpoint("llama", dtype="float32", tie_word_embeddings=False)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules=ATTENTION, r=4, lora_alpha=4, init_lora_weights=init),
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    train(model)
    model.save_pretrained(tmp_path / "as-trained")
    with pytest.raises(LlmoptError, match=f"init_lora_weights: {init}"):
        open_checkpoint(base, tmp_path / "as-trained")
    model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    merged = model.merge_and_unload().state_dict()
    ours = open_checkpoint(base, tmp_path / "lora")
    for name in ours.tensors:
        np.testing.assert_allclose(ours.float_array(name), merged[name].numpy(), rtol=1e-3, atol=1e-4, err_msg=name)
