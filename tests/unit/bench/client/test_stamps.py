"""Stamps of the kernel on our clock, and what happens when they cannot be right."""

from __future__ import annotations

import socket
import struct
import time

import pytest

from llmopt.bench.client import stamps
from llmopt.bench.client.stamps import Stamps

SECOND_NS = 1_000_000_000


def kernel_says(wall_ns: int) -> list[tuple[int, int, bytes]]:
    return [(1, 35, struct.pack("@qq", wall_ns // SECOND_NS, wall_ns % SECOND_NS))]


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        return ours, listener.accept()[0]


@pytest.fixture
def clock() -> Stamps:
    made = Stamps(kernel=True)
    made.look()
    return made


def test_a_kernel_s_stamp_is_put_on_the_monotonic_clock(clock: Stamps) -> None:
    before = time.monotonic_ns()
    wall = time.time_ns()
    after = time.monotonic_ns()
    stamp_ns = clock.of(kernel_says(wall), sent_ns=before - SECOND_NS)
    assert before - 100_000 <= stamp_ns <= after + 100_000
    assert clock.kind == "kernel"


@pytest.mark.parametrize("offset_ns", [-10 * SECOND_NS, 10 * SECOND_NS], ids=["before the sending", "after now"])
def test_an_impossible_stamp_is_replaced_by_that_of_reading(clock: Stamps, offset_ns: int) -> None:
    before = time.monotonic_ns()
    stamp_ns = clock.of(kernel_says(time.time_ns() + offset_ns), sent_ns=before)
    assert before <= stamp_ns <= time.monotonic_ns()
    assert clock.kind == "user"


def test_stamps_of_both_kinds_are_said_to_be_mixed(clock: Stamps) -> None:
    clock.of(kernel_says(time.time_ns()), sent_ns=0)
    clock.of([], sent_ns=0)
    assert clock.kind == "mixed"


def test_a_wall_clock_that_is_moved_moves_no_stamp(clock: Stamps, monkeypatch: pytest.MonkeyPatch) -> None:
    wall = time.time_ns
    monkeypatch.setattr(stamps.time, "time_ns", lambda: wall() + 3600 * SECOND_NS)
    monkeypatch.setattr(stamps, "_AT_ONCE_NS", SECOND_NS)
    time.sleep(0.002)
    before = time.monotonic_ns()
    clock.look()
    stamp_ns = clock.of(kernel_says(stamps.time.time_ns()), sent_ns=before)
    assert before <= stamp_ns <= time.monotonic_ns()


def test_the_lag_is_the_time_from_stamp_to_reading(clock: Stamps) -> None:
    clock.of(kernel_says(time.time_ns() - 5_000_000), sent_ns=0)
    assert 4.9 <= clock.lags_ms[0] < 5000


def test_samples_of_the_lag_stay_few_and_cover_the_whole_load(clock: Stamps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stamps, "_LAG_SAMPLES", 100)
    for receive in range(5000):
        clock.of(kernel_says(time.time_ns() - receive * 1_000_000), sent_ns=-(10**18))
    lags = clock.lags_ms
    assert 50 <= len(lags) <= 100
    assert max(lags) > 4800
    assert 1500 < sorted(lags)[len(lags) // 2] < 3500


def test_after_the_wait_for_the_kernel_it_stamps_the_first_receive() -> None:
    ours, theirs = connected()
    with ours, theirs:
        stamps.ask_kernel(ours)
        stamps.await_kernel()
        theirs.send(b"x")
        assert ours.recvmsg(1, stamps.ANCILLARY_BYTES)[1]


def test_a_kernel_that_never_stamps_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stamps, "ask_kernel", lambda sock: None)
    before_s = time.monotonic()
    stamps.await_kernel()
    assert 0.02 <= time.monotonic() - before_s < 5
