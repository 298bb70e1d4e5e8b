"""What the commands print, and where each setting comes from."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmopt.artifacts.outcome import Outcome, silent
from llmopt.cli.deliver import keep_report
from llmopt.errors import MeasurementInvalidError

Llmopt = Callable[..., Any]
SMALL = ("--method", "rtn", "--group-size", 32)
STAGE_KEYS = {"artifact", "action", "cached", "kind", "status", "path", "bytes", "seconds", "metrics"}


def settings_of(llmopt: Llmopt, ran: Any) -> dict[str, Any]:
    settings = llmopt("store", "show", ran.json["artifact"], "--json").json["manifest"]["action"]["settings"]
    assert isinstance(settings, dict)
    return settings


def test_json_is_one_object_with_the_promised_keys(llmopt: Llmopt, tiny: Path) -> None:
    ran = llmopt("quantize", tiny, *SMALL, "--json")
    assert ran.code == 0
    assert ran.json.keys() >= STAGE_KEYS
    assert ran.json["kind"] == "quantized-model"
    assert ran.json["cached"] is False
    assert Path(ran.json["path"], "model.safetensors.index.json").exists()


def test_two_runs_give_the_same_artifact(llmopt: Llmopt, tiny: Path, tmp_path: Path) -> None:
    first = llmopt("quantize", tiny, *SMALL, "--json").json
    elsewhere = llmopt("quantize", tiny, *SMALL, "--json", "--store", tmp_path / "other").json
    assert not elsewhere["cached"]
    assert first["artifact"] == elsewhere["artifact"]
    assert first["action"] == elsewhere["action"]


def test_the_second_run_is_a_hit(llmopt: Llmopt, tiny: Path) -> None:
    first = llmopt("quantize", tiny, *SMALL, "--json").json
    second = llmopt("quantize", tiny, *SMALL, "--json")
    assert second.json | {"cached": False, "seconds": first["seconds"]} == first
    assert second.json["cached"] is True


def test_progress_goes_to_stderr_and_quiet_has_none(llmopt: Llmopt, tiny: Path) -> None:
    loud = llmopt("quantize", tiny, *SMALL)
    assert "block 1/2" in loud.err
    assert "block" not in loud.out
    quiet = llmopt("quantize", tiny, *SMALL, "--bits", 3, "--quiet")
    assert quiet.err == ""
    assert "artifact  sha256:" in quiet.out


def test_a_flag_goes_before_the_environment_that_before_the_profile_that_before_the_default(
    llmopt: Llmopt, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text("quantize: {method: rtn, group_size: 32, bits: 5, seed: 5}\n")
    arguments = ("quantize", tiny, "--profile", profile, "--json")
    found = settings_of(llmopt, llmopt(*arguments))
    assert (found["bits"], found["seed"], found["symmetric"]) == (5, 5, True)
    monkeypatch.setenv("LLMOPT_QUANTIZE_BITS", "6")
    monkeypatch.setenv("LLMOPT_QUANTIZE_SYMMETRIC", "false")
    found = settings_of(llmopt, llmopt(*arguments))
    assert (found["bits"], found["seed"], found["symmetric"]) == (6, 5, False)
    found = settings_of(llmopt, llmopt(*arguments, "--bits", 7, "--symmetric"))
    assert (found["bits"], found["seed"], found["symmetric"]) == (7, 5, True)


def test_flags_add_to_the_overrides_of_a_profile(llmopt: Llmopt, tiny: Path, tmp_path: Path) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text(
        "quantize: {method: rtn, group_size: 32, overrides: {'*.up_proj': {bits: 8}, '*.v*': {bits: 5}}}\n"
    )
    flags = ("--override", "*.down_proj=bits:8,group_size:64", "--skip", "*.up_proj")
    ran = llmopt("quantize", tiny, "--profile", profile, *flags, "--json")
    own = [["*.v*", {"bits": 5}], ["*.down_proj", {"bits": 8, "group_size": 64}], ["*.up_proj", {"skip": True}]]
    plain = {"bits": None, "group_size": None, "symmetric": None, "skip": False}
    assert settings_of(llmopt, ran)["overrides"] == [[pattern, plain | values] for pattern, values in own]


def test_a_value_from_the_environment_is_checked_as_a_flag_is(
    llmopt: Llmopt, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMOPT_QUANTIZE_BITS", "four")
    ran = llmopt("quantize", tiny)
    assert ran.code == 2
    assert "`four` is not a valid integer" in ran.err


def test_out_is_a_folder_that_is_the_artifact(llmopt: Llmopt, tiny: Path, tmp_path: Path) -> None:
    ran = llmopt("quantize", tiny, *SMALL, "--out", tmp_path / "out", "--json").json
    manifest = json.loads((tmp_path / "out" / "llmopt.json").read_text())
    assert manifest["action"]["key"] == ran["action"]
    again = llmopt("quantize", tiny, *SMALL, "--out", tmp_path / "out")
    assert again.code == 0


def test_a_name_stands_for_the_artifact(llmopt: Llmopt, tiny: Path) -> None:
    artifact = llmopt("quantize", tiny, *SMALL, "--name", "tiny-int4", "--json").json["artifact"]
    shown = llmopt("store", "show", "tiny-int4", "--json").json
    assert shown["artifact"] == artifact
    assert shown["names"] == ["tiny-int4"]


def test_an_event_that_changed_numbers_is_shown(llmopt: Llmopt, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmopt import quantizers

    def work(model: Path, settings: object, calibration: object, out: Path, *_: object, **__: object) -> Outcome:
        (out / "config.json").write_text("{}")
        return Outcome(events=("down_proj rounded to nearest",), metrics={"kl": {"mean": 0.5}})

    monkeypatch.setattr(quantizers, "quantize", work)
    ran = llmopt("quantize", tiny, *SMALL)
    assert "note: down_proj rounded to nearest\n" in ran.out
    assert "kl.mean: 0.5\n" in ran.out
    assert llmopt("quantize", tiny, *SMALL, "--json").json["events"] == ["down_proj rounded to nearest"]


def test_bench_always_measures_anew(llmopt: Llmopt, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmopt import bench

    seen: list[Any] = []

    def measure(subjects: Any, settings: Any, out: Path, progress: object, **_: object) -> Outcome:
        seen.append((dict(subjects), settings))
        report = {"schema": "llmopt.report/2", "valid": True, "subjects": {}, "results": {}, "notes": [str(len(seen))]}
        (out / "report.json").write_text(json.dumps(report))
        return Outcome()

    monkeypatch.setattr(bench, "measure", measure)
    arguments = ("bench", "http://127.0.0.1:1", "--against", "http://127.0.0.1:2", "--concurrency", "1,4,16", "--json")
    first, second = llmopt(*arguments).json, llmopt(*arguments, "--timeout", 5).json
    third = llmopt(*arguments).json
    assert len({first["artifact"], second["artifact"], third["artifact"]}) == 3
    assert first["action"] == third["action"] != second["action"]
    assert third["reproducible"]
    subjects, settings = seen[1]
    assert {name: subject.url for name, subject in subjects.items()} == {
        "candidate": "http://127.0.0.1:1", "baseline": "http://127.0.0.1:2"
    }  # fmt: skip
    assert settings.concurrency == (1, 4, 16)
    assert settings.timeout_s == 5.0
    exact = llmopt(*arguments, "--tokenizer", tiny).json
    assert exact["action"] != first["action"]
    assert seen[3][0]["candidate"].tokenizer == tiny


@pytest.fixture
def unfinished(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """A bench that writes a report and then finds that it means nothing."""
    from llmopt import bench

    def measure(subjects: object, settings: object, out: Path, progress: object, **_: object) -> Outcome:
        (out / "report.json").write_text('{"valid": false}')
        raise MeasurementInvalidError("the load was not held", hint="see to it")

    monkeypatch.setattr(bench, "measure", measure)
    return ("bench", "http://127.0.0.1:1")


def test_an_invalid_bench_leaves_its_report_in_out_and_no_artifact(
    llmopt: Llmopt, unfinished: tuple[str, ...], tmp_path: Path
) -> None:
    ran = llmopt(*unfinished, "--out", tmp_path / "deep" / "out")
    assert ran.code == 6
    assert f"the unfinished report is in `{tmp_path / 'deep' / 'out'}`\n" in ran.err
    assert ran.error.startswith("error: the load was not held\n")
    assert [path.name for path in (tmp_path / "deep" / "out").iterdir()] == ["report.json"]
    assert llmopt("store", "ls", "--json").json["artifacts"] == []


def test_a_bench_refuses_an_exported_artifact_before_the_load(
    llmopt: Llmopt, unfinished: tuple[str, ...], tiny: Path, tmp_path: Path
) -> None:
    assert llmopt("quantize", tiny, *SMALL, "--out", tmp_path / "out").code == 0
    before = sorted((tmp_path / "out").iterdir())
    ran = llmopt(*unfinished, "--out", tmp_path / "out")
    assert ran.code == 2
    assert "is not empty" in ran.error
    assert sorted((tmp_path / "out").iterdir()) == before


def test_an_unfinished_report_does_not_go_into_a_folder_with_something_in_it(tmp_path: Path) -> None:
    for name in ("staged", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(name)
    said: list[str] = []
    keep_report(tmp_path / "staged", tmp_path / "out", lambda line, **_: said.append(line))
    assert "is not kept" in str(said)
    assert (tmp_path / "out" / "report.json").read_text() == "out"


def test_what_was_measured_is_kept_without_out_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for name in ("staged", "tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "staged" / "report.json").write_text("{}")
    keep_report(tmp_path / "staged", None, silent)
    assert list((tmp_path / "tmp").iterdir()) == []  # nothing was measured
    (tmp_path / "staged" / "requests.parquet").write_text("rows")
    keep_report(tmp_path / "staged", None, silent)
    (kept,) = (tmp_path / "tmp").iterdir()
    assert {file.name for file in kept.iterdir()} == {"report.json", "requests.parquet"}


def test_a_report_that_cannot_be_kept_does_not_hide_why_the_bench_ended(
    llmopt: Llmopt, unfinished: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copytree", full)
    ran = llmopt(*unfinished, "--out", tmp_path / "out")
    assert ran.code == 6
    assert "could not be kept" in ran.err
    assert ran.error.startswith("error: the load was not held\n")


def test_a_list_of_numbers_is_checked(llmopt: Llmopt) -> None:
    ran = llmopt("bench", "http://127.0.0.1:1", "--concurrency", "1,many")
    assert ran.code == 2
    assert ran.err.startswith("error: `--concurrency 1,many` is not a list of whole numbers\n")


def test_the_store_is_listed_verified_named_and_exported(llmopt: Llmopt, tiny: Path, tmp_path: Path) -> None:
    assert llmopt("store", "ls", "--json").json["artifacts"] == []
    made = llmopt("quantize", tiny, *SMALL, "--json").json
    (listed,) = llmopt("store", "ls", "--json").json["artifacts"]
    assert (listed["artifact"], listed["op"], listed["bytes"]) == (made["artifact"], "quantize.rtn", made["bytes"])
    assert made["artifact"][:19] in llmopt("store", "ls").out
    digits = made["artifact"].removeprefix("sha256:")[:8]
    assert llmopt("store", "name", digits, "first").code == 0
    assert "first" in llmopt("store", "ls").out
    assert llmopt("store", "verify", "first").out == "1 of 1 artifacts are whole\n"
    assert llmopt("store", "export", "first", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "config.json").is_file()
    text = llmopt("store", "show", "first").out
    for part in (made["artifact"], made["action"], "quantize.rtn", "group_size: 32", "config.json", "torch"):
        assert part in text


def test_verify_finds_a_flipped_byte_and_exits_with_4(llmopt: Llmopt, tiny: Path, store: Path) -> None:
    artifact = llmopt("quantize", tiny, *SMALL, "--json").json["artifact"]
    blob = max((path for path in (store / "blobs").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    blob.chmod(0o644)
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(bytes(data))
    ran = llmopt("store", "verify")
    assert ran.code == 4
    assert artifact in ran.out
    assert "0 of 1 artifacts are whole" in ran.out
    assert list(llmopt("store", "verify", "--json").json["problems"]) == [artifact]
    refused = llmopt("quantize", artifact, *SMALL)
    assert refused.code == 4
    healed = llmopt("quantize", tiny, *SMALL, "--json")
    assert healed.json["artifact"] == artifact
    assert not healed.json["cached"]
    assert "damaged" in healed.err
    assert llmopt("store", "verify").code == 0


def test_an_artifact_that_is_not_there(llmopt: Llmopt) -> None:
    for command in ("show", "verify"):
        ran = llmopt("store", command, "nothing")
        assert ran.code == 1
        assert ran.err.startswith("error: no artifact `nothing` in the store")


def test_profiles_are_listed_and_shown_with_every_default(llmopt: Llmopt) -> None:
    names = {profile["name"] for profile in llmopt("profiles", "ls", "--json").json["profiles"]}
    assert {"demo", "int4-gptq", "int4-awq", "int8-smoothquant"} <= names
    shown = llmopt("profiles", "show", "demo", "--json").json
    assert shown["quantize"]["damping"] == 0.01
    assert shown["bench"]["against"] == "base"
    assert "damping: 0.01" in llmopt("profiles", "show", "demo").out


def test_workloads_are_listed_and_shown_beside_the_profiles(llmopt: Llmopt) -> None:
    listed = llmopt("profiles", "ls", "--json").json["workloads"]
    assert {"chat", "rag", "code", "summarise", "agent"} <= {workload["name"] for workload in listed}
    assert all(workload["description"] for workload in listed)
    assert llmopt("profiles", "show", "chat", "--json").json["endpoint"] == "chat"


def test_doctor_says_what_this_machine_can_do(llmopt: Llmopt, store: Path) -> None:
    report = llmopt("doctor", "--json").json
    assert report["targets"]["openvino"]["status"] == "compiled"
    assert report["packages"]["torch"].startswith("2.")
    assert report["store"]["path"] == str(store)
    assert report["memory"]["total_bytes"] > 0
    assert "target       openvino: compiled" in llmopt("doctor").out
