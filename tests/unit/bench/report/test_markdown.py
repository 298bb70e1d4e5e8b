"""Markdown for people, workflow commands for GitHub."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from llmopt.bench.report.markdown import markdown, summary, workflow_commands

MakeReport = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("form", [markdown, summary])
def test_the_verdict_comes_first(make_report: MakeReport, form: Callable[[Any], str]) -> None:
    assert form(make_report()).startswith("# ❌ Load test: failed\n")
    assert form(make_report(gate=None)).startswith("# 📏 Load test: measured\n")
    invalid = form(make_report(valid=False, invalid_because="no request was answered"))
    assert invalid.startswith("# ⛔ Load test: not valid\n")
    assert "no request was answered" in invalid.split("|")[0]


def test_a_verdict_names_the_first_reasons(make_report: MakeReport, make_gate: Callable[..., Any]) -> None:
    gate = make_gate()
    gate["slo"] = [gate["slo"][1] | {"level": f"c{number}"} for number in range(7)]
    found = summary(make_report(gate=gate)).split("\n|")[0]
    assert [line for line in found.splitlines() if line.startswith("- ttft")] == [
        f"- ttft_ms_p99<=200 is broken by `candidate` at c{number}: it was 1250" for number in range(3)
    ]
    assert "- and 5 more\n- 0 of 7 objectives and 3 of 5 comparisons passed" in found


@pytest.mark.parametrize("form", [markdown, summary])
def test_rows_are_as_wide_as_their_table(make_report: MakeReport, form: Callable[[Any], str]) -> None:
    report = make_report()
    report["subjects"]["a|b"] = report["subjects"].pop("baseline")
    report["results"]["a|b"] = report["results"].pop("baseline")
    tables = re.findall(r"(?:^\|.*\n)+", form(report), re.MULTILINE)
    assert len(tables) >= 3
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_figures_come_with_their_interval(make_report: MakeReport) -> None:
    report = make_report()
    ttft = report["results"]["candidate"]["c1"]["ttft_ms"]
    low, high = ttft["ci95"]["p50"]
    assert f"{ttft['p50']:.2f} [{low:.2f}, {high:.2f}]" in markdown(report)


def test_a_tag_in_a_note_is_text(make_report: MakeReport) -> None:
    assert "<script" not in markdown(make_report(notes=["an answer: <script>alert(1)</script>"]))


def test_the_summary_has_few_notes(make_report: MakeReport) -> None:
    found = summary(make_report(notes=[f"note {number}" for number in range(40)]))
    assert "40 notes" in found
    assert "note 7" in found
    assert "note 8" not in found


def test_details_are_closed(make_report: MakeReport) -> None:
    for text in (markdown(make_report()), summary(make_report())):
        assert text.count("<details>") == text.count("</details>") == text.count("<summary>") > 1


def test_what_was_broken_is_an_error_and_what_is_open_a_warning(make_report: MakeReport) -> None:
    kinds = [line.split(" ")[0] for line in workflow_commands(make_report())]
    assert kinds == ["::error", "::error", "::warning"]


def test_an_invalid_measurement_is_one_error(make_report: MakeReport) -> None:
    (line,) = workflow_commands(make_report(valid=False, invalid_because="too late"))
    assert line == "::error title=llmopt bench%3A measurement not valid::too late"


def test_a_passed_gate_is_silent(make_report: MakeReport, make_gate: Callable[..., Any]) -> None:
    gate = make_gate("pass") | {"comparisons": [], "slo": []}
    assert workflow_commands(make_report(gate=gate)) == []


def test_messages_are_escaped_as_github_reads_them(make_report: MakeReport) -> None:
    (line,) = workflow_commands(make_report(valid=False, invalid_because="100% of\r\nrequests: a, b"))
    assert line.endswith("::100%25 of%0D%0Arequests: a, b")
    head = line[: line.rindex("::")]
    assert not set(",\r\n") & set(head.partition("title=")[2])


def test_github_shows_ten_of_a_kind(make_report: MakeReport, make_gate: Callable[..., Any]) -> None:
    gate = make_gate()
    gate["slo"] = [gate["slo"][1] | {"level": f"c{number}"} for number in range(30)]
    lines = workflow_commands(make_report(gate=gate))
    errors = [line for line in lines if line.startswith("::error")]
    assert len(errors) == 10
    assert "22 more" in errors[-1]


def test_a_comparison_that_decides_nothing_is_no_annotation(
    make_report: MakeReport, make_gate: Callable[..., Any]
) -> None:
    gate = make_gate("pass") | {"enforced": False, "slo": []}
    report = make_report(gate=gate)
    assert workflow_commands(report) == []
    assert markdown(report).startswith("# ✅ Load test: passed")
    assert "3 of 5 comparisons (which decide nothing without `--gate`) passed" in markdown(report)
    assert markdown(make_report(gate=gate | {"verdict": None})).startswith("# 📏 Load test: measured")
