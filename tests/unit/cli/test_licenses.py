"""`--deny-license`: exit 2 before any work, from the flag or the environment, on every command that makes something."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Llmopt = Callable[..., Any]
SMALL = ("--method", "rtn", "--group-size", 32)


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    (folder / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    return folder


def test_each_command_refuses(llmopt: Llmopt, model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(f"model: {model}\nquantize: {{method: rtn, group_size: 32}}\n")
    for command in (["quantize", model, *SMALL], ["compile", model], ["run", tmp_path / "p.yaml"]):
        ran = llmopt(*command, "--deny-license", "mit", "--deny-license", "Llama*")
        assert ran.code == 2
        assert "the licence `llama3.1` by its card" in ran.err
        assert "--deny-license Llama*" in ran.err


def test_a_hit_is_refused_too(llmopt: Llmopt, model: Path) -> None:
    made = llmopt("quantize", model, *SMALL, "--json").json
    assert made["license"] == "llama3.1"
    assert llmopt("quantize", model, *SMALL, "--deny-license", "llama3.1").code == 2
    assert llmopt("quantize", model, *SMALL, "--deny-license", "mit", "--json").json["cached"]


def test_the_environment_denies_for_all_commands(llmopt: Llmopt, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOPT_DENY_LICENSE", "gpl-* llama*")
    assert llmopt("quantize", model, *SMALL).code == 2
    assert llmopt("compile", model).code == 2


def test_the_licence_is_shown(llmopt: Llmopt, model: Path) -> None:
    assert "license   llama3.1" in llmopt("quantize", model, *SMALL).out.splitlines()


def test_a_denied_adapter_stops_before_the_calibration_set_is_made(
    llmopt: Llmopt, model: Path, tmp_path: Path, store: Path
) -> None:
    adapter = tmp_path / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    ran = llmopt("quantize", model, "--adapter", adapter, "--deny-license", "unknown")
    assert ran.code == 2
    assert "`lora` states no licence" in ran.err
    assert not (store / "manifests").exists()
