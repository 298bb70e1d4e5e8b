"""`llmopt compile` of what is built elsewhere: what it says, what it refuses, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmopt.cli.options import overridden
from llmopt.errors import SettingsError

RunCommand = Callable[..., Any]
ENGINE = ("--target", "tensorrt-llm", "--mode", "engine", "--gpu", "H100")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmopt.compilers.trt_llm import gpu

    monkeypatch.setattr(gpu, "probe", lambda: gpu.Probe((), ("`nvidia-smi` is not installed",)))


def test_what_could_only_be_prepared_says_what_is_missing_and_what_to_do_next(llmopt: RunCommand, tiny: Path) -> None:
    ran = llmopt("compile", tiny, *ENGINE)
    assert ran.code == 3
    for words in ("`nvidia-smi` is not installed", "1 GPU of sm_90 (H100)", "TensorRT-LLM 1.2.1", "bash build.sh"):
        assert words in ran.out
    said = llmopt("compile", tiny, *ENGINE, "--json").json
    assert (said["kind"], said["status"], said["cached"]) == ("engine", "prepared", True)
    assert f"llmopt compile --resume {said['artifact'][:19]} --builder PYTHON" in said["next"]
    assert said["probed"] == {"found": "`nvidia-smi` is not installed", "gpus": []}


def test_a_folder_is_validated_and_a_damaged_one_is_not_valid(llmopt: RunCommand, tiny: Path, tmp_path: Path) -> None:
    llmopt("compile", tiny, *ENGINE, "--out", tmp_path / "prepared")
    good = llmopt("compile", "--validate", tmp_path / "prepared", "--json")
    assert (good.code, good.json["valid"]) == (0, True)
    config = tmp_path / "prepared" / "checkpoint" / "config.json"
    config.chmod(0o644)
    config.write_text(config.read_text().replace('"hidden_act": "silu"', '"hidden_act": "relu"'))
    bad = llmopt("compile", "--validate", tmp_path / "prepared")
    assert bad.code == 4
    assert "config.json" in bad.error


def test_a_pipeline_that_could_only_prepare_says_so_too(llmopt: RunCommand, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(f"model: {tiny}\ncompile: {{target: tensorrt-llm, gpu: H100}}\n")
    ran = llmopt("run", file)
    assert ran.code == 3
    assert "bundle for TensorRT-LLM 1.2.1, not compiled" in ran.out
    assert llmopt("run", file, "--json").json["status"] == "prepared"


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--resume"], "`--resume` needs to know what builds", "--builder PYTHON"),
        (["--resume", "--tp", "2"], "`--resume` takes no settings, and `tensor_parallel` is one", "in itself"),
        (["--validate", "--set", "build.workers=2"], "`--validate` takes no settings", "in itself"),
        (["--target", "tensorrt-llm", "--set", "build.workers"], "is not `key=value`", "build.workers=2"),
        (["--target", "tensorrt-llm", "--set", "max_batch_sise=3"], "no setting `max_batch_sise`", "`max_batch_size`"),
        (["--target", "tensorrt-llm", "--emit", "kubernetes"], "`compile.emit` cannot be `kubernetes`", "k8s"),
        (["--target", "tensorrt-llm", "--runtime-version", "1.2.2"], "1.2.2", "1.2.1"),
        (["--target", "tensorrt-llm", "--gpu", "H1OO"], "unknown hardware `H1OO`", "`H100`"),
        (["--target", "tensorrt-llm", "--builder", "/no/such/python"], "is no program", "docker:IMAGE"),
        (["--mode", "engine"], "`openvino` has no setting `mode`", "`--target` `tensorrt-llm`"),
        ([*ENGINE, "--runtime-version", "1.3.0"], "1.3.0", "bundle"),
    ],
)
def test_what_cannot_be_used_is_refused(
    llmopt: RunCommand, store: Path, tiny: Path, arguments: list[str], message: str, hint: str
) -> None:
    ran = llmopt("compile", tiny, *arguments)
    assert ran.code == 2, ran.err
    assert message in ran.error
    assert hint in ran.error
    assert not (store / "manifests").exists()


def test_set_reaches_into_a_mapping_and_keeps_what_a_profile_says_there() -> None:
    before = {"build": {"workers": 1}, "version": "1.2.1"}
    found = overridden(before, ["build.gemm_plugin=auto", "max_batch_size=8", "build.workers=2"])
    assert found == {"build": {"workers": 2, "gemm_plugin": "auto"}, "version": "1.2.1", "max_batch_size": 8}
    assert before["build"] == {"workers": 1}
    with pytest.raises(SettingsError):
        overridden({}, ["build.=2"])


def test_the_key_does_not_know_the_builder(llmopt: RunCommand, tiny: Path) -> None:
    first = llmopt("compile", tiny, *ENGINE, "--json").json
    manifest = json.loads((Path(first["path"]) / "llmopt.json").read_text())
    assert "builder" not in json.dumps(manifest["action"])


@pytest.mark.parametrize("mode", ["engine", "bundle"])
def test_preparing_a_plain_checkpoint_loads_no_torch(tiny: Path, tmp_path: Path, mode: str) -> None:
    """It is two thirds of the memory that preparing takes, and half of the time where the model is small."""
    code = (
        "import sys; from llmopt.cli.app import main\n"
        f"code = main(['compile', {str(tiny)!r}, '--target', 'tensorrt-llm', '--mode', {mode!r}, '--quiet',\n"
        f"             '--store', {str(tmp_path)!r}])\n"
        "sys.exit('torch' in sys.modules or code != 3)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
