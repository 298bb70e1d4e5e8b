"""What is said of an engine that could only be prepared: what was looked for, what is there, what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmopt.artifacts.disk import byte_size
from llmopt.artifacts.outcome import Json

if TYPE_CHECKING:
    from llmopt.pipeline.runner import StageResult


def about(result: StageResult) -> dict[str, Json]:
    """For `--json`, beside the result: what was probed, and the next command."""
    from llmopt.compilers.trt_llm import gpu

    probe = gpu.probe()
    return {"probed": str(probe), "gpus": [each.to_json() for each in probe.gpus], "next": _next(result)}


def text(result: StageResult, more: Mapping[str, Json]) -> str:
    said = result.metrics
    needs = f"{said['gpus']} GPU{'' if said['gpus'] == 1 else 's'}"
    needs += f" of `{said['architecture']}`" if said.get("architecture") else ""
    needs += f" ({said['gpu']})" if said.get("gpu") else ""
    size = said["weight_bytes"]
    assert isinstance(size, int)
    lines = [
        f"prepared  {said['mode']} for {said['runtime']} {said['version']}, not compiled: {more['probed']}",
        f"written   {said['tensors']} tensors, {byte_size(size)}, {said['quantization'] or 'not quantized'}",
        f"checked   {said['validated']}",
        f"needs     {needs} with {said['runtime']} {said['version']}",
        f"next      {more['next']}",
    ]
    return "\n".join(lines)


def _next(result: StageResult) -> str:
    if result.metrics["runtime"] == "vLLM":
        return f"there: bash {result.path}/serve.sh"
    short = result.artifact[:19]
    return f"there: llmopt compile --resume {short} --builder PYTHON, or copy the folder (--out): bash build.sh"
