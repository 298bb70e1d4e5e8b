"""`llmopt run serving.properties`: what an LMI user has becomes the stages of a run, and the rest is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import Server

Llmopt = Callable[..., Any]

FILE = """\
engine=MPI
option.model_id={model}
option.rolling_batch=trtllm
option.tensor_parallel_degree=2
option.quantize=awq
option.awq_block_size=32
option.calib_size=2
option.calib_max_seq_length=16
option.max_input_len=64
option.max_output_len=64
option.rotary_base=10000
"""


@pytest.fixture
def properties(tmp_path: Path) -> Callable[[object], Path]:
    def write(model: object) -> Path:
        file = tmp_path / "serving.properties"
        file.write_text(FILE.format(model=model))
        return file

    return write


def test_a_dry_run_shows_the_stages_and_tells_what_is_not_carried(
    llmopt: Llmopt, tiny: Path, properties: Callable[[object], Path]
) -> None:
    ran = llmopt("run", properties(tiny), "--dry-run")
    assert ran.code == 0, ran.err
    stages = [line.split()[0] for line in ran.out.splitlines()[1:] if line]
    assert stages[0] in ("calibrate", "quantize")
    assert {"quantize", "compile"} <= set(stages)
    told = [line.split("`")[1] for line in ran.err.splitlines() if line.startswith("serving.properties:")]
    assert told == ["engine=MPI", "option.rolling_batch=trtllm", "option.max_output_len=64", "option.rotary_base=10000"]


def test_the_model_of_a_template_is_given_on_the_command_line(
    llmopt: Llmopt, tiny: Path, properties: Callable[[object], Path]
) -> None:
    file = properties("{{s3url}}")
    ran = llmopt("run", file, "--dry-run")
    assert (ran.code, ran.error.splitlines()[-1]) == (
        2,
        "hint: `--set model=FOLDER`, or write `option.model_id=` in it",
    )
    assert llmopt("run", file, "--dry-run", "--set", f"model={tiny}").code == 0


def test_a_model_on_s3_is_read_from_there(
    llmopt: Llmopt,
    tiny: Path,
    properties: Callable[[object], Path],
    rclone: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rclone.set_in(monkeypatch)
    bucket = rclone.new_bucket()
    for file in tiny.iterdir():
        assert rclone.request("PUT", f"/{bucket}/llama/{file.name}", body=file.read_bytes()).status == 200
    ran = llmopt("run", properties(f"s3://{bucket}/llama/"), "--dry-run", "--json")
    assert ran.code == 0, ran.err
    assert "model_id" not in ran.err
    assert ran.json["stages"] == llmopt("run", properties(tiny), "--dry-run", "--json").json["stages"]


def test_a_misspelt_property_is_an_error_with_its_line(llmopt: Llmopt, tmp_path: Path) -> None:
    file = tmp_path / "serving.properties"
    file.write_text("option.model_id=org/name\noption.rolling_bach=trtllm\n")
    ran = llmopt("run", file)
    assert (ran.code, ran.out) == (2, "")
    assert ran.error.splitlines()[0] == "error: serving.properties:2: `option.rolling_bach` is no property of LMI"
    assert "did you mean `option.rolling_batch`?" in ran.error
