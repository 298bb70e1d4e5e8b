from __future__ import annotations

from typing import Any

import pytest

from llmopt.cli.verdict import exit_code, text


def spread(value: float) -> dict[str, Any]:
    return {"p50": value, "p99": 2 * value}


def report(**changes: Any) -> dict[str, Any]:
    summary = {
        "requests": 12, "errors": {"cut": 1, "timeout": 2}, "tokens_per_s": 1234.5, "requests_per_s": 9.87,
        "ttft_ms": spread(20), "itl_ms": spread(5), "e2e_ms": spread(300),
    }  # fmt: skip
    return {
        "valid": True, "invalid_because": None, "settings": {}, "notes": [], "gate": None, "sweep": None,
        "results": {"candidate": {"c4": summary}},
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("verdict", "code"), [("pass", 0), ("fail", 5), ("inconclusive", 7), (None, 0)]
)  # fmt: skip
def test_the_exit_code_is_the_verdict_s(verdict: str | None, code: int) -> None:
    assert exit_code({"gate": {"verdict": verdict}}) == code


def test_without_a_gate_it_is_0() -> None:
    assert exit_code({"candidate": {}}) == 0


def test_the_table_has_a_row_a_level_with_all_errors() -> None:
    row = text(report()).splitlines()[1].split()
    assert row[:4] == ["candidate", "c4", "12", "3"]
    assert "1234" in row or "1235" in row


def test_an_open_loop_is_shown_from_its_schedule_too() -> None:
    assert "scheduled p99" not in text(report())
    late = report()
    late["results"]["candidate"]["c4"]["ttft_scheduled_ms"] = spread(800)
    assert "scheduled p99" in text(late).splitlines()[0]
    assert "1600" in text(late).splitlines()[1]


@pytest.mark.parametrize(
    ("kind", "best", "says"),
    [
        ("streams", 16.0, "best 16 streams; throughput grew no more"),
        ("rate", 2.5, "best 2.5 requests/s; throughput grew no more"),
        ("rate", None, "best none meets the thresholds; throughput grew no more"),
    ],
)
def test_a_sweep_says_what_it_found(kind: str, best: float | None, says: str) -> None:
    sweep = {"kind": kind, "knee": 8.0, "best": best, "at_limit": False, "stopped": "throughput grew no more"}
    assert f"knee      8, {says}" in text(report(sweep=sweep))


def test_each_reason_has_a_line() -> None:
    slo = [
        {"slo": f"ttft_ms_p50<={n}", "level": "c4", "subject": "candidate", "value": 20.0, "met": False} for n in (1, 2)
    ]
    lines = text(report(gate={"verdict": "fail", "slo": slo})).splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("verdict   failed: ttft_ms_p50<=1 is broken"))
    assert lines[at + 1].strip().startswith("ttft_ms_p50<=2 is broken")
    assert lines[at + 2].strip() == "0 of 2 objectives passed"
