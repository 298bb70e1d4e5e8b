"""The folder of a report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmopt.bench.report import files, flat, folder, foreign
from llmopt.bench.report.requests import Requests
from llmopt.errors import LlmoptError

MakeReport = Callable[..., dict[str, Any]]


def test_a_report_has_every_form(tmp_path: Path, make_report: MakeReport, make_levels: Callable[..., Any]) -> None:
    levels = make_levels(streams=(4,), rounds=2, requests=12)
    folder.prepare(tmp_path)
    with Requests(tmp_path) as requests:
        for level in levels:
            requests.append(level)
    files.write(tmp_path, make_report(levels))
    assert {file.name for file in tmp_path.iterdir()} == {*files.FORMS.values(), "requests.parquet"}


def test_what_was_given_is_what_is_read(tmp_path: Path, make_report: MakeReport) -> None:
    report = make_report()
    files.write(tmp_path, report)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))


def test_a_figure_that_is_no_number_is_null(tmp_path: Path, make_report: MakeReport) -> None:
    files.write(tmp_path, make_report(ratio={"c1": {"ttft_ms_p50": float("nan")}}))
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["ratio"]["c1"]["ttft_ms_p50"] is None


def test_nothing_measured_is_a_report_too(tmp_path: Path, make_report: MakeReport) -> None:
    files.write(tmp_path, make_report([], valid=False, invalid_because="interrupted", gate=None, notes=[]))
    for form in ("html", "markdown", "summary", "junit"):
        assert "interrupted" in (tmp_path / files.FORMS[form]).read_text()


def test_a_folder_that_cannot_be_written_is_found_before(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LlmoptError, match="cannot write to"):
        folder.prepare(tmp_path / "file" / "report")


def test_preparing_leaves_the_folder_empty(tmp_path: Path) -> None:
    folder.prepare(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_preparing_keeps_what_is_there(tmp_path: Path, make_report: MakeReport) -> None:
    files.write(tmp_path, make_report())
    before = sorted(file.name for file in tmp_path.iterdir())
    folder.prepare(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == before


def test_a_form_is_copied(tmp_path: Path, make_report: MakeReport) -> None:
    files.write(tmp_path, make_report())
    files.copy(tmp_path, "junit", tmp_path / "new" / "bench.xml")
    assert (tmp_path / "new" / "bench.xml").read_bytes() == (tmp_path / "junit.xml").read_bytes()


def test_a_copy_that_cannot_be_made_says_where(tmp_path: Path, make_report: MakeReport) -> None:
    files.write(tmp_path, make_report())
    with pytest.raises(LlmoptError, match=r"cannot write .*report\.md"):
        files.copy(tmp_path, "html", tmp_path / "report.md" / "page.html")


def test_a_report_of_another_tool_has_every_form(
    tmp_path: Path, make_report: MakeReport, make_levels: Callable[..., Any]
) -> None:
    levels = make_levels(streams=(4,), rounds=1, requests=12)[:1]
    (tmp_path / "vllm.json").write_text(flat.vllm(make_report(levels), []))
    read = foreign.read([tmp_path / "vllm.json"]).report()
    out = tmp_path / "report"
    folder.prepare(out)
    files.write(out, {"schema": "llmopt.report/2", "settings": {}, "environment": {}} | read)
    assert {file.name for file in out.iterdir()} == {*files.FORMS.values()}
    assert "imported from vllm" in (out / "report.html").read_text()
