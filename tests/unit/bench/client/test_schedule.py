"""When requests are sent: open loops, ramps, durations, limits, conversations, Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from llmopt.bench.client.base import Exchange, Interrupted, Job, Load, Plan, Watch
from llmopt.bench.client.loop import drive

MakePlan = Callable[..., Plan]


def kinds(load: Load[Exchange]) -> list[str | None]:
    return [exchange.failure and exchange.failure.kind for exchange in load.records]


def most_at_once(load: Load[Exchange]) -> int:
    return max(
        sum(other.sent_ns <= exchange.sent_ns < other.end_ns for other in load.records) for exchange in load.records
    )


def test_an_open_loop_sends_when_each_is_due_whatever_is_in_flight(truth: Any, plan: MakePlan, keep: Any) -> None:
    due_s = [0.0, 0.05, 0.05, 0.1, 0.2]
    found = drive(plan(truth.url("ttft=300"), due_s=due_s), keep)
    assert kinds(found) == [None] * 5
    for exchange in found.records:
        assert exchange.due_ns == found.started_ns + int(due_s[exchange.job.prompt] * 1e9)
        assert exchange.sent_ns >= exchange.due_ns
    assert most_at_once(found) == 5
    assert found.wall_s >= 0.5


def test_lateness_is_from_due_to_sent(truth: Any, plan: MakePlan, keep: Any) -> None:
    found = drive(plan(truth.url(), due_s=[0.0, 0.01, 0.02]), keep)
    late_ms = [(exchange.sent_ns - (exchange.due_ns or 0)) / 1e6 for exchange in found.records]
    assert sorted(found.late_ms) == pytest.approx(sorted(late_ms))
    assert min(found.late_ms) >= 0


def test_jobs_need_not_be_in_order(truth: Any, plan: MakePlan, keep: Any) -> None:
    found = drive(plan(truth.url(), due_s=[0.1, 0.0, 0.05]), keep)
    by_sending = sorted(found.records, key=lambda exchange: exchange.sent_ns)
    assert [exchange.job.prompt for exchange in by_sending] == [1, 2, 0]


def test_what_is_due_beyond_the_limit_waits_and_is_late(truth: Any, plan: MakePlan, keep: Any) -> None:
    found = drive(plan(truth.url("ttft=100"), due_s=[0.0] * 6, in_flight=2), keep)
    assert kinds(found) == [None] * 6
    assert most_at_once(found) == 2
    assert max(found.late_ms) >= 200


def test_what_the_limit_holds_back_to_the_end_is_not_forgotten(truth: Any, plan: MakePlan, keep: Any) -> None:
    found = drive(plan(truth.url("ttft=300"), due_s=[0.0] * 5, in_flight=2, duration_s=0.2), keep)
    assert sorted(map(str, kinds(found))) == ["None", "None", "unsent", "unsent", "unsent"]


def test_a_duration_ends_an_open_loop(truth: Any, plan: MakePlan, keep: Any) -> None:
    found = drive(plan(truth.url("ttft=50"), due_s=[0.0, 0.1, 5.0], duration_s=0.3), keep)
    assert sorted(exchange.job.prompt for exchange in found.records) == [0, 1]
    assert found.wall_s < 4


def test_an_open_loop_that_only_fails_is_given_up(truth: Any, plan: MakePlan, keep: Any) -> None:
    due_s = [number / 1000 for number in range(300)]
    found = drive(plan(truth.url("status=500"), due_s=[*due_s, 600.0], in_flight=8), keep)
    assert 64 <= len(found.records) < 100
    assert found.wall_s < 60


def test_an_open_loop_goes_on_when_a_connection_is_refused(plan: MakePlan, keep: Any) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        found = drive(plan(f"http://127.0.0.1:{unused.getsockname()[1]}", due_s=[0.0, 0.05, 0.1]), keep)
    assert kinds(found) == ["refused"] * 3


def test_a_ramp_starts_the_streams_one_after_the_other(truth: Any, plan: MakePlan, keep: Any) -> None:
    found = drive(plan(truth.url("ttft=600"), jobs=4, streams=4, ramp_s=0.4), keep)
    sent_s = sorted((exchange.sent_ns - found.started_ns) / 1e9 for exchange in found.records)
    assert all(sent >= 0.1 * number for number, sent in enumerate(sent_s))


class Follow:
    """Another turn of the conversation, up to `turns` of them."""

    def __init__(self, turns: int, think_s: float) -> None:
        self.turns, self.think_s = turns, think_s

    def __call__(self, exchange: Exchange) -> Job | None:
        if exchange.job.turn + 1 == self.turns:
            return None
        due_ns = exchange.end_ns + int(self.think_s * 1e9) if self.think_s else None
        return replace(exchange.job, turn=exchange.job.turn + 1, due_ns=due_ns)


@pytest.mark.parametrize("think_s", [0.0, 0.05])
@pytest.mark.parametrize("streams", [1, None], ids=["closed", "open"])
def test_a_conversation_goes_on_when_its_answer_has_come(
    truth: Any, plan: MakePlan, keep: Any, think_s: float, streams: int | None
) -> None:
    due_s = [] if streams else [0.0, 0.0]
    made = plan(truth.url("ttft=10"), jobs=2, due_s=due_s, streams=streams)
    for job in made.jobs:
        job.then = Follow(3, think_s)
    found = drive(made, keep)
    assert kinds(found) == [None] * 6
    for prompt in range(2):
        turns = [exchange for exchange in found.records if exchange.job.prompt == prompt]
        assert [exchange.job.turn for exchange in turns] == [0, 1, 2]
        for earlier, later in pairwise(turns):
            assert later.sent_ns - earlier.end_ns >= think_s * 1e9
    if streams:
        assert most_at_once(found) == 1


def test_a_turn_that_would_begin_after_the_end_is_dropped(truth: Any, plan: MakePlan, keep: Any) -> None:
    made = plan(truth.url(), jobs=1, streams=1, duration_s=5.0)
    made.jobs[0].then = Follow(3, 60.0)
    found = drive(made, keep)
    assert len(found.records) == 1
    assert found.wall_s < 4


def test_each_job_goes_to_its_target(truth: Any, plan: MakePlan, tokens_of: Any) -> None:
    urls = [truth.url("tokens=3"), truth.url("tokens=5")]
    found = drive(plan(*urls, jobs=6, streams=2), lambda exchange: (exchange.job.target, tokens_of(exchange)))
    assert set(found.records) == {(0, 3), (1, 5)}
    assert found.reconnects == 0


def test_one_target_that_is_down_leaves_the_others_load(truth: Any, plan: MakePlan, keep: Any) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        urls = [truth.url(), f"http://127.0.0.1:{unused.getsockname()[1]}"]
        found = drive(plan(*urls, due_s=[0.0, 0.0, 0.1, 0.1]), keep)
    assert {(exchange.job.target, exchange.failure is None) for exchange in found.records} == {(0, True), (1, False)}


def test_a_name_without_an_address_is_refused(plan: MakePlan, keep: Any) -> None:
    found = drive(plan("http://no-such-host.invalid", jobs=2, streams=1), keep)
    assert kinds(found) == ["refused"]


def test_a_server_that_listens_on_one_of_the_name_s_addresses_is_found(
    truth: Any, plan: MakePlan, keep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `localhost` is ::1 first, on many machines, and the server has only 127.0.0.1."""
    port = int(truth.root.rpartition(":")[2])
    tcp = (socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
    found = [(socket.AF_INET, *tcp, ("127.0.0.1", 1)), (socket.AF_INET, *tcp, ("127.0.0.1", port))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
    load = drive(plan(f"http://some-name:{port}/plain", jobs=4, streams=2), keep)
    assert kinds(load) == [None] * 4
    assert load.reconnects == 0


def test_stamps_are_taken_on_reading_where_the_kernel_s_are_not_wanted(truth: Any, plan: MakePlan, keep: Any) -> None:
    found = drive(plan(truth.url(), kernel_stamps=False), keep)
    assert found.stamps == "user"
    assert found.lags_ms
    assert all(exchange.end_ns >= exchange.sent_ns for exchange in found.records)


def test_a_server_is_reached_over_ipv6(plan: MakePlan, keep: Any) -> None:
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    threading.Thread(target=serve, daemon=True).start()
    with listener:
        found = drive(plan(f"http://[::1]:{listener.getsockname()[1]}", jobs=1, streams=1), keep)
    assert kinds(found) == [None]


def test_few_jobs_that_repeat_keep_all_streams_busy(truth: Any, plan: MakePlan, keep: Any) -> None:
    found = drive(plan(truth.url("ttft=200"), jobs=2, streams=6, repeat=True, duration_s=0.1), keep)
    assert most_at_once(found) == 6


def test_a_load_that_repeats_needs_an_end(truth: Any, plan: MakePlan, keep: Any) -> None:
    with pytest.raises(ValueError, match="duration"):
        drive(plan(truth.url(), repeat=True), keep)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_keeps_what_has_ended_and_cuts_what_has_not(truth: Any, plan: MakePlan, keep: Any) -> None:
    made = plan(truth.url("ttft=10"), truth.url("hang=2"), jobs=4, streams=2)
    sent: list[Watch] = []

    def watch(state: Watch) -> None:
        if state.ended == 1 and state.in_flight == 2 and not sent:
            sent.append(state)
            ctrl_c()

    made = replace(made, jobs=[made.jobs[0], made.jobs[1], made.jobs[3]])
    with pytest.raises(Interrupted) as caught:
        drive(made, keep, watch)
    load = caught.value.load
    assert {exchange.job.prompt: exchange.failure and exchange.failure.kind for exchange in load.records} == {
        0: None,
        1: "interrupted",
        3: "interrupted",
    }
    cut = load.records[-1]
    assert cut.response is not None
    assert len(cut.response.pieces) >= 2


def test_ctrl_c_while_answers_are_read_loses_none(truth: Any, plan: MakePlan) -> None:
    interrupted: list[Exchange] = []

    def read(exchange: Exchange) -> int:
        if not interrupted:
            interrupted.append(exchange)
            ctrl_c()
        return exchange.job.prompt

    with pytest.raises(Interrupted) as caught:
        drive(plan(truth.url(), jobs=5), read)
    assert sorted(caught.value.load.records) == [0, 1, 2, 3, 4]


def test_ctrl_c_twice_at_once_is_once(truth: Any, plan: MakePlan, keep: Any) -> None:
    def watch(state: Watch) -> None:
        if state.in_flight == 2:
            ctrl_c()
            ctrl_c()

    with pytest.raises(Interrupted) as caught:
        drive(plan(truth.url("hang=0")), keep, watch)
    assert kinds(caught.value.load) == ["interrupted"] * 2


def test_ctrl_c_while_it_connects_ends_the_load(plan: MakePlan, keep: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        threading.Timer(0.2, ctrl_c).start()
        with pytest.raises(Interrupted) as caught:
            drive(plan(f"https://127.0.0.1:{silent.getsockname()[1]}"), keep)
    assert caught.value.load.records == []


def test_ctrl_c_is_an_exception_again_when_the_load_is_over(truth: Any, plan: MakePlan, keep: Any) -> None:
    before = signal.getsignal(signal.SIGINT)
    drive(plan(truth.url()), keep)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_watch_is_told_how_the_load_stands(truth: Any, plan: MakePlan, keep: Any) -> None:
    seen: list[Watch] = []
    drive(plan(truth.url("ttft=650"), jobs=4, streams=4), keep, seen.append)
    assert max(state.in_flight for state in seen) == 4
    assert [state.elapsed_s for state in seen] == sorted(state.elapsed_s for state in seen)
    assert (seen[-1].ended, seen[-1].failed, seen[-1].in_flight) == (4, 0, 0)
    assert seen[-1].chunks >= 16


def test_a_load_that_waits_uses_next_to_no_processor(truth: Any, plan: MakePlan, keep: Any) -> None:
    began = time.process_time()
    drive(plan(truth.url(), due_s=[0.0, 0.25, 0.5]), keep)
    assert time.process_time() - began < 0.25
