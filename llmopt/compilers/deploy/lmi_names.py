"""What the properties of LMI are here, as data: a setting, something kept for the container, or nothing, and why.

Sources: the documentation and code of djl-serving that `lmi` names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import TypeAlias

from llmopt.artifacts.outcome import Json
from llmopt.compilers.deploy import lmi
from llmopt.compilers.deploy.base import Runtime

#: From a property's text to the value of a setting; ValueError for what cannot be.
Convert: TypeAlias = Callable[[str], Json]


def whole(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise ValueError(text)
    return int(text)


def number(text: str) -> float:
    value = float(text)
    if not abs(value) < float("inf"):
        raise ValueError(text)
    return value


def truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def switch(text: str) -> bool:
    """A plugin's `enable` or `disable`, for which LMI's table has true and false."""
    return {"enable": True, "disable": False}[text] if text in ("enable", "disable") else truth(text)


def as_text(text: str) -> str:
    return text


def any_value(text: str) -> Json:
    """A truth, a number, or JSON as what it is; anything else as text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value: Json = json.loads(text, parse_constant=as_text)
    except ValueError:
        return text
    return text if value is None else value


WORDS: Mapping[Convert, str] = {whole: "a whole number", number: "a number", truth: "true or false"}
DTYPES: Mapping[str, str] = {
    **dict.fromkeys(("fp16", "float16"), "float16"),
    **dict.fromkeys(("bf16", "bfloat16"), "bfloat16"),
    "auto": "auto",
}

#: Of both containers (deployment_guide/configurations.md).
_COMMON: Mapping[str, tuple[str, Convert]] = {
    "option.pipeline_parallel_degree": ("compile.pipeline_parallel", whole),
    "option.max_rolling_batch_size": ("compile.max_batch_size", whole),
    "option.trust_remote_code": ("compile.trust_remote_code", truth),
    "option.model_loading_timeout": ("compile.loading_timeout_s", whole),
}
#: TensorRT-LLM: user_guides/trt_llm_user_guide.md, and what 0.33.0-dlc reads (trt_properties.py, and every flag of
#: `trtllm-build`: partition/trt_llm_partition.py, parse_build_config).
_KV = "compile.serve.kv_cache_config"
_TENSORRT_LLM: Mapping[str, tuple[str, Convert]] = {
    **_COMMON,
    "option.pipeline_parallel_size": ("compile.pipeline_parallel", whole),
    "option.moe_expert_parallel_size": ("compile.expert_parallel", whole),
    "option.max_batch_size": ("compile.max_batch_size", whole),
    "option.max_num_sequences": ("compile.max_batch_size", whole),
    "option.max_input_len": ("compile.max_input_len", whole),
    "option.max_seq_len": ("compile.max_seq_len", whole),
    "option.max_num_tokens": ("compile.max_num_tokens", whole),
    "option.max_beam_width": ("compile.max_beam_width", whole),
    "option.kv_cache_free_gpu_mem_fraction": (f"{_KV}.free_gpu_memory_fraction", number),
    "option.free_gpu_memory_fraction": (f"{_KV}.free_gpu_memory_fraction", number),
    "option.enable_kv_cache_reuse": (f"{_KV}.enable_block_reuse", truth),
    "option.enable_block_reuse": (f"{_KV}.enable_block_reuse", truth),
    "option.enable_chunked_prefill": ("compile.serve.enable_chunked_prefill", truth),
    "option.enable_chunked_context": ("compile.serve.enable_chunked_prefill", truth),
    **{name: (f"{_KV}.{key}", any_value) for key, name in lmi.TENSORRT_LLM_KV_CACHE.items()},
    **{name: (f"compile.serve.{key}", any_value) for key, name in lmi.TENSORRT_LLM_SERVE.items()},
    "option.num_engine_workers": ("compile.build.workers", whole),
    **{f"option.{flag}": (f"compile.build.{flag}", whole) for flag in ("tokens_per_block", "opt_num_tokens")},
    **{
        f"option.{flag}": (f"compile.build.{flag}", switch)
        for flag in (
            "context_fmha",
            "multiple_profiles",
            "reduce_fusion",
            "remove_input_padding",
            "use_fp8_context_fmha",
            "use_fused_mlp",
            "use_paged_context_fmha",
        )
    },
    **{
        f"option.{flag}": (f"compile.build.{flag}", as_text)
        for flag in ("gemm_plugin", "gpt_attention_plugin", "kv_cache_type", "moe_plugin")
    },
}
#: vLLM: user_guides/vllm_user_guide.md and vllm_rb_properties.py of 0.36.
_VLLM: Mapping[str, tuple[str, Convert]] = {
    **_COMMON,
    "option.max_model_len": ("compile.max_seq_len", whole),
    "option.max_rolling_batch_prefill_tokens": ("compile.max_num_tokens", whole),
    "option.max_num_batched_tokens": ("compile.max_num_tokens", whole),
    "option.cpu_offload_gb_per_gpu": ("compile.serve.cpu_offload_gb", number),
    "option.kv_cache_dtype": ("compile.serve.kv_cache_dtype", as_text),
    "option.gpu_memory_utilization": ("compile.serve.gpu_memory_utilization", number),
    **{
        f"option.{name}": (f"compile.serve.{name}", any_value)
        for name in (
            "block_size",
            "cpu_offload_gb",
            "disable_sliding_window",
            "enable_chunked_prefill",
            "enable_lora",
            "enable_prefix_caching",
            "enforce_eager",
            "limit_mm_per_prompt",
            "load_format",
            "long_lora_scaling_factors",
            "lora_extra_vocab_size",
            "max_cpu_loras",
            "max_lora_rank",
            "max_loras",
            "seed",
            "speculative_config",
            "swap_space",
            "tokenizer_mode",
        )
    },
}
TABLES: Mapping[Runtime, Mapping[str, tuple[str, Convert]]] = {"tensorrt-llm": _TENSORRT_LLM, "vllm": _VLLM}

#: What only the container reads, and gets again (serving/docs/configurations_model.md, lmi/deployment_guide).
KEPT = (
    *("batch_size", "job_queue_size", "load_on_devices", "log_request_metric", "max_batch_delay", "max_idle_time"),
    *("maxWorkers", "metrics_aggregation", "minWorkers", "retry_threshold", "required_memory_mb", "reserved_memory_mb"),
    *(f"{device}.{name}Workers" for device in ("cpu", "gpu") for name in ("max", "min")),
    *("gpu.required_memory_mb", "gpu.reserved_memory_mb"),
    *(
        f"option.{name}"
        for name in (
            *("bedrock_compat", "chat_template", "chat_template_content_format", "enable_auto_tool_choice"),
            *("enable_reasoning", "enable_streaming", "enable_venv", "handler", "input_formatter"),
            *("lmcache_auto_config", "max_output_size", "normalize", "output_formatter", "parallel_loading"),
            *("predict_timeout", "pythonExecutable", "reasoning_parser", "task", "tgi_compat", "tool_call_parser"),
        )
    ),
)
#: What chooses the container's handler and its mode; it is chosen again when the file is written.
HANDLER = ("engine", "option.async_mode", "option.entryPoint", "option.mpi_mode", "option.rolling_batch")
_CONFIG = "`config.json` of the model says it"
#: What nothing here can be told, by the reason.
DROPPED: Mapping[str, str] = {
    **{
        f"option.{name}": _CONFIG
        for name in (
            *("baichuan_model_version", "chatglm_model_version", "gpt_model_version", "multi_query_mode"),
            *("rotary_base", "rotary_dim", "rotary_scaling_factor", "rotary_scaling_type"),
        )
    },
    "option.calib_batch_size": "calibration goes window by window: it changes the speed of LMI's, not the numbers",
    "option.calib_batches": "`option.calib_size` counts the windows",
    "option.calib_dataset": "`quantize.calib` names a text or a data set, `datasets:ORG/NAME`",
    "option.tokenizer_max_seq_length": "`quantize.seq_len` is the length of a window",
    "option.enable_trt_overlap": "TensorRT-LLM has no such option any more",
    "option.load_by_shard": "checkpoints are always read in pieces",
    "option.logits_dtype": "LMI applies it to T5 only, which is not compiled here",
    "option.num_checkpoint_workers": "the checkpoint is written by as many threads as there are cores",
    "option.pre_quant_scales": "the checkpoint has them where its numbers need them",
    "option.trtllm_checkpoint_path": "the checkpoint lies in the artifact",
    "option.use_custom_all_reduce": "TensorRT-LLM has no such option any more",
}
#: What LMI's last TensorRT-LLM container (0.33.0) no longer reads; kept all the same, for a container of the user's.
OUTDATED = ("option.batch_scheduler_policy",)
#: What `option.quantize` means to LMI's TensorRT-LLM container: trt_llm_user_guide.md, "Quantization Support"; GPTQ is
#: not among what it makes itself.
_AWQ: Mapping[str, Json] = {"method": "awq", "bits": 4, "group_size": 128, "symmetric": True}
_STATIC_FP8: Mapping[str, Json] = {"method": "fp8", "weights": "tensor", "activations": "static"}
QUANTIZE: Mapping[str, Mapping[str, Json]] = {
    "awq": _AWQ,
    "fp8": _STATIC_FP8,
    "gptq": {"method": "gptq", "bits": 4, "group_size": 128, "symmetric": True},
    "smoothquant": {"method": "smoothquant"},
}
#: TensorRT-LLM's own names, which 0.33.0-dlc takes as `option.quant_algo` (trt_llm_partition.py, parse_quant_config).
QUANT_ALGO: Mapping[str, Mapping[str, Json]] = {
    "W4A16_AWQ": _AWQ,
    "W4A16_GPTQ": QUANTIZE["gptq"],
    "FP8": _STATIC_FP8,
    "FP8_PER_CHANNEL_PER_TOKEN": {"method": "fp8"},
    "W8A8_SQ_PER_CHANNEL": {"method": "smoothquant", "activations": "static"},
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": {"method": "smoothquant", "activations": "dynamic"},
    "W8A16": {"method": "rtn", "bits": 8, "group_size": -1},
}
#: Details of a quantization: the setting, and the methods that have it (none: all).
QUANTIZE_DETAILS: Mapping[str, tuple[str, Convert, tuple[str, ...]]] = {
    "option.smoothquant_alpha": ("quantize.alpha", number, ("smoothquant",)),
    "option.smoothquant_val": ("quantize.alpha", number, ("smoothquant",)),
    "option.awq_block_size": ("quantize.group_size", whole, ("awq", "gptq")),
    "option.group_size": ("quantize.group_size", whole, ("awq", "gptq")),
    "option.calib_size": ("quantize.samples", whole, ()),
    "option.awq_calib_size": ("quantize.samples", whole, ()),
    "option.calib_max_seq_length": ("quantize.seq_len", whole, ()),
    "option.random_seed": ("quantize.seed", whole, ()),
}
#: What names a quantization; the first of them that a file has counts.
QUANTIZE_NAMES = ("option.quantize", "option.quantization", "option.quant_algo")
QUANTIZE_OTHER = (
    *("option.smoothquant_per_token", "option.smoothquant_per_channel", "option.q_format", "option.awq_format"),
    *("option.has_zero_point", "option.kv_cache_quant_algo"),
)
SPECIAL = (
    *("option.model_id", "option.revision", "option.dtype", "option.tensor_parallel_degree", "option.max_output_len"),
    *("option.enable_expert_parallel",),
)
#: Those that a function each reads, not a row of a table.
READ_APART = (*HANDLER, *SPECIAL, *QUANTIZE_NAMES, *QUANTIZE_OTHER, *QUANTIZE_DETAILS)
#: Old names of LMI for the runtimes, and for those that are not prepared here (README.md of djl-serving's LMI docs).
ROLLING_BATCH: Mapping[str, Runtime | None] = {
    "trtllm": "tensorrt-llm",
    "vllm": "vllm",
    "lmi-dist": "vllm",  # removed in 0.33.0, where vLLM takes its place (wlm/LmiConfigRecommender.java)
    "auto": None,
    "disable": None,
}
ENTRY_POINTS: Mapping[str, Runtime] = {
    "djl_python.tensorrt_llm": "tensorrt-llm",
    "djl_python.huggingface": "vllm",
    **{handler: runtime for runtime, handler in lmi.HANDLERS.items()},  # type: ignore[misc]
}
