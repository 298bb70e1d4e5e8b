"""What is said of an engine that could only be prepared: what was looked for, what is there, what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmopt.artifacts.disk import byte_size
from llmopt.artifacts.outcome import Json

if TYPE_CHECKING:
    from llmopt.pipeline.runner import StageResult

_VLLM = "vLLM"


def about(result: StageResult) -> dict[str, Json]:
    """For `--json`, beside the result: what was probed, and the next command."""
    from llmopt.compilers.trt_llm import gpu

    probe = gpu.probe()
    return {"probed": {"found": str(probe), "gpus": [each.to_json() for each in probe.gpus]}, "next": _next(result)}


def text(result: StageResult, more: Mapping[str, Json]) -> str:
    said, probed = result.metrics, more["probed"]
    checked = said["validated"]
    assert isinstance(checked, dict)
    assert isinstance(probed, dict)
    runtime = f"{said['runtime']} {said['version']}"
    needs = f"{said['gpus']} GPU{'' if said['gpus'] == 1 else 's'}"
    needs += f" of {said['architecture']} ({said['gpu']})" if said.get("architecture") else ""
    size, numbers = checked["bytes"], said.get("quant_algo") or said.get("quantization") or said["dtype"]
    ranks = "1 rank" if checked["ranks"] == 1 else f"{checked['ranks']} ranks"
    assert isinstance(size, int)
    undone = "not tried" if said["runtime"] == _VLLM else "not compiled"  # vLLM compiles when it loads
    undone += ", though here is" if probed["gpus"] else ""
    lines = {
        "prepared": f"{said['mode']} for {runtime}, {undone}: {probed['found']}",
        "weights": f"{numbers}, {checked['tensors']} tensors, {byte_size(size)}, {ranks}",
        "validated": "names, shapes, dtypes, completeness, ranks, scales, and every digest",
        "needs": f"{needs}, {runtime}",
        "next": str(more["next"]),
    }
    return "\n".join(f"{name:<9} {line}" for name, line in lines.items())


def _next(result: StageResult) -> str:
    """On a machine that shares the store, or anywhere from a copy."""
    there = f"copy it there (`--out DIR`, or {result.path})"
    if result.metrics["runtime"] == _VLLM:
        return f"{there} and `bash deploy/vllm/serve.sh`"
    start = f"{there} and `bash {'serve' if result.metrics['mode'] == 'bundle' else 'build'}.sh`"
    return f"`llmopt compile --resume {result.artifact[:19]} --builder PYTHON` where the GPU is; or {start}"
