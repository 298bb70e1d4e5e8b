from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.bench.client.base import Failure
from llmopt.bench.metrics import figures as metrics
from llmopt.bench.metrics.figures import Level, percentile, spread, streams_held, summarise
from llmopt.bench.metrics.records import Record
from llmopt.bench.metrics.validity import invalid, notes
from llmopt.bench.settings import BenchSettings

MS = 1_000_000


def record(sent: float = 0, stamps: tuple[float, ...] = (10, 20, 30), **fields: Any) -> Record:
    """Times in milliseconds; a record ends with its last chunk."""
    values: dict[str, Any] = {
        "prompt": 0,
        "status": 200,
        "sent_ns": int(sent * MS),
        "end_ns": int((stamps[-1] if stamps else sent) * MS),
        "stamps_ns": tuple(int(stamp * MS) for stamp in stamps),
        "prompt_tokens": 128,
        "completion_tokens": len(stamps),
        "streamed": True,
        "failure": None,
    }
    return Record(**(values | fields))


def level(*records: Record, **fields: Any) -> Level:
    values: dict[str, Any] = {
        "subject": "candidate",
        "streams": 1,
        "round": 0,
        "records": records,
        "wall_s": 2.0,
        "cpu_s": 0.1,
        "lags_ms": (0.5,),
        "reconnects": 0,
    }
    return Level(**(values | fields))


@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60),
    percent=st.one_of(st.sampled_from([0, 50, 90, 95, 99, 100]), st.floats(0, 100)),
)
def test_a_percentile_is_numpy_s(values: list[float], percent: float) -> None:
    assert percentile(sorted(values), percent) == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-6)


def test_a_spread_names_mean_percentiles_and_extremes() -> None:
    found = spread([4.0, 1.0, 3.0, 2.0])
    assert found == {
        "count": 4, "mean": 2.5, "p50": 2.5, "p90": 3.7, "p95": 3.85, "p99": 3.97, "min": 1.0, "max": 4.0
    }  # fmt: skip
    assert spread([]) is None


def test_the_conventions_on_one_request_by_hand() -> None:
    found = summarise([level(record(sent=5, stamps=(25, 26, 30)))])
    assert found["ttft_ms"]["p50"] == 20  # type: ignore[index,call-overload]
    assert found["e2e_ms"]["p50"] == 25  # type: ignore[index,call-overload]
    assert found["tpot_ms"]["p50"] == 2.5  # type: ignore[index,call-overload]
    assert (found["itl_ms"]["min"], found["itl_ms"]["max"]) == (1, 4)  # type: ignore[index,call-overload]
    assert (found["tokens_per_s"], found["requests_per_s"]) == (1.5, 0.5)


@given(stamps=st.lists(st.integers(0, 10_000), min_size=2, max_size=50).map(sorted))
def test_gaps_and_tpot_add_up_to_the_whole_time(stamps: list[int]) -> None:
    one = record(sent=-1, stamps=tuple(map(float, stamps)))
    rest = metrics.e2e_ms(one) - metrics.ttft_ms(one)
    assert sum(metrics.gaps_ms(one)) == pytest.approx(rest)
    tpot = metrics.tpot_ms(one)
    assert tpot is not None
    assert tpot * (len(stamps) - 1) == pytest.approx(rest)


def test_tpot_counts_tokens_and_gaps_count_chunks() -> None:
    found = summarise([level(record(stamps=(10, 20), completion_tokens=6))])
    assert found["tpot_ms"]["p50"] == 2  # type: ignore[index,call-overload]
    assert found["itl_ms"]["p50"] == 10  # type: ignore[index,call-overload]
    assert found["coalesced_share"] == round(4 / 6, 4)


def test_one_token_has_no_gap_and_no_tpot() -> None:
    found = summarise([level(record(stamps=(10,)))])
    assert found["itl_ms"] is None
    assert found["tpot_ms"] is None


def test_chunks_of_one_receive_are_coalesced() -> None:
    assert summarise([level(record(stamps=(10, 10, 20, 30)))])["coalesced_share"] == 0.25


def test_failed_requests_count_as_errors_only() -> None:
    failed = record(stamps=(500,), failure=Failure("cut", "gone"))
    found = summarise([level(record(), failed, failed, record(stamps=(), failure=Failure("timeout", "late")))])
    assert found["errors"] == {"cut": 2, "timeout": 1}
    assert (found["requests"], found["answered"], found["tokens"]) == (4, 1, 3)
    assert found["ttft_ms"]["max"] == 10  # type: ignore[index,call-overload]


def test_rounds_are_one_sample_and_their_times_add_up() -> None:
    found = summarise([level(record(stamps=(10, 20))), level(record(stamps=(30, 40)), wall_s=6.0)])
    assert found["ttft_ms"]["p50"] == 20  # type: ignore[index,call-overload]
    assert (found["wall_s"], found["tokens_per_s"]) == (8.0, 0.5)


def test_nothing_answered_has_no_latencies() -> None:
    found = summarise([level(record(stamps=(), failure=Failure("refused", "")))])
    assert found["ttft_ms"] is None
    assert found["tokens_per_s"] == 0
    assert "ttft_ms_p50" not in metrics.compact(found)


def test_streams_held_does_not_count_the_end_where_streams_run_out_of_requests() -> None:
    busy = [record(sent=0, stamps=(100,)), record(sent=100, stamps=(200,)), record(sent=0, stamps=(150,))]
    assert streams_held(busy) == 2.0


def test_streams_held_shows_streams_that_stand_idle() -> None:
    idle = [record(sent=0, stamps=(50,)), record(sent=100, stamps=(150,)), record(sent=200, stamps=(250,))]
    assert streams_held(idle) == 0.5


def test_streams_held_of_requests_that_all_began_together() -> None:
    assert streams_held([record(stamps=(100,)), record(stamps=(50,))]) == 1.5
    assert streams_held([]) == 0


def test_a_ratio_is_candidate_over_baseline_and_not_of_counts() -> None:
    slow, quick = summarise([level(record(stamps=(20, 40)))]), summarise([level(record(stamps=(10, 20)))])
    found = metrics.ratios(metrics.compact(slow), metrics.compact(quick))
    assert found["ttft_ms_p50"] == 2
    assert found["tokens_per_s"] == 1
    assert "requests" not in found


def test_more_than_one_percent_of_errors_makes_a_load_invalid() -> None:
    failed = record(failure=Failure("http_5xx", "HTTP 503: busy"))
    assert invalid(level(*[record()] * 99, failed)) is None
    reason = invalid(level(*[record()] * 98, failed))
    assert reason == "1 of 99 requests of `candidate` at concurrency 1 failed: 1 `http_5xx` (HTTP 503: busy)"


def test_a_client_that_is_the_bottleneck_makes_a_load_invalid() -> None:
    assert "95% of a core" in (invalid(level(record(), wall_s=2.0, cpu_s=1.9)) or "")
    assert invalid(level(record(), wall_s=2.0, cpu_s=1.7)) is None


def test_a_load_without_requests_is_invalid() -> None:
    assert invalid(level()) == "no request of `candidate` at concurrency 1 was sent"


def test_a_client_that_ran_late_is_noted_where_it_matters() -> None:
    settings = BenchSettings(output_tokens=3)
    late = level(record(), lags_ms=(5.0,) * 10)
    assert "the client ran 5.0 ms late at p90" in notes([late], settings, exact_prompts=True)[0]
    long_gaps = level(record(stamps=(10, 110, 210)), lags_ms=(5.0,) * 10)
    assert notes([long_gaps], settings, exact_prompts=True) == []


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        ({"completion_tokens": 2}, "1 of 2 answers ended early"),
        ({"completion_tokens": 9}, "1 of 2 answers are too long"),
        ({"completion_tokens": None}, "1 of 2 answers have no usage"),
        ({"streamed": False}, "1 of 2 answers were not streamed"),
        ({"prompt_tokens": 131}, "1 of 2 answers count another length of the prompt than 128 tokens: 131"),
    ],
)
def test_what_a_server_does_not_do_as_asked_is_noted(odd: dict[str, Any], says: str) -> None:
    settings = BenchSettings(output_tokens=3)
    assert notes([level(record(), record())], settings, exact_prompts=True) == []
    assert says in notes([level(record(), record(**odd))], settings, exact_prompts=True)[0]
