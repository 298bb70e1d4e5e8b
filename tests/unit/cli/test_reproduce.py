"""`llmopt reproduce`: the same artifact again from its manifest alone, and what is said where it is not the same."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmopt.artifacts.store import Store
from llmopt.pipeline import stages

Llmopt = Callable[..., Any]
SMALL = ("--method", "gptq", "--sweeps", 0, "--no-compensate", "--group-size", 32, "--samples", 4, "--seq-len", 32)
RTN = ("--method", "rtn", "--group-size", 32)


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def inputs_of(llmopt: Llmopt, artifact: str) -> dict[str, str]:
    found = llmopt("store", "show", artifact, "--json").json["manifest"]["action"]["inputs"]
    assert isinstance(found, dict)
    return found


def everything(store: Path) -> set[str]:
    return {str(path.relative_to(store)) for path in store.rglob("*") if path.is_file() and "trees" not in path.parts}


def test_a_quantization_its_calibration_set_its_engine_and_its_evaluation_come_out_identical(
    llmopt: Llmopt, model: Path, store: Path
) -> None:
    quantized = llmopt("quantize", model, *SMALL, "--override", "*.q_proj=bits:8", "--json").json["artifact"]
    made = {
        "quantize": quantized,
        "calibrate": inputs_of(llmopt, quantized)["calibration"],
        "compile": llmopt("compile", quantized, "--json").json["artifact"],
        "eval": llmopt("eval", quantized, "--windows", 2, "--seq-len", 32, "--against", model, "--json").json[
            "artifact"
        ],
    }
    before = everything(store)
    given = {"quantize": ["--model", model], "eval": ["--model", model]}
    for op, artifact in made.items():
        ran = llmopt("reproduce", artifact, *given.get(op, []), "--json")
        assert (op, ran.code, ran.json["outcome"]) == (op, 0, "identical")
        assert ran.json["remade"] == artifact
        assert ran.json["kept"] is False
    assert everything(store) == before


def test_a_plan_and_what_is_prepared_from_it_come_out_identical(llmopt: Llmopt, model: Path) -> None:
    ran = llmopt("compile", model, "--target", "tensorrt-llm", "--set", "serve.enable_chunked_prefill=true", "--json")
    assert ran.code == 3
    prepared = ran.json["artifact"]
    for artifact in (inputs_of(llmopt, prepared)["plan"], prepared):
        again = llmopt("reproduce", artifact, "--model", model, "--json")
        assert (again.code, again.json["outcome"]) == (0, "identical")


def test_a_conversion_comes_out_identical(llmopt: Llmopt, model: Path) -> None:
    quantized = llmopt("quantize", model, *RTN, "--json").json["artifact"]
    converted = llmopt("quantize", quantized, "--method", "convert", "--format", "gptq", "--json").json["artifact"]
    assert llmopt("reproduce", converted, "--json").json["outcome"] == "identical"


def test_another_version_that_gives_the_same_bytes_is_told_and_no_failure(
    llmopt: Llmopt, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = llmopt("quantize", model, *RTN, "--json").json["artifact"]
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0" if name == "torch" else version(name))
    ran = llmopt("reproduce", quantized, "--model", model)
    assert ran.code == 0
    assert "the same files, by another action" in ran.out
    assert f"other     deps.torch: {version('torch')} -> 99.0" in ran.out


@pytest.fixture
def nondeterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every quantization from now on writes a file more, which is another every time."""
    from llmopt import quantizers

    quantize, times = quantizers.quantize, iter(range(9))

    def other(model: Path, settings: Any, calibration: Any, out: Path, *rest: Any, **more: Any) -> Any:
        outcome = quantize(model, settings, calibration, out, *rest, **more)
        (out / "generation_config.json").write_text(json.dumps({"time": next(times)}))
        return outcome

    monkeypatch.setattr(quantizers, "quantize", other)


def test_a_different_result_of_the_same_action_is_kept_and_flagged_everywhere(
    llmopt: Llmopt, model: Path, tmp_path: Path, nondeterministic: None
) -> None:
    made = llmopt("quantize", model, *RTN, "--json").json
    ran = llmopt("reproduce", made["artifact"], "--model", model)
    assert ran.code == 4
    assert "file      generation_config.json: other bytes, 11 -> 11" in ran.out
    assert "not reproducible" in ran.out
    listed = {row["artifact"]: row["reproducible"] for row in llmopt("store", "ls", "--json").json["artifacts"]}
    assert len(listed) == 2
    assert not any(listed.values())
    assert llmopt("store", "ls").out.count("quantize.rtn (1 of 2 different results)") == 2
    shown = llmopt("store", "show", made["artifact"], "--json").json
    assert shown["reproducible"] is False
    assert set(shown["results"]) == set(listed)
    assert "not reproducible" in llmopt("store", "show", made["artifact"]).out
    (tmp_path / "p.yaml").write_text(f"model: {model}\nquantize: {{method: rtn, group_size: 32}}\n")
    explained = llmopt("run", tmp_path / "p.yaml", "--explain", "--dry-run")
    assert "quantize is not reproducible:" in explained.out
    assert all(artifact in explained.out for artifact in listed)
    assert set(llmopt("run", tmp_path / "p.yaml", "--json").json["stages"][0]["results"]) == set(listed)


def test_a_reproducible_artifact_is_flagged_as_one(llmopt: Llmopt, model: Path) -> None:
    made = llmopt("quantize", model, *RTN, "--json").json
    (row,) = llmopt("store", "ls", "--json").json["artifacts"]
    assert row["reproducible"] is True
    assert llmopt("store", "show", made["artifact"], "--json").json["results"] == []


def test_a_model_that_is_nowhere_is_asked_for(llmopt: Llmopt, model: Path) -> None:
    made = llmopt("quantize", model, *RTN, "--json").json
    ran = llmopt("reproduce", made["artifact"])
    assert ran.code == 1
    assert "is not in the store" in ran.error
    assert "--model FOLDER" in ran.error


def test_a_model_that_is_another_one_is_refused_with_both_ids(
    llmopt: Llmopt, model: Path, make_checkpoint: Callable[..., Path]
) -> None:
    made = llmopt("quantize", model, *RTN, "--json").json
    wanted = inputs_of(llmopt, made["artifact"])["model"]
    other = make_checkpoint("llama", seed=7)
    ran = llmopt("reproduce", made["artifact"], "--model", model, "--model", other)
    assert ran.code == 2
    assert wanted in ran.error
    assert ran.error.count("`sha256:") == 2


def test_a_measurement_and_what_a_gpu_built_are_refused(llmopt: Llmopt, store: Path, tmp_path: Path) -> None:
    from llmopt.artifacts.manifest import Action

    for op, hint in (("bench", "measure again"), ("compile.tensorrt-llm.build", "--resume")):
        (tmp_path / "file").mkdir(exist_ok=True)
        (tmp_path / "file" / "x").write_text(op)
        action = Action(op=op, op_version=1, inputs={}, settings={}, code="", deps={}, target={})
        made = Store.open().put(tmp_path / "file", kind="report", action=action)
        ran = llmopt("reproduce", made.id)
        assert ran.code == 2
        assert hint in ran.error


def test_an_own_calibration_text_is_found_by_its_digest(
    llmopt: Llmopt, model: Path, tmp_path: Path, text: Path
) -> None:
    own = tmp_path / "own.txt"
    own.write_text(text.read_text()[:100_000])
    quantized = llmopt("quantize", model, *SMALL, "--calib", own, "--json").json["artifact"]
    calibration = inputs_of(llmopt, quantized)["calibration"]
    assert llmopt("reproduce", calibration).code == 1
    ran = llmopt("reproduce", calibration, "--model", own, "--json")
    assert (ran.code, ran.json["outcome"]) == (0, "identical")


def test_arithmetic_is_that_of_the_artifact_and_not_of_the_machine(
    llmopt: Llmopt, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmopt.pipeline import machine

    monkeypatch.setattr(machine, "has_bfloat16", lambda: False)
    quantized = llmopt("quantize", model, *SMALL, "--json").json["artifact"]
    monkeypatch.setattr(machine, "has_bfloat16", lambda: True)
    assert llmopt("reproduce", quantized, "--model", model, "--json").json["outcome"] == "identical"


def test_every_operation_of_the_stages_is_known(model: Path) -> None:
    """Whoever adds one has to say here how it is made again, or that it is not."""
    from llmopt.pipeline.provenance import SOURCES

    assert {name.partition(".")[0] for name in SOURCES} == {"calibrate", "quantize", "compile", "eval", "bench"}
    assert stages.REFERENCES.keys() == {"quantize", "compile", "eval", "bench"}
