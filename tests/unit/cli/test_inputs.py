"""`llmopt quantize --calib, --calib-field, --adapter`: what they name, and what of it is in the store."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from llmopt.errors import Exit

Llmopt = Callable[..., Any]
SMALL = ("--method", "gptq", "--sweeps", 0, "--no-compensate", "--group-size", 32, "--json")
SIZE = ("--samples", 4, "--seq-len", 32)
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {i} says much", "n": i}) + "\n" for i in range(100)))
    return file


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "lora"
    folder.mkdir()
    random = np.random.default_rng(0)
    save_file(
        {
            f"base_model.model.{QUERY}.lora_A.weight": random.normal(size=(4, 128)).astype(np.float32),
            f"base_model.model.{QUERY}.lora_B.weight": random.normal(size=(128, 4)).astype(np.float32),
        },
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    return folder


def manifest(llmopt: Llmopt, artifact: str) -> dict[str, Any]:
    shown = llmopt("store", "show", artifact, "--json").json["manifest"]
    assert isinstance(shown, dict)
    return shown


def test_the_calibration_set_is_an_artifact_of_its_own(llmopt: Llmopt, tiny: Path, rows: Path) -> None:
    made = llmopt("quantize", tiny, *SMALL, *SIZE, "--calib", rows).json
    calibration = manifest(llmopt, manifest(llmopt, made["artifact"])["action"]["inputs"]["calibration"])
    assert calibration["kind"] == "calibration"
    assert calibration["action"]["op"] == "calibrate"
    assert calibration["action"]["inputs"].keys() == {"tokenizer", "data"}
    assert calibration["action"]["settings"] == {
        "samples": 4, "seq_len": 32, "seed": 0, "packing": "rows", "field": None, "eos_token_id": 0
    }  # fmt: skip
    assert calibration["metrics"]["tokens"] == 128


def test_models_with_one_tokenizer_share_it(
    llmopt: Llmopt, tiny: Path, make_checkpoint: Callable[..., Path], rows: Path
) -> None:
    other = make_checkpoint("qwen3")
    made = [llmopt("quantize", model, *SMALL, *SIZE, "--calib", rows) for model in (tiny, other)]
    used = {manifest(llmopt, ran.json["artifact"])["action"]["inputs"]["calibration"] for ran in made}
    assert len(used) == 1
    assert "windows of 32 tokens" in made[0].err
    assert "windows of 32 tokens" not in made[1].err


def test_another_method_takes_the_same_set(llmopt: Llmopt, tiny: Path) -> None:
    llmopt("quantize", tiny, *SMALL, *SIZE)
    assert "windows of" not in llmopt("quantize", tiny, *SMALL, *SIZE, "--bits", 3).err


def test_a_set_can_be_given_as_it_is_and_says_its_size(llmopt: Llmopt, tiny: Path, rows: Path, tmp_path: Path) -> None:
    made = llmopt("quantize", tiny, *SMALL, *SIZE, "--calib", rows).json
    calibration = manifest(llmopt, made["artifact"])["action"]["inputs"]["calibration"]
    llmopt("store", "name", calibration, "my-rows")
    llmopt("store", "export", calibration, tmp_path / "exported")
    for reference in (calibration, calibration[:19], "my-rows", tmp_path / "exported"):
        again = llmopt("quantize", tiny, *SMALL, "--calib", reference).json
        assert (again["cached"], again["artifact"]) == (True, made["artifact"])
    ran = llmopt("quantize", tiny, *SMALL[:-1], "--samples", 8, "--calib", "my-rows")
    assert ran.code == Exit.USAGE
    assert "`samples` cannot be 8: the calibration set `my-rows` has 4" in ran.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--calib-field", "body"), 2, "`calib_field` is of a file with rows"),
        (("--calib", "none.jsonl"), 1, "no text file at `none.jsonl`"),
        (("--calib", "datasets:nobody"), 2, "`datasets:nobody` names no data set"),
        (("--adapter", "none"), 1, "no `adapter_config.json` in the adapter `none`"),
    ],
)
def test_what_is_not_there_is_told_before_work(
    llmopt: Llmopt, tiny: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    ran = llmopt("quantize", tiny, *SMALL[:-1], *SIZE, *arguments)
    assert (ran.code, ran.out) == (code, "")
    assert message in ran.error
    assert "\nhint: " in ran.error


def test_a_model_is_no_calibration_set(llmopt: Llmopt, tiny: Path) -> None:
    ran = llmopt("quantize", tiny, *SMALL[:-1], *SIZE, "--calib", tiny)
    assert ran.code == Exit.USAGE
    assert "is a checkpoint, not a calibration set" in ran.err


def test_a_calibration_set_is_no_model(llmopt: Llmopt, tiny: Path) -> None:
    made = llmopt("quantize", tiny, *SMALL, *SIZE).json
    calibration = manifest(llmopt, made["artifact"])["action"]["inputs"]["calibration"]
    ran = llmopt("compile", calibration)
    assert ran.code == Exit.USAGE
    assert "is a calibration set" in ran.err


def test_nothing_is_tokenized_for_a_model_that_cannot_be_quantized(
    llmopt: Llmopt, tiny: Path, store: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("short")
    ran = llmopt("quantize", tiny, *SMALL[:-1], "--seq-len", 100000, "--calib", tmp_path / "short.txt")
    assert "the model has 256 positions" in ran.err
    assert not store.exists()


def test_an_adapter_is_an_input_by_its_own_digest(llmopt: Llmopt, tiny: Path, adapter: Path, tmp_path: Path) -> None:
    rounding = ("--method", "rtn", "--group-size", 32, "--json")
    plain, adapted = (llmopt("quantize", tiny, *rounding, *more).json for more in ((), ("--adapter", adapter)))
    inputs = manifest(llmopt, adapted["artifact"])["action"]["inputs"]
    assert inputs.keys() == {"model", "adapter"}
    assert plain["artifact"] != adapted["artifact"]
    elsewhere = Path(shutil.copytree(adapter, tmp_path / "elsewhere"))
    (elsewhere / "README.md").write_text("what no merge reads")
    (elsewhere / "tokenizer.json").write_text("{}")
    assert llmopt("quantize", tiny, *rounding, "--adapter", elsewhere).json["cached"]


def test_a_pipeline_names_its_files_beside_itself(
    llmopt: Llmopt, tiny: Path, adapter: Path, rows: Path, tmp_path: Path
) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(
        f"model: {tiny}\n"
        "quantize: {method: gptq, sweeps: 0, compensate: false, group_size: 32, samples: 4, seq_len: 32,"
        " calib: rows.jsonl, calib_field: text, adapter: lora}\n"
    )
    value = llmopt("run", file, "--json").json
    assert [stage["stage"] for stage in value["stages"]] == ["calibrate", "quantize"]
    by_flags = ("--calib", rows, "--calib-field", "text", "--adapter", adapter)
    assert llmopt("quantize", tiny, *SMALL, *SIZE, *by_flags).json["artifact"] == value["artifact"]
    planned = llmopt("run", file, "--dry-run", "--set", "quantize.seq_len=16", "--explain")
    assert "settings.seq_len: 32 -> 16" in planned.out
    assert "unknown until `calibrate` has run" in planned.out


def test_a_hit_loads_nothing_heavy(llmopt: Llmopt, tiny: Path, rows: Path, adapter: Path, store: Path) -> None:
    arguments = ("quantize", tiny, *SMALL, *SIZE, "--calib", rows, "--adapter", adapter)
    assert llmopt(*arguments).code == 0
    code = (
        "import sys\n"
        "from llmopt.cli.app import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "heavy = {'numpy', 'torch', 'tokenizers', 'transformers', 'huggingface_hub', 'pyarrow', 'jinja2', 'rich'}\n"
        "sys.exit(', '.join((heavy | {'cryptography'}) & sys.modules.keys()))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments), "--store", str(store)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.stderr.strip() == ""
    assert json.loads(ran.stdout)["cached"]
