"""Triton Inference Server: what a model repository of its TensorRT-LLM backends has to be told, and the script.

The repository's code (model.py, config.pbtxt templates) is NVIDIA's and changes with its version, so it is taken from
the container that runs it: `/app/all_models` of tritonserver's trtllm image. Written here are the values.

Sources: triton-inference-server/tensorrtllm_backend, docs/llmapi.md and docs/model_config.md; NVIDIA/TensorRT-LLM,
triton_backend (all_models/llmapi, all_models/inflight_batcher_llm, tools/fill_template.py, scripts).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from llmopt.artifacts.outcome import Json
from llmopt.compilers.deploy import images
from llmopt.compilers.deploy.base import Deployment
from llmopt.errors import SettingsError

#: Flags of `trtllm-serve` that say something of its HTTP server or log, which Triton has its own of.
_SERVER_ONLY = (
    *("host", "port", "log_level", "reasoning_parser", "tool_parser", "chat_template", "served_model_name"),
    *("middleware", "otlp_traces_endpoint"),
)
#: `engine_dir` and so on of docs/model_config.md; values of the executor's parameters are texts.
_POLICIES: Mapping[str, str] = {"MAX_UTILIZATION": "max_utilization", "GUARANTEED_NO_EVICT": "guaranteed_no_evict"}
_HEAD = """\
#!/usr/bin/env bash
# Serve with Triton, inside {image}
# ({holds}), which is started on a machine with GPUs as in
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 -p 8000:8000 -v ARTIFACT:/artifact {image} \\
#     bash /artifact/deploy/triton/serve.sh
# HTTP on port 8000; ready when GET /v2/health/ready answers 200.
set -euo pipefail
here="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
artifact="$(cd "$here/../.." && pwd)"
models="${{ALL_MODELS:-/app/all_models}}/{template}"
if [[ ! -d "$models" ]]; then
  echo "no $models: run this inside tritonserver's trtllm container, or set ALL_MODELS" >&2
  exit 1
fi
repository="$(mktemp -d)"
cp -R "$models/." "$repository/"
"""
_LLMAPI = """\
# The path is that of this container.
sed "s|^model: .*|model: \\"$artifact/{model}\\"|" "$here/model.yaml" > "$repository/tensorrt_llm/1/model.yaml"
exec mpirun --allow-run-as-root -n 1 /opt/tritonserver/bin/tritonserver --model-repository="$repository"
"""
_ENGINE = """\
engine="$artifact/{model}"
if [[ ! -f "$engine/config.json" ]]; then
  echo "no engine in $engine: build it with $artifact/build.sh on the GPU that will serve it" >&2
  exit 1
fi

# fill MODEL KEY:VALUE...: those that the template of this version has.
fill() {{
  local config="$repository/$1/config.pbtxt" pair found=()
  for pair in "${{@:2}}"; do
    if grep -qF "\\${{${{pair%%:*}}}}" "$config"; then
      found+=("$pair")
    fi
  done
  python3 "${{FILL_TEMPLATE:-/app/tools/fill_template.py}}" -i "$config" "$(IFS=,; echo "${{found[*]}}")"
}}

{fills}

server=(/opt/tritonserver/bin/tritonserver "--model-repository=$repository" --disable-auto-complete-config)
command=(mpirun --allow-run-as-root)
for ((rank = 0; rank < {gpus}; rank++)); do
  command+=(-n 1 "${{server[@]}}" "--backend-config=python,shm-region-prefix-name=prefix${{rank}}_")
  if ((rank > 0)); then  # the other ranks only run their part of the engine
    command+=(--model-control-mode=explicit --load-model=tensorrt_llm)
  fi
  command+=(:)
done
exec "${{command[@]}}"
"""


def emit(deployment: Deployment) -> dict[str, str]:
    """serve.sh, and model.yaml for a bundle; SettingsError for what Triton's backends do not serve."""
    if deployment.runtime != "tensorrt-llm":
        raise SettingsError(
            "`emit: triton` is for TensorRT-LLM's backends", hint="`emit: vllm` or `emit: k8s` serve it with vLLM"
        )
    image = images.triton(deployment)
    if deployment.mode == "bundle":
        head = _HEAD.format(image=image.tag, holds=image.holds, template="llmapi")
        script = head + _LLMAPI.format(model=deployment.model)
        return {"model.yaml": model_yaml(deployment), "serve.sh": script}
    head = _HEAD.format(image=image.tag, holds=image.holds, template="inflight_batcher_llm")
    fills = "\n".join(_fill(model, values) for model, values in parameters(deployment).items())
    return {"serve.sh": head + _ENGINE.format(model=deployment.model, fills=fills, gpus=deployment.gpus)}


def model_yaml(deployment: Deployment) -> str:
    """`1/model.yaml` of the `llmapi` backend: what TensorRT-LLM's `LLM` takes, and Triton's `triton_config`."""
    import yaml

    cache: dict[str, Json] = {
        "free_gpu_memory_fraction": deployment.gpu_memory_fraction,
        "enable_block_reuse": deployment.block_reuse,
        "dtype": deployment.kv_cache if deployment.kv_cache == "fp8" else None,
    }
    cache = {key: value for key, value in cache.items() if value is not None}
    more = deployment.serve.get("kv_cache_config")
    if isinstance(more, dict):
        cache |= more
    values: dict[str, Json] = {
        "model": f"/artifact/{deployment.model}",
        "backend": "pytorch",
        "dtype": deployment.dtype,
        "tensor_parallel_size": deployment.tensor_parallel,
        "pipeline_parallel_size": deployment.pipeline_parallel,
        "moe_expert_parallel_size": deployment.expert_parallel if deployment.expert_parallel > 1 else None,
        "max_batch_size": deployment.max_batch_size,
        "max_input_len": deployment.max_input_len,
        "max_seq_len": deployment.max_seq_len,
        "max_num_tokens": deployment.max_num_tokens,
        "max_beam_width": deployment.max_beam_width if deployment.max_beam_width > 1 else None,
        "trust_remote_code": True if deployment.trust_remote_code else None,
        "enable_chunked_prefill": deployment.chunked_prefill,
        "kv_cache_config": cache or None,
        **{k: v for k, v in deployment.serve.items() if k not in (*_SERVER_ONLY, "kv_cache_config")},
        # The backend batches inside TensorRT-LLM, so Triton must not; decoupled: it may stream.
        "triton_config": {"max_batch_size": 0, "decoupled": True},
    }
    said = {key: value for key, value in values.items() if value is not None}
    return "# Of the container's all_models/llmapi: the arguments of TensorRT-LLM's LLM.\n" + yaml.safe_dump(
        said, sort_keys=False, allow_unicode=True, width=120
    )


def parameters(deployment: Deployment) -> dict[str, dict[str, str]]:
    """What fill_template.py puts into the config.pbtxt of each model of `inflight_batcher_llm`.

    `$engine` and `$artifact` stand for the folders of the engines and of the tokenizer. Raises SettingsError for
    options of `compile.serve` that the backend has no parameter for.
    """
    batch = {"triton_max_batch_size": str(deployment.max_batch_size)}
    queue = {"max_queue_delay_microseconds": "0", "max_queue_size": "0"}
    logits = {"logits_datatype": "TYPE_FP32"}
    executor = {
        "triton_backend": "tensorrtllm",
        **batch,
        "decoupled_mode": "true",
        **queue,
        "engine_dir": "$engine",
        "tokenizer_dir": "$artifact",
        "batching_strategy": "inflight_fused_batching",
        "encoder_input_features_data_type": "TYPE_FP16",
        "prompt_embedding_table_data_type": "TYPE_FP16",
        **logits,
        "max_beam_width": str(deployment.max_beam_width),
        **_executor_options(deployment),
    }
    return {
        "ensemble": {**batch, **logits},
        "preprocessing": {"tokenizer_dir": "$artifact", **batch, **queue, "preprocessing_instance_count": "1"},
        "tensorrt_llm": executor,
        "postprocessing": {"tokenizer_dir": "$artifact", **batch, "postprocessing_instance_count": "1"},
        "tensorrt_llm_bls": {
            **batch,
            "decoupled_mode": "true",
            # Each instance holds one request at a time (docs/model_config.md, tensorrt_llm_bls).
            "bls_instance_count": str(deployment.max_batch_size),
            **logits,
            "prompt_embedding_table_data_type": "TYPE_FP16",
        },
    }


def _executor_options(deployment: Deployment) -> dict[str, str]:
    """Optional parameters of the model `tensorrt_llm`, by its documentation's names."""
    options: dict[str, Json] = {
        "kv_cache_free_gpu_mem_fraction": deployment.gpu_memory_fraction,
        "enable_kv_cache_reuse": deployment.block_reuse,
        "enable_chunked_context": deployment.chunked_prefill,
    }
    for key, value in deployment.serve.items():
        if key in _SERVER_ONLY:
            continue
        for setting, item in value.items() if isinstance(value, dict) else [("", value)]:
            options |= _executor_option(f"{key}.{setting}" if setting else key, item)
    texts = {
        key: value if isinstance(value, str) else str(value) for key, value in options.items() if value is not None
    }
    return {key: text.lower() if text in ("True", "False") else text for key, text in texts.items()}


def _executor_option(setting: str, value: Json) -> dict[str, Json]:
    """A setting of TensorRT-LLM's LlmArgs as the executor's parameter."""
    names: Mapping[str, str] = {
        "kv_cache_config.max_tokens": "max_tokens_in_paged_kv_cache",
        "kv_cache_config.sink_token_length": "sink_token_length",
        "kv_cache_config.host_cache_size": "kv_cache_host_memory_bytes",
        "extended_runtime_perf_knob_config.multi_block_mode": "multi_block_mode",
        "extended_runtime_perf_knob_config.enable_context_fmha_fp32_acc": "enable_context_fmha_fp32_acc",
        "extended_runtime_perf_knob_config.cuda_graph_mode": "cuda_graph_mode",
        "extended_runtime_perf_knob_config.cuda_graph_cache_size": "cuda_graph_cache_size",
        "guided_decoding_backend": "guided_decoding_backend",
        "iter_stats_max_iterations": "iter_stats_max_iterations",
        "request_stats_max_iterations": "request_stats_max_iterations",
        "normalize_log_probs": "normalize_log_probs",
    }
    if setting == "scheduler_config.capacity_scheduler_policy" and value in _POLICIES:
        return {"batch_scheduler_policy": _POLICIES[str(value)]}
    if setting not in names:
        raise SettingsError(
            f"Triton's tensorrtllm backend has no parameter for `compile.serve.{setting}`",
            hint="leave it out, or serve the engine with `trtllm-serve` (serve.sh)",
        )
    return {names[setting]: value}


def _fill(model: str, values: Mapping[str, str]) -> str:
    """A call of the script's `fill`; only the paths are left to the shell."""
    paths = ("$engine", "$artifact")
    pairs = (f'"{k}:{v}"' if v in paths else shlex.quote(f"{k}:{v}") for k, v in values.items())
    return " \\\n  ".join([f"fill {model}", *pairs])
