"""`serving.properties` for AWS's LMI containers (DJL Serving), TensorRT-LLM's and vLLM's, and the same as environment.

Sources are djl-serving's own: its documentation (serving/docs/lmi), and where that is older than the containers, the
handlers that run in them (engines/python/setup/djl_python): branch 0.33.0-dlc for TensorRT-LLM, 0.36 for vLLM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from llmopt.artifacts.outcome import Json
from llmopt.compilers.deploy import images, properties
from llmopt.compilers.deploy.base import Deployment
from llmopt.errors import SettingsError, nearest

#: The handlers that LMI's own tests name in full for each container (tests/integration/llm/prepare.py of 0.33.0-dlc and
#: 0.36); both are asynchronous, which rolling batches exclude (serving/docs/configurations_model.md).
HANDLERS: Mapping[str, str] = {
    "tensorrt-llm": "djl_python.lmi_trtllm.trtllm_async_service",
    "vllm": "djl_python.lmi_vllm.vllm_async_service",
}
#: `compile.serve` keys that LMI's TensorRT-LLM handler passes on, and the property of each:
#: properties_manager/trt_properties.py of 0.33.0-dlc, get_llm_kwargs and get_kv_cache_config.
TENSORRT_LLM_SERVE: Mapping[str, str] = {
    "guided_decoding_backend": "option.guided_decoding_backend",
    "iter_stats_max_iterations": "option.iter_stats_max_iterations",
    "request_stats_max_iterations": "option.request_stats_max_iterations",
    "normalize_log_probs": "option.normalize_log_probs",
    "gather_generation_logits": "option.gather_generation_logits",
}
TENSORRT_LLM_KV_CACHE: Mapping[str, str] = {
    "max_tokens": "option.max_tokens",
    "max_attention_window": "option.max_attention_window",
    "sink_token_length": "option.sink_token_length",
    "host_cache_size": "option.host_cache_size",
    "onboard_blocks": "option.onboard_blocks",
    "secondary_offload_min_priority": "option.secondary_offload_min_priority",
    "event_buffer_max_size": "option.event_buffer_max_size",
}
#: What each handler takes for a precision: TensorRT-LLM's own words go through; vLLM's handler reads LMI's
#: (hf_properties.py of 0.36, which knows no others).
DTYPES: Mapping[str, Mapping[str, str]] = {
    "tensorrt-llm": {},
    "vllm": {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"},
}
_SNAKE = re.compile(r"[a-z][a-z0-9_]*")


def emit(deployment: Deployment) -> dict[str, str]:
    """serving.properties; SettingsError for what no LMI container serves."""
    image = images.lmi(deployment)
    where = (
        "Lay this file beside the model's files (LMI loads what lies with it), or add option.model_id."
        if deployment.url is None
        else "The model is fetched from option.model_id when the container starts."
    )
    comments = [f"Container: {image.tag} ({image.holds})", where]
    if deployment.mode == "engine":
        comments.append("The engines must have been built inside that container, on the GPU that will serve them.")
    values = values_of(deployment)
    return {"serving.properties": properties.write(values, comments=comments)}


def values_of(deployment: Deployment) -> dict[str, str]:
    """The properties of a deployment in the order they are written; SettingsError for what LMI cannot be told."""
    images.lmi(deployment)
    serve = _serve_tensorrt_llm if deployment.runtime == "tensorrt-llm" else _serve_vllm
    sizes = _sizes_tensorrt_llm if deployment.runtime == "tensorrt-llm" else _sizes_vllm
    values: dict[str, Json] = {
        "engine": "Python",
        "option.model_id": deployment.model_url,
        "option.entryPoint": HANDLERS[deployment.runtime],
        "option.async_mode": True,
        "option.rolling_batch": "disable",
        "option.tensor_parallel_degree": deployment.tensor_parallel,
        **sizes(deployment),
        "option.dtype": DTYPES[deployment.runtime].get(deployment.dtype, deployment.dtype),
        "option.trust_remote_code": True if deployment.trust_remote_code else None,
        "option.model_loading_timeout": deployment.loading_timeout_s,
        **serve(deployment),
    }
    said = {key: _text(value) for key, value in values.items() if value is not None}
    return said | dict(deployment.lmi)


def environment(deployment: Deployment) -> dict[str, str]:
    """The same as variables, for a container that is given no file; without the model's place.

    Source: deployment_guide/configurations.md, "Environment Variable Configurations", and how wlm/ModelInfo.java of
    0.33 reads them: `OPTION_` for an option, `SERVING_` for what the model server takes.
    """
    variables: dict[str, str] = {}
    for key, value in values_of(deployment).items():
        if key in ("option.model_id", "engine"):
            continue
        name = key.removeprefix("option.")
        if name != "entryPoint" and not _SNAKE.fullmatch(name):
            raise SettingsError(
                f"the property `{key}` cannot be told as an environment variable",
                hint="`emit: lmi` writes it into serving.properties",
            )
        variables[("OPTION_" if key.startswith("option.") else "SERVING_") + name.upper()] = value
    return {"OPTION_ENGINE": "Python", **variables}


def _sizes_tensorrt_llm(deployment: Deployment) -> dict[str, Json]:
    """By the names of properties_manager/trt_properties.py of 0.33.0-dlc."""
    pipelined = deployment.pipeline_parallel if deployment.pipeline_parallel > 1 else None
    return {
        "option.pipeline_parallel_degree": pipelined,  # for the model server, which counts the GPUs of a worker
        "option.pipeline_parallel_size": pipelined,  # for TensorRT-LLM
        "option.moe_expert_parallel_size": deployment.expert_parallel if deployment.expert_parallel > 1 else None,
        "option.max_rolling_batch_size": deployment.max_batch_size,
        "option.max_input_len": deployment.max_input_len,
        "option.max_seq_len": deployment.max_seq_len,
        "option.max_num_tokens": deployment.max_num_tokens,
        "option.max_beam_width": deployment.max_beam_width if deployment.max_beam_width > 1 else None,
        "option.free_gpu_memory_fraction": deployment.gpu_memory_fraction,
        "option.enable_block_reuse": deployment.block_reuse,
        "option.enable_chunked_prefill": deployment.chunked_prefill,
    }


def _sizes_vllm(deployment: Deployment) -> dict[str, Json]:
    """By the names of properties_manager/vllm_rb_properties.py of 0.36, vLLM's own where LMI has none."""
    if deployment.pipeline_parallel > 1:
        raise SettingsError(
            "LMI's vLLM handler refuses `pipeline_parallel`",
            hint="use `tensor_parallel` alone, or deploy with `emit: vllm` or `emit: k8s`",
        )
    return {
        "option.enable_expert_parallel": True if deployment.expert_parallel > 1 else None,
        "option.max_rolling_batch_size": deployment.max_batch_size,
        "option.max_model_len": deployment.max_seq_len,
        "option.max_rolling_batch_prefill_tokens": deployment.max_num_tokens,
        "option.kv_cache_dtype": deployment.kv_cache if deployment.kv_cache not in (None, "none", "auto") else None,
        "option.gpu_memory_utilization": deployment.gpu_memory_fraction,
        "option.enable_prefix_caching": deployment.block_reuse,
        "option.enable_chunked_prefill": deployment.chunked_prefill,
    }


def _serve_tensorrt_llm(deployment: Deployment) -> dict[str, Json]:
    values: dict[str, Json] = {}
    for key, value in deployment.serve.items():
        if key == "kv_cache_config" and isinstance(value, Mapping):
            for part, item in value.items():
                values[_known(f"kv_cache_config.{part}", part, TENSORRT_LLM_KV_CACHE)] = item
        else:
            values[_known(key, key, TENSORRT_LLM_SERVE)] = value
    return values


def _serve_vllm(deployment: Deployment) -> dict[str, Json]:
    """LMI passes on every argument of vLLM's engine by its own name (vllm_user_guide.md, Pass-Through)."""
    return {f"option.{key.replace('-', '_')}": value for key, value in deployment.serve.items()}


def _known(setting: str, key: str, table: Mapping[str, str]) -> str:
    if key not in table:
        raise SettingsError(
            f"LMI's TensorRT-LLM container has no property for `compile.serve.{setting}`", hint=nearest(key, table)
        )
    return table[key]


def _text(value: Json) -> str:
    """As a property: booleans and numbers as JSON has them, texts as they are, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)
