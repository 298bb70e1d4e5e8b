from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.bench.client.base import Failure
from llmopt.bench.metrics import figures
from llmopt.bench.metrics.figures import CONVENTIONS, Level, compact, ratios, streams_held, summarise
from llmopt.bench.metrics.records import Record
from llmopt.bench.settings import LoadShape

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
        "load": LoadShape(label="c1", streams=1),
        "round": 0,
        "records": records,
        "started_ns": 0,
        "wall_s": 2.0,
        "cpu_s": 0.1,
        "lags_ms": (0.5,),
    }
    return Level(**(values | fields))


def summary(*records: Record, **fields: Any) -> dict[str, Any]:
    return summarise([level(*records, **fields)])


FAILED = record(stamps=(500,), failure=Failure("cut", "gone"))


def test_the_conventions_on_one_request_by_hand() -> None:
    found = summary(record(sent=5, stamps=(25, 26, 30)))
    assert found["ttft_ms"]["p50"] == 20
    assert found["ttst_ms"]["p50"] == 1
    assert found["e2e_ms"]["p50"] == 25
    assert found["tpot_ms"]["p50"] == 2.5
    assert (found["itl_ms"]["min"], found["itl_ms"]["max"]) == (1, 4)
    assert (found["itl_request_mean_ms"]["p50"], found["itl_request_max_ms"]["p50"]) == (2.5, 4)
    assert (found["tokens_per_s"], found["requests_per_s"], found["total_tokens_per_s"]) == (1.5, 0.5, 65.5)


@given(stamps=st.lists(st.lists(st.integers(0, 10_000), min_size=1, max_size=9).map(sorted), min_size=1, max_size=9))
def test_gaps_and_tpot_add_up_to_the_whole_time(stamps: list[list[int]]) -> None:
    records = [record(sent=-1, stamps=tuple(map(float, one))) for one in stamps]
    found = summary(*records)

    def total(name: str) -> float:
        return 0.0 if found[name] is None else found[name]["mean"] * found[name]["count"]

    spoken_ms = total("e2e_ms") - total("ttft_ms")
    assert total("itl_ms") == pytest.approx(spoken_ms, abs=0.1)
    assert sum(one[-1] - one[0] for one in stamps) == pytest.approx(spoken_ms, abs=0.1)
    assert total("itl_ms") >= total("tpot_ms") - 0.1


def test_an_itl_per_request_hides_a_stall_that_every_gap_shows() -> None:
    stalled = record(stamps=tuple(np.cumsum([10, *[10] * 50, 400, *[10] * 49]).astype(float)))
    found = summary(stalled)
    assert found["itl_request_mean_ms"]["max"] < 15
    assert found["itl_ms"]["max"] == 400


def test_open_loop_times_also_count_from_the_schedule() -> None:
    found = summary(record(sent=40, stamps=(50, 60), due_ns=10 * MS), load=LoadShape(label="r2", rate=2))
    assert (found["ttft_ms"]["p50"], found["ttft_scheduled_ms"]["p50"]) == (10, 40)
    assert (found["e2e_ms"]["p50"], found["e2e_scheduled_ms"]["p50"]) == (20, 50)


def test_a_closed_loop_has_no_schedule_though_turns_are_due_when_the_last_has_ended() -> None:
    found = summary(record(), record(turn=1, due_ns=0))
    assert (found["ttft_scheduled_ms"], found["due_per_s"]) == (None, None)


def test_the_answer_begins_behind_the_reasoning() -> None:
    found = summary(record(stamps=(10, 20, 30), answer_ns=20 * MS))
    assert (found["ttft_ms"]["p50"], found["answer_ms"]["p50"]) == (10, 20)


def test_tpot_counts_tokens_and_gaps_count_chunks() -> None:
    found = summary(record(stamps=(10, 20), completion_tokens=6))
    assert found["tpot_ms"]["p50"] == 2
    assert found["itl_ms"]["p50"] == 10
    assert found["coalesced_share"] == round(4 / 6, 4)


def test_one_token_has_no_gap_and_no_tpot() -> None:
    found = summary(record(stamps=(10,)))
    for name in ("itl_ms", "tpot_ms", "ttst_ms", "itl_request_mean_ms"):
        assert found[name] is None


def test_chunks_of_one_receive_are_coalesced() -> None:
    assert summary(record(stamps=(10, 10, 20, 30)))["coalesced_share"] == 0.25


def test_failed_requests_count_as_errors_only() -> None:
    found = summary(record(), FAILED, FAILED, record(stamps=(), failure=Failure("timeout", "late")))
    assert found["errors"] == {"cut": 2, "timeout": 1}
    assert (found["requests"], found["answered"], found["tokens"]) == (4, 1, 3)
    assert found["ttft_ms"]["max"] == 10


def test_rounds_are_one_sample_and_their_times_add_up() -> None:
    found: Any = summarise([level(record(stamps=(10, 20))), level(record(stamps=(30, 40)), wall_s=6.0)])
    assert found["ttft_ms"]["p50"] == 20
    assert (found["wall_s"], found["tokens_per_s"]) == (8.0, 0.5)


def test_a_round_s_clock_is_its_own() -> None:
    later = record(sent=9000, stamps=(9010, 9020))
    one = summary(record(stamps=(10, 20)), wall_s=3.0)
    assert summary(later, started_ns=9000 * MS, wall_s=3.0) == one


@pytest.mark.parametrize("records", [[], [record(stamps=(), failure=Failure("refused", ""))]])
def test_nothing_answered_has_no_latencies(records: list[Record]) -> None:
    found = summary(*records)
    assert found["ttft_ms"] is None
    assert found["tokens_per_s"] == 0
    assert "ttft_ms_p50" not in compact(found)


def test_a_window_counts_latencies_by_sending_and_tokens_by_stamp() -> None:
    records = [record(sent=at, stamps=(at + 100, at + 200, at + 300)) for at in (0, 900, 1800)]
    found = summary(*records, window_ns=(500 * MS, 1500 * MS))
    assert (found["requests"], found["counted"], found["ttft_ms"]["count"]) == (3, 1, 1)
    assert found["tokens_per_s"] == 3  # of the second, as the first has ended and the third has not begun
    assert found["requests_per_s"] == 1


@given(st.integers(1, 1999))
def test_windows_that_join_have_the_tokens_of_the_whole(cut: int) -> None:
    records = [record(sent=at, stamps=(at + 100, at + 150, at + 700), completion_tokens=7) for at in range(0, 1000, 90)]
    spans = [(0, cut), (cut, 2000)]
    parts = [summary(*records, window_ns=(a * MS, b * MS))["tokens_per_s"] * (b - a) / 1e3 for a, b in spans]
    assert sum(parts) == pytest.approx(summary(*records)["tokens"], abs=0.01)


def test_the_steady_rate_leaves_out_how_the_load_runs_out() -> None:
    waves = [record(sent=at, stamps=(at + 250, at + 500)) for at in (0, 500, 1000, 1500) for _ in range(3)]
    last = record(sent=1500, stamps=(2500, 3500))
    found = summary(*waves, last, wall_s=3.5)
    assert found["steady_tokens_per_s"] == 12
    assert found["tokens_per_s"] < 8


def test_the_peak_is_of_the_best_second() -> None:
    found = summary(record(stamps=(100, 1100, 1200, 1900, 2500)), wall_s=3.0)
    assert found["peak_tokens_per_s"] == 3
    assert summary(record(), wall_s=0.5)["peak_tokens_per_s"] is None


def test_goodput_is_what_meets_every_limit_on_a_request() -> None:
    slow = record(stamps=(300, 310, 320))
    stalled = record(stamps=(10, 20, 400))
    levels = [level(record(), slow, stalled, FAILED)]
    found: Any = summarise(levels, {"ttft_ms": 200, "itl_ms": 50})
    assert (found["goodput_share"], found["goodput_per_s"]) == (0.25, 0.5)
    assert summarise(levels, {"ttft_ms": 200})["goodput_share"] == 0.5
    assert summarise(levels)["goodput_share"] is None


def test_a_figure_that_a_request_lacks_breaks_no_limit() -> None:
    assert summarise([level(record(stamps=(10,)))], {"tpot_ms": 1})["goodput_share"] == 1


def test_cached_tokens_are_a_share_of_the_prompts() -> None:
    assert summary(record(cached_tokens=64), record(cached_tokens=0))["cached_share"] == 0.25
    assert summary(record())["cached_share"] is None


def test_energy_is_told_by_token_where_every_round_has_it() -> None:
    known = level(record(), server={"energy_j": 6.0})
    assert summarise([known])["joules_per_token"] == 2
    assert summarise([known, level(record())])["joules_per_token"] is None


def test_streams_held_does_not_count_the_end_where_streams_run_out_of_requests() -> None:
    busy = [record(sent=0, stamps=(100,)), record(sent=100, stamps=(200,)), record(sent=0, stamps=(150,))]
    assert streams_held(level(*busy)) == 2.0


def test_streams_held_shows_streams_that_stand_idle() -> None:
    idle = [record(sent=0, stamps=(50,)), record(sent=100, stamps=(150,)), record(sent=200, stamps=(250,))]
    assert streams_held(level(*idle)) == 0.5


def test_streams_held_of_requests_that_all_began_together() -> None:
    assert streams_held(level(record(stamps=(100,)), record(stamps=(50,)))) == 1.5
    assert streams_held(level()) == 0


def test_streams_held_begins_behind_the_ramp() -> None:
    ramp = [record(sent=at, stamps=(1000,)) for at in (0, 100, 200)]
    then = [record(sent=1000, stamps=(2000,)) for _ in range(3)]
    shape = LoadShape(label="c3", streams=3, ramp_s=0.2)
    assert streams_held(level(*ramp, *then, load=shape)) == pytest.approx(3)
    assert streams_held(level(*ramp, *then)) < 3


def test_the_client_s_cpu_is_a_share_of_its_processes() -> None:
    assert summary(record(), cpu_s=1.0, processes=2)["client_cpu_share"] == 0.25


def test_a_ratio_is_candidate_over_baseline_and_not_of_counts() -> None:
    found = ratios(compact(summary(record(stamps=(20, 40)))), compact(summary(record(stamps=(10, 20)))))
    assert found["ttft_ms_p50"] == 2
    assert found["tokens_per_s"] == 1
    assert "requests" not in found


def test_compact_figures_are_numbers_with_the_names_that_thresholds_use() -> None:
    found = compact(summarise([level(record(), FAILED)], {"ttft_ms": 200}))
    names = ("ttft_ms_p50", "itl_ms_p99", "tpot_ms_p50", "e2e_ms_p99.9", "tokens_per_s", "goodput_share", "errors")
    assert all(isinstance(found[name], int | float) and math.isfinite(found[name]) for name in names)  # type: ignore[arg-type]
    assert found["errors"] == 1


def test_every_figure_in_milliseconds_or_per_second_has_its_convention() -> None:
    names = {name for name in summary(record()) if name.endswith(("_ms", "_s", "_share"))}
    assert names <= set(CONVENTIONS)
    assert set(figures.TIMES) <= set(CONVENTIONS)
