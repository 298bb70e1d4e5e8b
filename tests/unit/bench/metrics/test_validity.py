from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llmopt.bench.client.base import Failure
from llmopt.bench.metrics.figures import Level
from llmopt.bench.metrics.records import Record
from llmopt.bench.metrics.validity import invalid, notes
from llmopt.bench.settings import LoadShape

MS = 1_000_000
BUSY = Failure("http_5xx", "HTTP 503: busy")


def record(sent_ms: float = 0, *, lasts_ms: float = 100, **fields: Any) -> Record:
    """Three tokens, of which the last comes at the end."""
    sent_ns, end_ns = int(sent_ms * MS), int((sent_ms + lasts_ms) * MS)
    values: dict[str, Any] = {
        "prompt": 0,
        "status": 200,
        "sent_ns": sent_ns,
        "end_ns": end_ns,
        "stamps_ns": (end_ns - 20 * MS, end_ns - 10 * MS, end_ns),
        "prompt_tokens": 128,
        "completion_tokens": 3,
        "wanted_tokens": 3,
        "streamed": True,
        "failure": None,
    }
    return Record(**(values | fields))


def level(records: list[Record], **fields: Any) -> Level:
    values: dict[str, Any] = {
        "subject": "candidate",
        "load": LoadShape(label="c1", streams=1),
        "round": 0,
        "records": tuple(records),
        "started_ns": 0,
        "wall_s": max((record.end_ns for record in records), default=0) / 1e9,
        "cpu_s": 0.01,
        "lags_ms": (0.1,),
    }
    return Level(**(values | fields))


def closed(streams: int, *, waves: int = 20, pause_ms: float = 0, **fields: Any) -> Level:
    """Streams whose requests of 100 ms follow each other after a pause."""
    records = [record(wave * (100 + pause_ms)) for wave in range(waves) for _ in range(streams)]
    return level(records, **{"load": LoadShape(label=f"c{streams}", streams=streams)} | fields)


def opened(count: int = 100, *, every_ms: float = 50, behind: float = 1.0, **fields: Any) -> Level:
    """Requests due every so often, and sent ever later: at `behind` times of when they were due."""
    records = [record(n * every_ms * behind, due_ns=int(n * every_ms * MS)) for n in range(count)]
    late_ms = [(record.sent_ns - (record.due_ns or 0)) / MS for record in records]
    shape = LoadShape(label="r20", rate=1e3 / every_ms)
    return level(records, **{"load": shape, "late_ms": late_ms} | fields)


@pytest.mark.parametrize("load", [closed(1), closed(8), opened()])
def test_a_client_that_keeps_up_is_valid(load: Level) -> None:
    assert invalid(load) is None


def test_more_than_one_percent_of_errors_makes_a_load_invalid() -> None:
    failed = record(failure=BUSY)
    assert invalid(level([record()] * 99 + [failed])) is None
    reason = invalid(level([record()] * 98 + [failed]))
    assert reason == "1 of 99 requests of `candidate` at concurrency 1 failed: 1 `http_5xx` (HTTP 503: busy)"


def test_a_load_without_requests_is_invalid() -> None:
    assert invalid(level([])) == "no request of `candidate` at concurrency 1 was sent"


def test_a_client_that_is_the_bottleneck_makes_a_load_invalid() -> None:
    assert "95% of a core" in (invalid(closed(1, cpu_s=1.9)) or "")
    assert invalid(closed(1, cpu_s=1.7)) is None
    assert invalid(closed(1, cpu_s=1.9, processes=2)) is None


def test_streams_that_stand_idle_between_requests_make_a_load_invalid() -> None:
    assert invalid(closed(4, waves=60, pause_ms=10)) == (
        "the client could not hold the load of `candidate` at concurrency 4: it held 3.64 of 4 streams"
    )
    assert invalid(closed(4, waves=60, pause_ms=3)) is None


def test_of_a_short_load_more_has_to_be_missing_and_less_is_noted() -> None:
    assert invalid(closed(4, pause_ms=10)) is None
    assert "the client held 3.64 of 4 streams, in a load too short" in str(notes([closed(4, pause_ms=10)]))
    assert "it held 3.08 of 4 streams" in (invalid(closed(4, pause_ms=30)) or "")


def test_the_edges_of_a_very_short_load_do_not_make_it_invalid() -> None:
    assert invalid(closed(4, waves=2, pause_ms=900)) is None  # two requests a stream
    assert invalid(closed(4, waves=6, pause_ms=50)) is None  # less than a second


def test_streams_that_run_out_of_requests_do_not_make_a_load_invalid() -> None:
    tail = [record(6000, lasts_ms=3000)]
    assert invalid(replace(closed(4, waves=60), records=(*closed(4, waves=60).records, *tail))) is None


def test_a_server_that_closes_connections_does_not_make_a_load_invalid() -> None:
    assert invalid(closed(4, waves=60, pause_ms=30, reconnects=80)) is None


def test_conversations_with_time_to_think_leave_streams_idle() -> None:
    turns = [
        replace(one, turn=n % 2, due_ns=one.sent_ns) for n, one in enumerate(closed(1, waves=60, pause_ms=30).records)
    ]
    assert invalid(level(turns)) is None


def test_conversations_that_run_out_leave_streams_idle() -> None:
    first = [record(0) for _ in range(4)]
    turns = [record(100 * turn, turn=turn) for turn in range(1, 60)]
    assert invalid(level(first + turns, load=LoadShape(label="c4", streams=4))) is None


def test_less_than_the_rate_by_the_client_s_own_lateness_makes_a_load_invalid() -> None:
    assert invalid(opened(count=110, behind=1.1)) == (
        "the client could not hold the load of `candidate` at 20 requests/s: it sent 18.182 of 20 requests/s"
    )
    assert invalid(opened(count=110, behind=1.02)) is None


def test_less_than_the_rate_as_the_server_fills_every_place_is_a_result() -> None:
    slow = opened(count=110, behind=1.1, load=LoadShape(label="r20", rate=20, in_flight=2))
    assert invalid(slow) is None
    assert "for want of a place among 2 in flight" in str(notes([slow]))
    assert invalid(replace(slow, load=replace(slow.load, in_flight=9))) is not None


def test_what_was_never_sent_as_the_server_filled_every_place_is_a_result() -> None:
    shape = LoadShape(label="r20", rate=20, in_flight=2)
    unsent = [record(9e4, lasts_ms=0, due_ns=0, failure=Failure("unsent", "")) for _ in range(50)]
    load = opened(load=shape)
    load = replace(load, records=(*load.records, *unsent))
    assert invalid(load) is None
    assert "50 of 150 requests were never sent: 2 were in flight, the limit" in str(notes([load]))


def test_a_few_requests_do_not_tell_of_a_rate() -> None:
    assert invalid(opened(count=10, behind=2)) is None


def test_late_sendings_are_noted_where_they_are_many_and_matter() -> None:
    assert "80% of the requests were sent more than 5.0 ms late" in str(notes([opened(late_ms=[9.0] * 8 + [0.0] * 2)]))
    assert "late" not in str(notes([opened(late_ms=[3.0] * 10)]))


def test_too_few_requests_for_a_p99_are_noted() -> None:
    assert "fewer requests than the 368 that give a p99" in str(notes([closed(1)]))
    assert notes([closed(4, waves=92)]) == []


def test_a_client_that_ran_late_is_noted_where_it_matters() -> None:
    late = closed(4, waves=92, lags_ms=(5.0,) * 10, stamps="user")
    assert "the client ran 5.0 ms late at p99, for want of CPU: latencies are that much too long" in notes([late])[0]
    assert "late" not in str(notes([replace(late, stamps="kernel")]))
    very = replace(late, stamps="kernel", lags_ms=(25.0,) * 10)
    assert "next requests went out that much later" in notes([very])[0]
    slow = [replace(one, stamps_ns=(one.sent_ns, one.sent_ns + 100 * MS)) for one in late.records]
    assert "late" not in str(notes([replace(late, records=slow)]))


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        ({"completion_tokens": 2}, "1 of 368 answers ended early"),
        ({"completion_tokens": 2}, "1 of 368 answers came in more chunks than their usage has tokens"),
        ({"completion_tokens": 9}, "1 of 368 answers are too long"),
        ({"completion_tokens": None}, "1 of 368 answers have no usage"),
        ({"streamed": False}, "1 of 368 answers were not streamed"),
        ({"prompt_tokens": 131}, "1 of 368 answers count another length of the prompt than 128 tokens: 131"),
    ],
)
def test_what_a_server_does_not_do_as_asked_is_noted(odd: dict[str, Any], says: str) -> None:
    good = closed(4, waves=92)
    odd_one = replace(good, records=(replace(good.records[0], **odd), *good.records[1:]))
    assert notes([good], asked_prompt_tokens=lambda record: 128) == []
    assert says in str(notes([odd_one], asked_prompt_tokens=lambda record: 128))


def test_connections_made_anew_are_noted() -> None:
    assert "the server closed connections: 3 were made anew" in str(notes([closed(1, reconnects=3)]))
