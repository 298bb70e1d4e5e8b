"""`vllm serve`: the YAML against the rules by which vLLM reads it, and the script with a command of that name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Lay, Run
from deployments import BUNDLE, ENGINE, VLLM

from llmopt.compilers.deploy import vllm
from llmopt.compilers.deploy.base import Deployment
from llmopt.errors import SettingsError

#: Long names of `vllm serve` that are used here: docs.vllm.ai, cli/serve (0.20), the same since 0.10.
KNOWN = {
    *("served-model-name", "dtype", "tensor-parallel-size", "pipeline-parallel-size", "enable-expert-parallel"),
    *("max-num-seqs", "max-model-len", "max-num-batched-tokens", "gpu-memory-utilization", "kv-cache-dtype"),
    *("enable-prefix-caching", "enable-chunked-prefill", "trust-remote-code", "enforce-eager", "speculative-config"),
}


def as_vllm_reads(values: dict[str, Any]) -> list[str]:
    """The rules of vllm/utils/argparse_utils.py, load_config_file (2026), written down from their description."""
    line: list[str] = []
    for key, value in values.items():
        if value is True:
            line += [f"--{key}"]
        elif value is False:
            line += [f"--no-{key}"]
        elif isinstance(value, dict):
            line += [f"--{key}", json.dumps(value)]
        else:
            line += [f"--{key}", str(value)]
    return line


@pytest.mark.parametrize("deployment", [VLLM, BUNDLE])
def test_the_yaml_has_long_names_of_vllm(deployment: Deployment) -> None:
    values = yaml.safe_load(vllm.emit(deployment)["serve.yaml"])
    assert set(values) <= KNOWN
    assert {"served-model-name", "tensor-parallel-size", "max-num-seqs", "max-model-len"} <= set(values)


def test_the_yaml_and_the_command_line_say_the_same() -> None:
    deployment = dataclasses.replace(VLLM, block_reuse=False, trust_remote_code=True, pipeline_parallel=2)
    values = yaml.safe_load(vllm.emit(deployment)["serve.yaml"])
    assert vllm.command_line(vllm.arguments(deployment)) == as_vllm_reads(values)


def test_what_is_not_said_is_left_to_vllm() -> None:
    bare = Deployment(name="m", runtime="vllm", version="0.20.1", mode="bundle", model="model")
    assert yaml.safe_load(vllm.emit(bare)["serve.yaml"]) == {
        "served-model-name": "m",
        "dtype": "auto",
        "tensor-parallel-size": 1,
        "max-num-seqs": 256,
    }


def test_the_script_serves_the_model_of_its_artifact(lay: Lay, run: Run) -> None:
    artifact = lay(VLLM, "vllm")
    done = run(artifact / "deploy" / "vllm" / "serve.sh", {"vllm": 'printf "%s\\n" "$@"'}, "--seed", "1", PORT="9000")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "serve",
        str(artifact / "model"),
        "--config",
        str(artifact / "deploy" / "vllm" / "serve.yaml"),
        *("--host", "0.0.0.0", "--port", "9000", "--seed", "1"),
    ]


def test_the_script_fails_where_the_model_is_not(lay: Lay, run: Run) -> None:
    artifact = lay(VLLM, "vllm")
    Path(artifact / "model").rmdir()
    assert run(artifact / "deploy" / "vllm" / "serve.sh", {"vllm": "exit 0"}).returncode != 0


def test_an_engine_is_refused_with_the_way_out() -> None:
    with pytest.raises(SettingsError) as caught:
        vllm.emit(ENGINE)
    assert caught.value.hint == "use the target `vllm`, or `mode: bundle` with FP8 weights"


def test_a_bundle_that_vllm_does_not_load_is_refused() -> None:
    with pytest.raises(SettingsError, match="does not load ModelOpt checkpoints of `W4A16_AWQ`"):
        vllm.emit(dataclasses.replace(BUNDLE, quantization="W4A16_AWQ"))


def test_options_of_another_runtime_are_not_passed_on() -> None:
    with pytest.raises(SettingsError, match=r"`compile.serve.cuda_graph_config` is TensorRT-LLM's"):
        vllm.emit(dataclasses.replace(BUNDLE, serve={"cuda_graph_config": {}}))


def test_a_fraction_of_other_memory_is_not_passed_on() -> None:
    text = vllm.emit(BUNDLE)["serve.yaml"]
    assert "gpu-memory-utilization" not in yaml.safe_load(text)
    assert "# gpu-memory-utilization is vLLM's default" in text
