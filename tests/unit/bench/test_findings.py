"""From levels to what a report says of them."""

from __future__ import annotations

from typing import Any

import pytest

from llmopt.bench import findings, resolve
from llmopt.bench.client.base import Failure
from llmopt.bench.gate.verdict import Judgement
from llmopt.bench.metrics.figures import Level
from llmopt.bench.metrics.records import Record
from llmopt.bench.settings import LoadShape

MS = 1_000_000


def record(sent_ms: int, ttft_ms: float, failure: Failure | None = None) -> Record:
    sent_ns, first_ns = sent_ms * MS, int((sent_ms + ttft_ms) * MS)
    stamps = () if failure else (first_ns, first_ns + 10 * MS, first_ns + 20 * MS)
    return Record(
        prompt=sent_ms, status=200, sent_ns=sent_ns, end_ns=first_ns + 21 * MS, stamps_ns=stamps, prompt_tokens=9,
        completion_tokens=None if failure else 3, streamed=True, failure=failure, wanted_tokens=3,
    )  # fmt: skip


def level(subject: str, streams: int, round_: int, ttft_ms: float, failure: Failure | None = None) -> Level:
    records = tuple(record(100 * n, ttft_ms, failure if n == 0 else None) for n in range(4))
    return Level(
        subject=subject, load=LoadShape(label=f"c{streams}", streams=streams), round=round_, records=records,
        started_ns=0, wall_s=0.4, cpu_s=0.01, lags_ms=(0.1,),
    )  # fmt: skip


def judgement(verdict: Any) -> Judgement:
    return Judgement(verdict=verdict, margin=0.05, alpha=0.05, looks=(1,), comparisons=())


def test_rounds_are_pooled_and_told_one_by_one() -> None:
    found = findings.results([level("candidate", 1, n, 10 + 10 * n) for n in range(2)], resolve({}))
    at = found["candidate"]["c1"]
    assert at["requests"] == 8
    assert [each["ttft_ms_p50"] for each in at["rounds"]] == [10, 20]  # type: ignore[index,call-overload,union-attr]


def test_one_round_has_no_rounds() -> None:
    assert "rounds" not in findings.results([level("candidate", 1, 0, 10)], resolve({}))["candidate"]["c1"]


def test_ratios_are_of_what_both_have() -> None:
    levels = [level("candidate", 1, 0, 30), level("baseline", 1, 0, 10), level("candidate", 2, 0, 30)]
    found = findings.ratios(findings.results(levels, resolve({})))
    assert list(found) == ["c1"]
    assert found["c1"]["ttft_ms_p50"] == 3.0  # type: ignore[index,call-overload]


def test_what_is_said_of_several_levels_is_said_once() -> None:
    levels = [level(subject, streams, 0, 10) for subject in ("candidate", "baseline") for streams in (1, 2)]
    said = [note for note in findings.notes(levels, lambda _: None) if "fewer requests" in note]
    assert [note.partition(":")[0] for note in said] == ["`candidate` c1, c2", "`baseline` c1, c2"]


def test_without_thresholds_and_comparison_there_is_no_gate() -> None:
    settings = resolve({})
    assert findings.gate(findings.results([level("candidate", 1, 0, 10)], settings), settings, None) is None


@pytest.mark.parametrize(
    ("options", "judged", "verdict"),
    [
        ({"slo": ["ttft_ms_p50<=50"]}, None, "pass"),
        ({"slo": ["ttft_ms_p50<=5"]}, None, "fail"),
        ({"slo": ["ttft_ms_p50<=50"], "gate": True}, "fail", "fail"),
        ({"slo": ["ttft_ms_p50<=50"], "gate": True}, "inconclusive", "inconclusive"),
        ({"slo": ["ttft_ms_p50<=5"], "gate": True}, "pass", "fail"),
        ({"slo": ["ttft_ms_p50<=50"]}, "fail", "pass"),  # it was not asked to decide
        ({}, "fail", None),
        ({"gate": True}, "fail", "fail"),
        ({"slo": ["itl_ms_p99<=50", "joules_per_token<=1"]}, None, "fail"),  # what was not measured meets nothing
    ],
)
def test_the_verdict_is_the_worst_of_what_decides(options: dict[str, Any], judged: Any, verdict: str | None) -> None:
    settings = resolve(options)
    found = findings.results([level("candidate", 1, 0, 10)], settings)
    gate = findings.gate(found, settings, None if judged is None else judgement(judged))
    assert gate is not None
    assert gate["verdict"] == verdict


def test_thresholds_are_for_the_candidate_and_the_levels_that_are_held() -> None:
    settings = resolve({"slo": ["ttft_ms_p50<=50"]})
    levels = [level("candidate", 1, 0, 10), level("candidate", 2, 0, 90), level("baseline", 1, 0, 90)]
    found = findings.results(levels, settings)
    assert findings.gate(found, settings, None, ["c1"])["verdict"] == "pass"  # type: ignore[index]
    assert findings.gate(found, settings, None)["verdict"] == "fail"  # type: ignore[index]
    assert findings.gate(found, settings, None, ["c1"], none_meets=True)["verdict"] == "fail"  # type: ignore[index]


def test_a_figure_that_a_round_lacks_is_compared_by_nobody() -> None:
    levels = [level(subject, 1, n, 10) for n in range(6) for subject in ("candidate", "baseline")]
    settings = resolve({"gate": True, "gate_metrics": ["ttft_ms_p50", "joules_per_token"]})
    judged = findings.judge(levels, settings, 0)
    assert {comparison.metric for comparison in judged.comparisons} == {"ttft_ms_p50"}


def test_failed_requests_are_in_no_latency() -> None:
    found = findings.results([level("candidate", 1, 0, 10, Failure("cut", "after 3 bytes"))], resolve({}))
    at = found["candidate"]["c1"]
    assert at["errors"] == {"cut": 1}
    assert at["ttft_ms"]["count"] == 3  # type: ignore[index,call-overload]
