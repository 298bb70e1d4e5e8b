from __future__ import annotations

import os
from typing import Any

import pytest

from llmopt.bench import selftest
from llmopt.bench.trial import Trial
from llmopt.errors import MeasurementInvalidError

MS = 1_000_000
SERVER = {"late_us": {"p99": 1.0}, "half_width_us": {"p50": 1.0}, "cut": 0}


def sent(
    number: int, arrived_ms: float, *, gap_ms: float = 10, tokens: int = 64, ttft_ms: float = 100
) -> dict[str, Any]:
    """A request as the server logs it."""
    stamps = [round((arrived_ms + ttft_ms + k * gap_ms) * MS) for k in range(tokens)]
    return {"id": str(number), "arrived_ns": round(arrived_ms * MS), "sent_ns": stamps}


def log(*requests: dict[str, Any]) -> dict[str, Any]:
    return {"requests": list(requests), **SERVER}


def seen_by_client(log: dict[str, Any], *, late_ms: float = 0.0, **more: Any) -> dict[str, Any]:
    """A client that sees every token late by so much."""
    requests = [
        {
            "id": request["id"],
            "due_ns": request["arrived_ns"],
            "sent_ns": request["arrived_ns"],
            "stamps_ns": [stamp + round(late_ms * MS) for stamp in request["sent_ns"]],
            "failure": None,
        }
        for request in log["requests"]
    ]
    return {
        "requests": requests,
        "cpu_s": 1e-3,
        "waited_s": 0.0,
        "peak_rss_bytes": 40e6,
        "stamps": "kernel",
        "data_bytes": 0,
        **more,
    }


def trial(**more: Any) -> Trial:
    return Trial(**{"url": "http://x", "requests": 40, "tokens": 64, "streams": 4, **more})


def closed_loop(*, pause_ms: float = 0.0) -> dict[str, Any]:
    """Four streams of ten requests, each `pause_ms` after the last one's end."""
    length_ms = 100 + 63 * 10 + pause_ms
    return log(*(sent(4 * turn + at, turn * length_ms) for turn in range(10) for at in range(4)))


def misses(level: dict[str, Any]) -> list[str]:
    return [check["what"] for check in level["checks"] if not check["met"]]


def test_a_client_that_sees_the_truth_is_within_the_limits() -> None:
    truth = closed_loop()
    level = selftest.judge(trial(), seen_by_client(truth), truth, begun_ns=0)
    assert (misses(level), level["true"], level["met"]) == ([], True, True)


def test_a_client_late_by_a_hundredth_misses_the_median() -> None:
    truth = closed_loop()
    level = selftest.judge(trial(), seen_by_client(truth, late_ms=1.0), truth, begun_ns=0)
    assert misses(level) == ["ttft_ms_p50 error"]
    assert level["ttft_ms_p50"]["error"] == pytest.approx(0.01)
    assert level["transit_us"]["p50"] == pytest.approx(1000)


def test_a_dear_client_is_true_but_misses_its_promise() -> None:
    truth = closed_loop()
    level = selftest.judge(trial(), seen_by_client(truth, peak_rss_bytes=500e6), truth, begun_ns=0)
    assert (misses(level), level["true"], level["met"]) == (["peak_rss_mb"], True, False)


def test_streams_are_held_if_the_next_request_follows_at_once() -> None:
    assert selftest.held(closed_loop(), 4) == pytest.approx(1.0)


def test_a_pause_between_requests_loses_its_share_of_the_streams() -> None:
    assert selftest.held(closed_loop(pause_ms=730), 4) == pytest.approx(0.5, abs=0.03)


def test_a_stream_that_is_never_opened_is_missed() -> None:
    three_of_four = log(*(sent(3 * turn + at, turn * 730.0) for turn in range(10) for at in range(3)))
    assert selftest.held(three_of_four, 4) == pytest.approx(0.75)


def test_lateness_counts_from_the_schedule_to_the_arrival() -> None:
    truth = log(*(sent(number, 10.0 * number) for number in range(20)))
    seen = seen_by_client(truth)
    for request in seen["requests"]:
        request["due_ns"] -= 3 * MS
    level = selftest.judge(trial(streams=None, rate=100.0, requests=20), seen, truth, begun_ns=0)
    assert level["late_ms"]["p50"] == pytest.approx(3.0)
    assert misses(level) == ["late_ms_p99"]


def test_a_request_that_failed_is_a_miss() -> None:
    truth = closed_loop()
    seen = seen_by_client(truth)
    seen["requests"][7]["failure"] = "cut"
    assert misses(selftest.judge(trial(), seen, truth, begun_ns=0)) == ["failed"]


def test_no_answer_at_all_is_no_measurement() -> None:
    with pytest.raises(MeasurementInvalidError):
        selftest.judge(trial(), {"requests": []}, log(), begun_ns=0)


def test_tokens_that_share_a_stamp_are_counted() -> None:
    truth = closed_loop()
    seen = seen_by_client(truth)
    for request in seen["requests"]:
        request["stamps_ns"][1] = request["stamps_ns"][0]
    assert selftest.judge(trial(), seen, truth, begun_ns=0)["coalesced"] == pytest.approx(1 / 63)


@pytest.mark.parametrize(("percent", "expected"), [(0, 1.0), (50, 2.0), (75, 3.5), (100, 5.0)])
def test_percentiles_lie_between_their_neighbours(percent: float, expected: float) -> None:
    assert selftest.percentile([1.0, 2.0, 5.0], percent) == expected


def test_a_run_drives_the_client_against_the_truth() -> None:
    cores = os.sched_getaffinity(0)
    lines: list[str] = []
    result: Any = selftest.run(lines.append, streams=(3,), rates=(10.0,), rounds=2)
    closed, opened = result["levels"]
    assert lines == ["3 streams", "10 requests/s"]
    assert (closed["requests"], closed["failed"], opened["failed"]) == (6, 0, 0)
    for level in (closed, opened):
        assert level["ttft_ms_p50"]["truth"] >= 99
        assert abs(level["ttft_ms_p50"]["error"]) < 0.5  # of a busy machine; `llmopt bench selftest` says it exactly
    assert os.sched_getaffinity(0) == cores
    text = selftest.table(result)
    assert "c3" in text
    assert "r10" in text


def test_the_table_says_what_misses_its_limit() -> None:
    truth = closed_loop()
    level = selftest.judge(trial(), seen_by_client(truth, late_ms=1.0), truth, begun_ns=0)
    text = selftest.table({"met": False, "cores": 2, "levels": [level]})
    assert "c4: ttft_ms_p50 error is 0.01, the limit is 0.005" in text
