"""`vllm serve` from a YAML of its arguments, and the script that starts it.

Source: vLLM's documentation, configuration/serve_args (the YAML's keys are the long names of the arguments; what the
command line says comes first) and cli/serve; how the YAML is read: vllm/utils/argparse_utils.py, load_config_file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from llmopt.artifacts.outcome import Json
from llmopt.compilers.deploy.base import Deployment
from llmopt.errors import SettingsError

#: `quant_algo` of ModelOpt checkpoints that vLLM loads and that are written here:
#: vllm/model_executor/layers/quantization/modelopt.py, QUANT_ALGOS (2026).
_MODELOPT = (None, "FP8", "FP8_PER_CHANNEL_PER_TOKEN")
_SCRIPT = """\
#!/usr/bin/env bash
# Serve the model with vLLM {version} on PORT (default 8000) of HOST (default 0.0.0.0); further arguments go to vLLM.
set -euo pipefail
here="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
model="$(cd "$here/../../{model}" && pwd)"
exec vllm serve "$model" --config "$here/serve.yaml" \\
  --host "${{HOST:-0.0.0.0}}" --port "${{PORT:-8000}}" "$@"
"""


def emit(deployment: Deployment) -> dict[str, str]:
    """serve.yaml and serve.sh; SettingsError for what vLLM does not load."""
    import yaml

    values = arguments(deployment)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    version = deployment.version if deployment.runtime == "vllm" else ""
    script = _SCRIPT.format(version=version, model=deployment.model).replace("vLLM  on", "vLLM on")
    return {"serve.yaml": _comment(deployment) + text, "serve.sh": script}


def arguments(deployment: Deployment) -> dict[str, Json]:
    """The arguments of `vllm serve` by their long names, without the model and the socket."""
    _check(deployment)
    own = deployment.runtime == "vllm"
    values: dict[str, Json] = {
        "served-model-name": deployment.name,
        "dtype": deployment.dtype,
        "tensor-parallel-size": deployment.tensor_parallel,
        "pipeline-parallel-size": deployment.pipeline_parallel if deployment.pipeline_parallel > 1 else None,
        "enable-expert-parallel": True if deployment.expert_parallel > 1 else None,
        "max-num-seqs": deployment.max_batch_size,
        "max-model-len": deployment.max_seq_len,
        "max-num-batched-tokens": deployment.max_num_tokens,
        "gpu-memory-utilization": deployment.gpu_memory_fraction if own else None,
        "kv-cache-dtype": deployment.kv_cache if deployment.kv_cache not in (None, "none", "auto") else None,
        "enable-prefix-caching": deployment.block_reuse,
        "enable-chunked-prefill": deployment.chunked_prefill,
        "trust-remote-code": True if deployment.trust_remote_code else None,
    }
    said = {key: value for key, value in values.items() if value is not None}
    return said | {key.replace("_", "-"): value for key, value in deployment.serve.items()}


def _check(deployment: Deployment) -> None:
    if deployment.runtime == "vllm":
        return
    if deployment.mode == "engine":
        raise SettingsError(
            "vLLM does not run TensorRT-LLM's engines", hint="use the target `vllm`, or `mode: bundle` with FP8 weights"
        )
    if deployment.quantization not in _MODELOPT:
        raise SettingsError(
            f"vLLM does not load ModelOpt checkpoints of `{deployment.quantization}`",
            hint="compile for the target `vllm`, which takes other formats",
        )
    if deployment.serve:
        raise SettingsError(
            f"`compile.serve.{next(iter(deployment.serve))}` is TensorRT-LLM's, and vLLM has other options",
            hint="compile for the target `vllm`, whose `serve` is vLLM's, or leave `serve` out",
        )


def _comment(deployment: Deployment) -> str:
    lines = ["Arguments of `vllm serve`, by their long names; the command line goes before this file."]
    if deployment.runtime != "vllm" and deployment.gpu_memory_fraction is not None:
        lines.append(
            "gpu-memory-utilization is vLLM's default: TensorRT-LLM's fraction is of what the model leaves free."
        )
    return "".join(f"# {line}\n" for line in lines)


def command_line(values: Mapping[str, Json]) -> list[str]:
    """The same arguments as on a command line, as vLLM makes them of the YAML."""
    line: list[str] = []
    for key, value in values.items():
        if isinstance(value, bool):
            line.append(f"--{key}" if value else f"--no-{key}")
        elif isinstance(value, list):
            line += [f"--{key}", *(str(item) for item in value)]
        else:
            line += [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return line
