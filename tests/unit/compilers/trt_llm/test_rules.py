"""What is wrong with the settings of `tensorrt-llm` is said before any work, with what to do about it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmopt import profiles
from llmopt.compilers.trt_llm import rules
from llmopt.compilers.trt_llm.settings import Settings
from llmopt.errors import SettingsError
from llmopt.profiles.settings import build, to_json


def settings(**values: Any) -> Settings:
    return build(Settings, values, where="compile")


def engine(**values: Any) -> Settings:
    return settings(mode="engine", **values)


def refused(values: dict[str, Any]) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        settings(**values)
    assert caught.value.hint, caught.value.message
    assert not caught.value.message.endswith(".")
    return caught.value


VERSIONS = [
    ({"version": "1.4.2"}, "`1.4.2` is not in the table", "`1.4.0rc1`"),
    ({"version": "newest"}, "`newest` is no version", "`1.2.1`"),
    ({"version": "1.3.0rc21", "mode": "engine"}, "no engine builder: it was removed after 1.3.0rc20", "`mode: bundle`"),
    ({"version": "1.3.0", "mode": "engine"}, "no engine builder", "`version: 1.2.1`"),
    ({"version": "2.0.0", "mode": "engine"}, "no engine builder", "`version: 1.2.1`"),
    (
        {"version": "1.0.0", "mode": "bundle"},
        "`mode: bundle` is not prepared for TensorRT-LLM `1.0.0`",
        "`version: 1.2.1`",
    ),
]

SIZES = [
    ({"max_batch_size": 0}, "`compile.max_batch_size` cannot be `0`", "from 1 up"),
    ({"tensor_parallel": -2}, "`compile.tensor_parallel` cannot be `-2`", "from 1 up"),
    ({"tensor_parallel": 4, "expert_parallel": 3}, "`expert_parallel: 3` does not divide", "divisor"),
    ({"max_input_len": 9000, "max_seq_len": 8192}, "`max_input_len: 9000` is over `max_seq_len: 8192`", "raise it"),
    (
        {"max_num_tokens": 4095, "max_input_len": 4096},
        "a prompt of `max_input_len: 4096` does not fit",
        "enable_chunked_prefill",
    ),
    ({"max_num_tokens": 63, "max_input_len": 32}, "does not hold one token of each of 64 sequences", "at least 64"),
    ({"max_num_tokens": 255, "max_input_len": 32, "max_beam_width": 4}, "each of 256 sequences", "at least 256"),
    ({"max_beam_width": 257, "max_batch_size": 1}, "`max_beam_width` cannot be `257`", "at most 256"),
    (
        {"max_beam_width": 2, "serve": {"kv_cache_config": {"max_attention_window": [1024]}}},
        "does not go with beam search",
        "`max_beam_width: 1`",
    ),
    ({"kv_cache": "int8"}, "a bundle has no INT8 KV cache", "`mode: engine`"),
    ({"gpu": "H1000"}, "unknown hardware `H1000`", "H100"),
    ({"gpu": "T4"}, "TensorRT-LLM does not support `T4` (`sm_75`)", "`sm_80` to `sm_121`"),
    ({"gpu": "c7i.8xlarge"}, "`c7i.8xlarge` has no NVIDIA GPU", "`gpu: H100`"),
    ({"gpu": "g5.48xlarge", "tensor_parallel": 8, "pipeline_parallel": 2}, "has 8 GPUs, and tensor", "lower"),
]

OPTIONS = [
    ({"build": {"gemm_plugin": "auto"}}, "a bundle is not built", "`mode: engine`"),
    ({"mode": "engine", "build": {"gem_plugin": "auto"}}, "is no option of trtllm-build", "`gemm_plugin`"),
    ({"mode": "engine", "build": {"gemm_plugin": "fp64"}}, "gemm_plugin` cannot be `fp64`", "`nvfp4`"),
    ({"mode": "engine", "build": {"max_batch_size": 4}}, "max_batch_size` cannot be set", "`compile.max_batch_size`"),
    ({"mode": "engine", "build": {"tp_size": 2}}, "tp_size` cannot be set", "`compile.tensor_parallel`"),
    ({"mode": "engine", "build": {"output_dir": "x"}}, "output_dir` cannot be set", "`engine` folder"),
    ({"mode": "engine", "build": {"enable_xqa": True}}, "enable_xqa` cannot be set", "removed in 0.16"),
    ({"mode": "engine", "build": {"paged_kv_cache": "enable"}}, "cannot be set", "`kv_cache_type`"),
    ({"mode": "engine", "build": {"context_fmha": "yes"}}, "must be `enable` or `disable`", "true and false"),
    ({"mode": "engine", "build": {"weight_streaming": "enable"}}, "must be true or false, not `enable`", "`true`"),
    ({"mode": "engine", "build": {"opt_num_tokens": "256"}}, "must be a whole number, not `256`", "`64`"),
    ({"mode": "engine", "build": {"opt_num_tokens": True}}, "must be a whole number, not `True`", "`64`"),
    ({"mode": "engine", "build": {"opt_num_tokens": 0}}, "opt_num_tokens` cannot be `0`", "at least 1"),
    ({"mode": "engine", "build": {"lora_dir": "adapter"}}, "must be texts, not `adapter`", "`[one, two]`"),
    ({"mode": "engine", "build": {"lora_dir": []}}, "must be texts, not `[]`", "`[one, two]`"),
    ({"mode": "engine", "build": {"lora_dir": ["a", 1]}}, "must be texts, not `['a', 1]`", "`[one, two]`"),
    ({"mode": "engine", "build": {"visualize_network": ""}}, "must be text", "quote"),
    ({"serve": {"enable_chunk_prefill": True}}, "is no option of trtllm-serve", "`enable_chunked_prefill`"),
    ({"serve": {"tp_size": 2}}, "tp_size` cannot be set", "`compile.tensor_parallel`"),
    ({"serve": {"port": 80}}, "port` cannot be set", "PORT="),
    ({"serve": {"free_gpu_memory_fraction": 0.8}}, "cannot be set", "kv_cache_config"),
    ({"serve": {"kv_cache_config": {"dtype": "fp8"}}}, "kv_cache_config.dtype` cannot be set", "`compile.kv_cache`"),
    ({"serve": {"kv_cache_config": {"free_gpu_memory_fraction": 1.2}}}, "cannot be `1.2`", "at least 0 and at most 1"),
    ({"serve": {"kv_cache_config": {"enable_blok_reuse": True}}}, "has no field `enable_blok_reuse`", "block_reuse"),
    ({"serve": {"kv_cache_config": 0.9}}, "must be a mapping, not `0.9`", "`name: ...`"),
    (
        {"serve": {"cuda_graph_config": {"batch_sizes": [1, "2"]}}},
        "must be whole numbers, not `[1, '2']`",
        "`[1, 2, 4]`",
    ),
    ({"serve": {"decoding_config": {}}}, "cannot be set", "`speculative_config`"),
    ({"serve": {"served_model_name": "m"}}, "served_model_name` cannot be set", "`compile.served_name`"),
    (
        {"mode": "engine", "serve": {"guided_decoding_backend": "llguidance"}},
        "`guided_decoding_backend: llguidance` is for bundles only",
        "`xgrammar`",
    ),
    ({"mode": "engine", "serve": {"enable_lora": True}}, "needs engines with `lora_plugin`", "lora_plugin: auto"),
    ({"serve": {"middleware": "m"}}, "has no `middleware`", "it came with `1.3.0rc21`"),
    ({"version": "1.1.0", "serve": {"tool_parser": "qwen3"}}, "`1.1.0` has no `tool_parser`", "it came with `1.2.0`"),
    ({"serve": {"chat_template": "{{ messages }}"}}, "cannot hold a brace", "in a file"),
    ({"serve": {"batching_type": "STATIC"}}, "is not for `mode: bundle`", "only `mode: engine` has it"),
    ({"mode": "engine", "serve": {"cuda_graph_config": {}}}, "is not for `mode: engine`", "cuda_graph_mode"),
    (
        {"serve": {"scheduler_config": {"dynamic_batch_config": {"dynamic_batch_moving_average_window": 0}}}},
        "dynamic_batch_moving_average_window` cannot be `0`",
        "at least 1",
    ),
    (
        {"serve": {"cuda_graph_config": {"batch_sizes": [1], "max_batch_size": 8}}},
        "both `batch_sizes` and `max_batch_size`",
        "keep one",
    ),
]

BUILDS = [
    ({"remove_input_padding": "disable"}, "rules out in-flight batching"),
    ({"gpt_attention_plugin": "disable"}, "rules out the paged KV cache"),
    ({"kv_cache_type": "continuous"}, "`kv_cache_type: continuous` rules out in-flight batching"),
    ({"kv_cache_type": "disabled"}, "`kv_cache_type: disabled` rules out in-flight batching"),
    ({"tokens_per_block": 48}, "`tokens_per_block` cannot be `48`"),
    ({"context_fmha": False, "use_paged_context_fmha": True}, "`use_paged_context_fmha` needs `context_fmha`"),
    ({"context_fmha": "disable", "use_fp8_context_fmha": "enable"}, "`use_fp8_context_fmha` needs `context_fmha`"),
    ({"multiple_profiles": True, "opt_num_tokens": 64}, "does not go with `multiple_profiles`"),
    ({"opt_num_tokens": 8193}, "`opt_num_tokens: 8193` is over `max_num_tokens: 8192`"),
    ({"speculative_decoding_mode": "medusa", "max_draft_len": 4}, "needs a checkpoint with draft heads"),
    ({"speculative_decoding_mode": "lookahead_decoding"}, "go together"),
    ({"max_draft_len": 4}, "go together"),
    (
        {"speculative_decoding_mode": "draft_tokens_external", "max_draft_len": 4, "gather_context_logits": True},
        "context logits cannot be gathered while drafting",
    ),
    (
        {"speculative_decoding_mode": "lookahead_decoding", "max_draft_len": 4, "gather_all_token_logits": True},
        "context logits cannot be gathered while drafting",
    ),
    ({"user_buffer": True}, "`user_buffer` needs `reduce_fusion`"),
    ({"reduce_fusion": True}, "`reduce_fusion` does nothing without tensor parallelism"),
    ({"gemm_allreduce_plugin": "float16"}, "does nothing without tensor parallelism"),
    ({"pp_reduce_scatter": True}, "does nothing without pipeline parallelism"),
    ({"gemm_swiglu_plugin": "fp8", "use_fused_mlp": False}, "`gemm_swiglu_plugin` needs `use_fused_mlp`"),
    ({"dora_plugin": True}, "`dora_plugin` does nothing without `lora_plugin`"),
    ({"max_lora_rank": 8, "lora_plugin": "disable"}, "`max_lora_rank` does nothing without `lora_plugin`"),
    ({"weight_streaming": True, "gemm_plugin": "auto"}, "streams no weights that a plugin holds"),
    ({"workers": 2}, "more than there are engines to build: 1"),
    ({"streamingllm": True}, "`compile.build.streamingllm` cannot be set"),
]

#: The nearest settings that are right, for each group of rules.
GOOD = [
    {},
    {"version": "1.3.0rc27"},
    {"version": "1.3.0rc20", "mode": "engine"},
    {"version": "0.21.0"},
    {"max_input_len": 8192, "max_seq_len": 8192},
    {"max_num_tokens": 4096, "max_input_len": 4096},
    {"max_num_tokens": 1024, "max_input_len": 4096, "serve": {"enable_chunked_prefill": True}},
    {"max_num_tokens": 64, "max_input_len": None},
    {"max_num_tokens": 64, "max_input_len": 64, "max_seq_len": 128},
    {"max_beam_width": 256, "max_batch_size": 1},
    {"tensor_parallel": 4, "expert_parallel": 2},
    {"gpu": "h100", "kv_cache": "fp8"},
    {"gpu": "H100", "tensor_parallel": 8},
    {"gpu": "g5.48xlarge", "tensor_parallel": 8},
    {"mode": "engine", "build": {"lora_plugin": "auto"}, "serve": {"enable_lora": True}},
    {"mode": "engine", "kv_cache": "int8"},
    {"mode": "engine", "build": {"multiple_profiles": False, "opt_num_tokens": 64}},
    {"mode": "engine", "build": {"kv_cache_type": "paged", "tokens_per_block": 64}},
    {"mode": "engine", "build": {"speculative_decoding_mode": "lookahead_decoding", "max_draft_len": 83}},
    {"mode": "engine", "build": {"context_fmha": "disable"}},
    {"mode": "engine", "tensor_parallel": 2, "build": {"reduce_fusion": "enable", "user_buffer": True, "workers": 2}},
    {"mode": "engine", "build": {"lora_plugin": "auto", "lora_dir": ["a", "b"], "lora_target_modules": ["attn_q"]}},
    {"mode": "engine", "build": {"weight_streaming": True, "gemm_plugin": "disable"}},
    {"mode": "engine", "serve": {"extended_runtime_perf_knob_config": {"cuda_graph_mode": True}}},
    {"serve": {"cuda_graph_config": {"batch_sizes": [1, 2, 4], "enable_padding": True}}},
    {"serve": {"speculative_config": {"decoding_type": "NGram", "max_draft_len": 4, "max_matching_ngram_size": 2}}},
    {"serve": {"speculative_config": {"decoding_type": "MTP", "num_nextn_predict_layers": 1}}},
    {"version": "1.3.0rc21", "serve": {"middleware": "m", "kv_cache_config": {"max_util_for_resume": 0.9}}},
]


@pytest.mark.parametrize(("values", "message", "hint"), VERSIONS + SIZES + OPTIONS)
def test_a_wrong_setting_is_an_error_with_a_hint(values: dict[str, Any], message: str, hint: str) -> None:
    error = refused(values)
    assert message in error.message
    assert hint in str(error.hint)


@pytest.mark.parametrize(("options", "message"), BUILDS)
def test_a_build_that_would_be_overridden_or_fail_is_an_error(options: dict[str, Any], message: str) -> None:
    assert message in refused({"mode": "engine", "build": options}).message


@pytest.mark.parametrize("values", GOOD, ids=str)
def test_a_right_setting_is_taken_and_survives_the_way_into_a_manifest(values: dict[str, Any]) -> None:
    made = settings(**values)
    assert build(Settings, json.loads(json.dumps(to_json(made))), where="compile") == made


@pytest.mark.parametrize("off", [{"context_fmha": False}, {"use_paged_context_fmha": "disable"}])
def test_chunks_and_reuse_need_paged_context_attention(off: dict[str, Any]) -> None:
    for serve in ({"enable_chunked_prefill": True}, {"kv_cache_config": {"enable_block_reuse": True}}):
        assert "does not go with" in refused({"mode": "engine", "build": off, "serve": serve}).message
    engine(build=off, serve={"kv_cache_config": {"enable_block_reuse": False}})


DRAFTING = [
    ({"max_draft_len": 4}, {}, "needs `decoding_type`"),
    ({"decoding_type": "NGram"}, {}, "`decoding_type: NGram` needs `max_draft_len`"),
    ({"decoding_type": "Eagle", "max_draft_len": 3}, {}, "`decoding_type: Eagle` needs a draft model"),
    ({"decoding_type": "Medusa", "max_draft_len": 3}, {}, "needs a checkpoint with draft heads"),
    ({"decoding_type": "Lookahead"}, {}, "is for engines only"),
    ({"decoding_type": "NGram", "max_draft_len": 4}, {"mode": "engine"}, "is for bundles only"),
    ({"decoding_type": "Lookahead"}, {"mode": "engine"}, "the engine is not built for"),
    ({"decoding_type": "NGram", "max_draft_len": 4}, {"max_beam_width": 2}, "does not go with beam search"),
    ({"decoding_type": "NGram", "max_draft_len": 4}, {"pipeline_parallel": 2}, "does not go with pipeline"),
    (
        {"decoding_type": "DraftTarget", "max_draft_len": 4, "speculative_model_dir": "/draft"},
        {"version": "1.3.0rc5"},
        "`1.3.0rc5` has no `decoding_type: DraftTarget`",
    ),
    ({"decoding_type": "NGram", "speculative_model": "x"}, {}, "speculative_model` cannot be set"),
    ({"decoding_type": "ngram"}, {}, "decoding_type` cannot be `ngram`"),
]


@pytest.mark.parametrize(("config", "values", "message"), DRAFTING)
def test_speculation_that_would_not_run_is_an_error(
    config: dict[str, Any], values: dict[str, Any], message: str
) -> None:
    assert message in refused({**values, "serve": {"speculative_config": config}}).message


def test_an_engine_built_for_lookahead_can_be_served_with_it() -> None:
    engine(
        build={"speculative_decoding_mode": "lookahead_decoding", "max_draft_len": 83},
        serve={"speculative_config": {"decoding_type": "Lookahead", "max_window_size": 8}},
    )


RUNS = [
    ("bundle", None, None, "sm_80", True),
    ("bundle", "FP8", None, "sm_80", False),
    ("bundle", "FP8", "FP8", "sm_89", True),
    ("bundle", "NVFP4", "FP8", "sm_90", False),
    ("bundle", "NVFP4", "FP8", "sm_100", True),
    ("bundle", "W4A16_AWQ", None, "sm_86", True),
    ("bundle", "W4A16_AWQ", None, "sm_100", False),
    ("bundle", "W4A8_AWQ", None, "sm_80", False),
    ("bundle", "FP8_PER_CHANNEL_PER_TOKEN", None, "sm_89", False),
    ("bundle", "FP8_PER_CHANNEL_PER_TOKEN", None, "sm_90", True),
    ("bundle", "W8A8_SQ_PER_CHANNEL", None, None, False),
    ("bundle", None, "INT8", None, False),
    ("bundle", None, "FP8", "sm_80", True),
    ("engine", None, "FP8", "sm_80", False),
    ("engine", "FP8", "FP8", "sm_80", False),
    ("engine", "FP8", "FP8", "sm_90", True),
    ("engine", "FP8", "FP8", "sm_100", True),
    ("engine", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "INT8", "sm_80", True),
    ("engine", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", None, "sm_100", False),
    ("engine", "W4A16_AWQ", None, "sm_103", False),
    ("engine", "W4A16_AWQ", "INT8", "sm_89", True),
    ("engine", "W4A16_AWQ", None, "sm_75", False),
    ("engine", "FP8_BLOCK_SCALES", None, None, False),
    ("engine", "FP8", None, None, True),
]


@pytest.mark.parametrize(("mode", "quant_algo", "kv_cache", "architecture", "runs"), RUNS)
def test_numbers_that_a_gpu_or_a_mode_does_not_have_are_an_error(
    mode: str, quant_algo: str | None, kv_cache: str | None, architecture: str | None, runs: bool
) -> None:
    made = settings(mode=mode)
    if runs:
        rules.check(made, quant_algo=quant_algo, kv_cache=kv_cache, architecture=architecture)
        return
    with pytest.raises(SettingsError) as caught:
        rules.check(made, quant_algo=quant_algo, kv_cache=kv_cache, architecture=architecture)
    assert caught.value.hint


def test_a_refusal_of_an_architecture_names_those_that_do() -> None:
    with pytest.raises(SettingsError, match="`sm_80` does not run FP8 weights") as caught:
        rules.check(settings(), quant_algo="FP8", kv_cache=None, architecture="sm_80")
    assert "`sm_89` to `sm_121`" in str(caught.value.hint)


def test_what_only_the_other_mode_loads_names_it() -> None:
    with pytest.raises(SettingsError, match="does not load INT8 weights and inputs") as caught:
        rules.check(settings(), quant_algo="W8A8_SQ_PER_CHANNEL", kv_cache=None, architecture=None)
    assert "`mode: engine` with `version: 1.2.1`" in str(caught.value.hint)


def test_an_algorithm_of_no_row_is_an_error() -> None:
    with pytest.raises(SettingsError, match="`W4A16_AQW` is not in the table") as caught:
        rules.check(settings(), quant_algo="W4A16_AQW", kv_cache=None, architecture=None)
    assert "W4A16_AWQ" in str(caught.value.hint)


WITH_NUMBERS = [
    ({"use_fp8_context_fmha": True}, {}, None, None, "needs FP8 weights"),
    ({"use_fp8_context_fmha": True}, {}, "FP8", None, "needs an FP8 KV cache"),
    ({"use_paged_context_fmha": True}, {}, None, "INT8", "does not go with an INT8 KV cache"),
    ({"use_paged_context_fmha": True}, {}, "W4A16_AWQ", "FP8", "under weights that are not FP8"),
    ({}, {"enable_chunked_prefill": True}, None, "INT8", "`enable_chunked_prefill` does not go with an INT8"),
    ({}, {"kv_cache_config": {"enable_block_reuse": True}}, None, "FP8", "`enable_block_reuse` does not go with"),
    ({"gemm_swiglu_plugin": "fp8"}, {}, None, None, "is for FP8 only"),
    ({"low_latency_gemm_plugin": "fp8"}, {}, "W4A16_AWQ", None, "is for FP8 only"),
    ({"fp8_rowwise_gemm_plugin": "auto"}, {}, "FP8", None, "with a scale a row only"),
    ({"gemm_plugin": "fp8"}, {}, None, None, "`gemm_plugin: fp8` needs FP8 weights"),
    ({"gemm_plugin": "nvfp4"}, {}, "FP8", None, "`gemm_plugin: nvfp4` needs NVFP4 weights"),
    ({"weight_streaming": True}, {}, "W4A16_AWQ", None, "`W4A16_AWQ` has such"),
]


@pytest.mark.parametrize(("options", "serve", "quant_algo", "kv_cache", "message"), WITH_NUMBERS)
def test_options_that_do_not_go_with_the_numbers_are_an_error(
    options: dict[str, Any], serve: dict[str, Any], quant_algo: str | None, kv_cache: str | None, message: str
) -> None:
    made = engine(build=options, serve=serve)
    with pytest.raises(SettingsError) as caught:
        rules.check(made, quant_algo=quant_algo, kv_cache=kv_cache, architecture="sm_90")
    assert message in caught.value.message


def test_options_of_fp8_go_with_fp8() -> None:
    options = {"use_fp8_context_fmha": True, "gemm_plugin": "fp8", "gemm_swiglu_plugin": "fp8"}
    made = engine(build=options, serve={"enable_chunked_prefill": True})
    rules.check(made, quant_algo="FP8", kv_cache="FP8", architecture="sm_90")
    rules.check(made, quant_algo="FP8", kv_cache="FP8", architecture=None)
    with pytest.raises(SettingsError, match="is for Hopper only"):
        rules.check(made, quant_algo="FP8", kv_cache="FP8", architecture="sm_89")


def test_plugins_that_do_not_run_on_sm_100_are_an_error_there() -> None:
    made = engine(build={"low_latency_gemm_plugin": "fp8"})
    rules.check(made, quant_algo="FP8", kv_cache=None, architecture="sm_90")
    with pytest.raises(SettingsError, match="does not run on `sm_100`"):
        rules.check(made, quant_algo="FP8", kv_cache=None, architecture="sm_100")


def test_a_wrong_name_of_an_architecture_is_an_error() -> None:
    with pytest.raises(SettingsError, match="`hopper` is no GPU architecture"):
        rules.check(settings(), quant_algo=None, kv_cache=None, architecture="hopper")


def test_auto_is_a_bundle_where_the_version_has_it() -> None:
    assert settings().resolved_mode == "bundle"
    assert settings(version="1.1.0").resolved_mode == "engine"
    assert settings(version="1.3.0rc27").resolved_mode == "bundle"
    assert engine(version="1.2.0").resolved_mode == "engine"


def test_the_architecture_is_that_of_the_gpu_named() -> None:
    assert settings().architecture is None
    assert settings(gpu="H100", tensor_parallel=2, pipeline_parallel=2).architecture == "sm_90"
    assert settings(tensor_parallel=2, pipeline_parallel=2).gpus == 4


@pytest.mark.parametrize(
    ("values", "positions", "lengths"),
    [
        ({}, 2048, (1024, 2048)),
        ({}, 131072, (4096, 8192)),
        ({"max_seq_len": 100}, 2048, (50, 100)),
        ({"max_input_len": 9000, "max_num_tokens": 9000}, 131072, (9000, 9000)),
        ({"max_num_tokens": 256}, 2048, (256, 2048)),
        ({"max_seq_len": 1}, 2048, (1, 1)),
    ],
)
def test_lengths_left_out_are_the_models_own_to_a_limit(
    values: dict[str, Any], positions: int, lengths: tuple[int, int]
) -> None:
    sized = settings(**values).sized(positions)
    assert (sized.max_input_len, sized.max_seq_len) == lengths


@pytest.mark.parametrize(
    ("name", "quant_algo", "kv_cache", "architectures"),
    [
        ("trtllm-fp8", "FP8", "FP8", ("sm_89", "sm_90", "sm_100", "sm_120")),
        ("trtllm-int4", "W4A16_AWQ", None, ("sm_80", "sm_89", "sm_90")),
        ("trtllm-engine-fp8", "FP8", "FP8", ("sm_89", "sm_90", "sm_100")),
        ("trtllm-engine-int8", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", None, ("sm_80", "sm_86", "sm_90")),
    ],
)
def test_a_shipped_profile_goes_with_its_numbers_on_the_gpus_it_names(
    name: str, quant_algo: str, kv_cache: str | None, architectures: tuple[str, ...]
) -> None:
    made = settings(**profiles.load(name).section("compile"))
    for architecture in architectures:
        rules.check(made, quant_algo=quant_algo, kv_cache=kv_cache, architecture=architecture)


@pytest.mark.parametrize(
    ("options", "quant_algo", "kv_cache", "paged"),
    [
        ({}, None, None, True),
        ({}, "FP8", "FP8", True),
        ({}, "W4A16_AWQ", "FP8", False),
        ({}, None, "INT8", False),
        ({"context_fmha": "disable"}, None, None, False),
        ({"use_paged_context_fmha": False}, None, None, False),
    ],
)
def test_paged_context_attention_is_off_where_the_builder_turns_it_off(
    options: dict[str, Any], quant_algo: str | None, kv_cache: str | None, paged: bool
) -> None:
    assert rules.has_paged_context(engine(build=options), quant_algo=quant_algo, kv_cache=kv_cache) == paged
