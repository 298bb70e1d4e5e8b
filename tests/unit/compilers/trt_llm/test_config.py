"""config.json of an engine's checkpoint: what it says, and what is refused when it is read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from llmopt.compilers.trt_llm.config import EngineConfig
from llmopt.compilers.trt_llm.families import ALGORITHMS, FAMILIES
from llmopt.compilers.trt_llm.layout import layout, modules
from llmopt.compilers.trt_llm.sources import release
from llmopt.errors import LlmoptError, SettingsError

LLAMA = EngineConfig(
    architecture="LlamaForCausalLM",
    dtype="bfloat16",
    layers=4,
    heads=8,
    kv_heads=2,
    head_size=64,
    hidden_size=512,
    intermediate_size=1024,
    vocab_size=1000,
    max_positions=2048,
    norm_epsilon=1e-6,
    activation="silu",
    norms=("input_layernorm", "post_layernorm"),
    qkv_bias=False,
    dense_bias=False,
    mlp_bias=False,
    rotary_base=5e5,
    rotary_pct=1.0,
    rotary_scaling=None,
    algorithm=None,
    group_size=0,
    kv_cache="none",
    plain=(),
    tensor_parallel=1,
    pipeline_parallel=1,
)
AWQ = replace(LLAMA, algorithm="W4A16_AWQ", group_size=64)
SCALED = replace(LLAMA, rotary_scaling={"rope_type": "linear", "type": "linear", "factor": 2.0})
FALCON = replace(
    LLAMA, architecture="FalconForCausalLM", activation="gelu", norms=("input_layernorm",), norm_epsilon=1e-5
)
BIASED = {"qkv_bias": True, "dense_bias": True, "mlp_bias": True}
CONFIGS = [
    LLAMA,
    replace(LLAMA, dtype="float16", tensor_parallel=4, pipeline_parallel=2, kv_cache="fp8"),
    replace(LLAMA, **BIASED),
    SCALED,
    AWQ,
    replace(AWQ, plain=("transformer.layers.0.mlp.fc", "transformer.layers.0.mlp.gate"), kv_cache="int8"),
    replace(LLAMA, algorithm="FP8"),
    replace(LLAMA, algorithm="W8A8_SQ_PER_CHANNEL"),
    replace(LLAMA, algorithm="W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"),
    replace(LLAMA, architecture="Qwen2ForCausalLM", qkv_bias=True),
    replace(LLAMA, architecture="Qwen3ForCausalLM"),
    FALCON,
    replace(FALCON, norms=("input_layernorm", "mlp_layernorm")),
    replace(FALCON, norms=("input_layernorm", "post_layernorm"), **BIASED),
    replace(FALCON, architecture="GPTNeoXForCausalLM", norms=FAMILIES["gpt_neox"].norms, rotary_pct=0.25, **BIASED),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.architecture}-{config.algorithm}")
def test_what_is_written_is_read_back(config: EngineConfig) -> None:
    assert EngineConfig.parse(json.loads(json.dumps(config.to_json()))) == config


def test_modelopts_own_file_is_read_with_the_defaults_of_the_loader() -> None:
    """It leaves out what the class of the model reads beyond (ModelOpt 0.47 without TensorRT-LLM beside it)."""
    said = replace(LLAMA, architecture="Qwen2ForCausalLM", qkv_bias=True, rotary_base=10000.0).to_json()
    own = ("attn_bias", "mlp_bias", "qwen_type", "seq_length", "rotary_base")
    found = EngineConfig.parse({key: value for key, value in said.items() if key not in own})
    assert found.to_json() == said


def edited(change: Callable[[dict[str, Any]], object], config: EngineConfig = AWQ) -> dict[str, Any]:
    said = config.to_json()
    change(said)
    return said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda said: said.pop("num_attention_heads"), "has no field `num_attention_heads`"),
        (lambda said: said["mapping"].pop("tp_size"), "has no field `mapping.tp_size`"),
        (lambda said: said["quantization"].pop("group_size"), "has no field `quantization.group_size`"),
        (lambda said: said.update(hidden_size="512"), "a positive whole number for `hidden_size`, not `512`"),
        (lambda said: said.update(num_hidden_layers=0), "a positive whole number for `num_hidden_layers`"),
        (lambda said: said.update(norm_epsilon=-1.0), "a positive number for `norm_epsilon`"),
        (lambda said: said.update(dtype="float32"), "`float16` or `bfloat16` for `dtype`, not `float32`"),
        (lambda said: said.update(mapping=[1]), "an object for `mapping`"),
        (lambda said: said.update(bias=1), "true or false for `bias`"),
        (lambda said: said.update(architecture="LLaMAForCausalLM"), "architecture `LLaMAForCausalLM`"),
        (lambda said: said["quantization"].update(quant_algo="NVFP4"), "the algorithm `NVFP4`"),
        (lambda said: said["quantization"].update(kv_cache_quant_algo="NVFP4"), "the KV cache `NVFP4`"),
        (lambda said: said["quantization"].update(has_zero_point=True), "`quantization: "),
        (lambda said: said.update(hiden_size=3), "an unknown field `hiden_size`"),
        (lambda said: said.update(use_parallel_embedding=False), "`use_parallel_embedding: False`"),
        (lambda said: said.update(rank=1), "`rank: 1` where its other fields imply `0`"),
        (lambda said: said["mapping"].update(world_size=2), "`mapping: "),
        (lambda said: said.update(num_key_value_heads=3), "KV heads can be neither"),
    ],
)
def test_an_edited_file_is_refused(change: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(LlmoptError) as caught:
        EngineConfig.parse(edited(change, replace(AWQ, tensor_parallel=2) if "KV heads" in message else AWQ))
    assert message in caught.value.message


def test_groups_must_be_whole_on_every_rank_both_ways() -> None:
    """TensorRT-LLM's groupwise linears ask for padded shapes else, which no checkpoint has."""
    replace(AWQ, tensor_parallel=8).check()
    for sizes, what in (
        ({"intermediate_size": 1024 + 64}, "the inner size of the MLP, 1088, is no multiple of 128"),
        ({"hidden_size": 512 + 64}, "the hidden size, 576"),
        ({"head_size": 40}, "the width of the heads, 320"),
    ):
        with pytest.raises(SettingsError) as caught:
            replace(AWQ, tensor_parallel=2, **sizes).check()
        assert what in caught.value.message


@pytest.mark.parametrize("algorithm", [None, *ALGORITHMS])
def test_the_ranks_share_every_linear_out(algorithm: str | None) -> None:
    """As many weights on all ranks as in the model, but for KV heads that several have."""
    config = replace(LLAMA, algorithm=algorithm, group_size=64 if algorithm == "W4A16_AWQ" else 0)
    for tp, copies in ((1, 0), (2, 0), (4, 2), (8, 6)):
        split = replace(config, tensor_parallel=tp)
        each = sum(module.rows * module.columns for module in modules(split))
        assert tp * each == sum(m.rows * m.columns for m in modules(config)) + copies * 2 * 64 * 512


def test_the_stages_share_the_blocks_out() -> None:
    config = replace(LLAMA, tensor_parallel=2, pipeline_parallel=2)
    names = [set(layout(config, rank)) for rank in range(4)]
    assert names[0] == names[1]
    assert names[2] == names[3]
    assert [list(config.layers_of_rank(rank)) for rank in range(4)] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert {name for name in names[0] if "layers" in name} == {name for name in names[2] if "layers" in name}
    assert {name for name in names[0] if "layers" not in name} == {"transformer.vocab_embedding.weight"}
    assert {name for name in names[2] if "layers" not in name} == {"transformer.ln_f.weight", "lm_head.weight"}
    assert not any(".2." in name for name in names[2])


def test_versions_are_compared_by_their_numbers() -> None:
    assert release("1.3.0rc5") == (1, 3, 0)
    assert release("0.21.0") < (0, 22) < release("1.0.0") < release("1.10")
    with pytest.raises(SettingsError):
        release("latest")


def test_bad_input_is_found_without_torch() -> None:
    code = "import sys, llmopt.compilers.trt_llm.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
