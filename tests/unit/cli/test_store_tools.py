"""`llmopt store show --lineage` and `llmopt store diff`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Llmopt = Callable[..., Any]
SMALL = ("--method", "gptq", "--sweeps", 0, "--no-compensate", "--group-size", 32, "--samples", 4, "--seq-len", 32)
RTN = ("--method", "rtn", "--group-size", 32)


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    (folder / "README.md").write_text("---\nlicense: gemma\n---\n")
    return folder


def test_lineage_is_a_tree_over_all_inputs_back_to_the_checkpoint(llmopt: Llmopt, model: Path) -> None:
    quantized = llmopt("quantize", model, *SMALL, "--json").json["artifact"]
    engine = llmopt("compile", quantized, "--json").json["artifact"]
    llmopt("eval", quantized, "--windows", 2, "--seq-len", 32, "--against", model)
    root = llmopt("store", "show", engine, "--lineage", "--json").json["lineage"]
    assert (root["id"], root["kind"], root["op"], root["input"]) == (engine, "engine", "compile.openvino", None)
    (below,) = root["inputs"]
    assert (below["id"], below["input"], below["license"]) == (quantized, "model", "gemma")
    assert below["metrics"].keys() >= {"kl_mean", "perplexity", "bits_per_weight"}
    calibration, source = below["inputs"]
    assert (calibration["input"], calibration["kind"], calibration["stored"]) == ("calibration", "calibration", True)
    assert [leaf["input"] for leaf in calibration["inputs"]] == ["data", "tokenizer"]
    assert (source["input"], source["kind"], source["stored"], source["license"]) == ("model", "model", False, "gemma")
    lines = llmopt("store", "show", engine, "--lineage").out.splitlines()
    assert lines[0] == f"{engine[:19]}, engine, compile.openvino, gemma"
    assert f"    model: {source['id'][:19]}, model, gemma, not in the store" in lines


def test_what_is_in_a_lineage_twice_is_told_once(llmopt: Llmopt, model: Path) -> None:
    quantized = llmopt("quantize", model, *SMALL, "--json").json["artifact"]
    report = llmopt("eval", quantized, "--windows", 2, "--seq-len", 32, "--against", quantized, "--json").json[
        "artifact"
    ]
    base, of, text = llmopt("store", "show", report, "--lineage", "--json").json["lineage"]["inputs"]
    assert (base["input"], of["input"], text["input"]) == ("base", "model", "text")
    assert base["inputs"]
    assert (of["again"], of["inputs"]) == (True, [])


def test_diff_says_what_separates_two_artifacts(llmopt: Llmopt, model: Path) -> None:
    one = llmopt("quantize", model, *RTN, "--json").json["artifact"]
    other = llmopt("quantize", model, *RTN[:2], "--group-size", 64, "--override", "*.q_proj=bits:8", "--json").json[
        "artifact"
    ]
    ran = llmopt("store", "diff", one, other, "--json")
    assert ran.code == 0
    found = ran.json
    assert found["settings"]["group_size"] == {"a": 32, "b": 64}
    assert "overrides.*.q_proj.bits" in found["settings"]
    assert found["inputs"] == found["deps"] == found["target"] == {}
    assert found["op"] is None
    assert found["metrics"]["bits_per_weight"]["ratio"] == pytest.approx(
        found["metrics"]["bits_per_weight"]["b"] / found["metrics"]["bits_per_weight"]["a"]
    )
    changed = {file["path"]: file for file in found["files"]["changed"]}
    assert any(name.startswith("quantization_config.") for name in changed["config.json"]["keys"])
    assert "keys" not in next(file for path, file in changed.items() if path.endswith(".safetensors"))
    text = llmopt("store", "diff", one, other).out
    assert "settings  group_size: 32 -> 64" in text
    assert "metric    bits_per_weight: " in text
    assert "file      ~ config.json, " in text


def test_an_artifact_does_not_differ_from_itself(llmopt: Llmopt, model: Path) -> None:
    one = llmopt("quantize", model, *RTN, "--json").json["artifact"]
    ran = llmopt("store", "diff", one, one)
    assert ran.code == 0
    assert ran.out.splitlines()[-1] == "the same artifact"


def test_files_that_only_one_has_are_told_with_their_sizes(llmopt: Llmopt, model: Path) -> None:
    one = llmopt("quantize", model, *RTN, "--json").json["artifact"]
    (model / "LICENSE").write_text("12345")
    other = llmopt("quantize", model, *RTN, "--json").json["artifact"]
    forth, back = llmopt("store", "diff", one, other, "--json").json, llmopt("store", "diff", other, one, "--json").json
    assert forth["files"]["added"] == back["files"]["removed"] == [{"path": "LICENSE", "bytes": 5}]
    assert "model_license" in forth["inputs"]
