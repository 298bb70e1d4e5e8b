"""The probe against CUDA itself, and what a real machine is refused."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from llmopt.compilers.trt_llm.build import Site
from llmopt.compilers.trt_llm.builder import Builder
from llmopt.compilers.trt_llm.gpu import probe
from llmopt.errors import BackendMissingError

pytestmark = pytest.mark.gpu


def prepared(folder: Path, **changes: Any) -> Path:
    engine = {
        "schema": "llmopt.engine/1",
        "target": "tensorrt-llm",
        "mode": "bundle",
        "version": "1.2.1",
        "architecture": None,
        "tensor_parallel": 1,
        "pipeline_parallel": 1,
    }
    (folder / "engine.json").write_text(json.dumps(engine | changes))
    (folder / "commands.json").write_text(json.dumps({"build": [], "serve": ["trtllm-serve", "{model}"]}))
    return folder


def refusal(folder: Path, **changes: Any) -> str:
    """What is said to an artifact that this machine is not made for; the builder has no TensorRT-LLM."""
    with pytest.raises(BackendMissingError) as caught:
        Site.find(prepared(folder, **changes), Builder.parse(sys.executable))
    return caught.value.message


def test_the_probe_says_what_cuda_says() -> None:
    import torch

    order = os.environ.get("CUDA_DEVICE_ORDER")
    found = sorted((gpu.name, gpu.architecture) for gpu in probe().gpus)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    assert found == sorted(
        (name, f"sm_{major}{minor}") for name, (major, minor) in zip(names, capabilities, strict=True)
    ), f"CUDA_DEVICE_ORDER={order}"


def test_the_probe_knows_memory_and_driver() -> None:
    import torch

    first = probe().gpus[0]
    total_mib = torch.cuda.get_device_properties(0).total_memory >> 20
    assert first.memory_mib is not None
    assert total_mib <= first.memory_mib < 1.1 * total_mib  # the driver keeps some for itself
    assert first.driver


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, architecture="sm_35").startswith("it was prepared for `sm_35`, and here is ")


def test_more_gpus_than_there_are_are_refused(tmp_path: Path) -> None:
    count = len(probe().gpus)
    message = refusal(tmp_path, tensor_parallel=count + 1)
    assert message.startswith(f"this needs {count + 1} GPUs, and here are {count}")


def test_this_architecture_is_not_what_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, architecture=probe().gpus[0].architecture).endswith("has no tensorrt_llm")
