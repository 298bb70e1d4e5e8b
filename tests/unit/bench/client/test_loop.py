"""The client against a server that knows the truth. Bounds hold by physics, however busy the machine is."""

from __future__ import annotations

import contextlib
import json
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest

from llmopt.bench.client.base import Job, Load, Plan, Target
from llmopt.bench.client.loop import drive
from llmopt.bench.client.pace import Pace
from llmopt.bench.endpoints import ENDPOINTS
from llmopt.bench.metrics.records import Record, read


def load(
    url: str, *, requests: int = 4, streams: int = 2, tokens: int = 8, **options: Any
) -> tuple[Load[Record], list[str]]:
    """Load the server at `url`; the records and the prompts that they name."""
    endpoint = ENDPOINTS[options.pop("endpoint", "completions")]
    headers = options.pop("headers", ())
    prompts = [f"{uuid4()} prompt {i}" for i in range(requests)]
    bodies = [endpoint.body(model="truth", turns=(("user", prompt),), output_tokens=tokens) for prompt in prompts]
    options = {"timeout_s": 20.0, **options}
    target = Target(url, endpoint.path_for("truth"), headers)
    jobs = [Job(target.request(body), number) for number, body in enumerate(bodies)]
    plan = Plan(targets=(target,), jobs=jobs, streams=streams, **options)
    return drive(plan, lambda exchange: read(exchange, endpoint.name)), prompts


def kinds(found: Load[Record]) -> set[str | None]:
    return {record.failure and record.failure.kind for record in found.records}


def test_stamps_agree_with_the_server_s_own(truth: Any) -> None:
    found, prompts = load(truth.url("ttft=30,gap=4"), requests=12, streams=4, tokens=16)
    assert kinds(found) == {None}
    log = {entry["prompt"]: entry for entry in truth.log()}
    delays = []
    for record in found.records:
        entry = log[prompts[record.prompt]]
        sent = entry["sent_ns"]
        assert len(record.stamps_ns) == len(sent) == record.tokens == 16
        assert record.sent_ns <= entry["received_ns"]
        assert all(ours >= theirs for ours, theirs in zip(record.stamps_ns, sent, strict=True))
        assert record.stamps_ns[0] - record.sent_ns >= 30e6
        assert record.end_ns >= record.stamps_ns[-1]
        delays += [(ours - theirs) / 1e6 for ours, theirs in zip(record.stamps_ns, sent, strict=True)]
    assert statistics.median(delays) < 50  # 0.1 to 0.3 ms on a quiet machine
    assert found.wall_s >= 3 * (0.030 + 15 * 0.004)


def test_every_request_is_sent_once_and_the_streams_are_all_busy(truth: Any) -> None:
    found, prompts = load(truth.url("ttft=20,gap=1"), requests=20, streams=5)
    assert sorted(record.prompt for record in found.records) == list(range(20))
    asked = [entry["prompt"] for entry in truth.log() if entry["prompt"] in set(prompts)]
    assert sorted(asked) == sorted(prompts)
    in_flight = [
        sum(other.sent_ns <= record.sent_ns < other.end_ns for other in found.records) for record in found.records
    ]
    assert max(in_flight) == 5


def test_a_stream_keeps_its_connection(truth: Any) -> None:
    found, prompts = load(truth.url(), requests=20, streams=3)
    used = {entry["connection"] for entry in truth.log() if entry["prompt"] in set(prompts)}
    assert len(used) == 3
    assert found.reconnects == 0


@pytest.mark.parametrize("behaviour", ["onebyone", "framing=close"])
def test_a_server_that_closes_after_each_answer_is_connected_to_anew(truth: Any, behaviour: str) -> None:
    found, _ = load(truth.url(behaviour), requests=6, streams=2)
    assert kinds(found) == {None}
    assert found.reconnects >= 3


def test_a_connection_closed_while_idle_is_replaced_without_an_error(truth: Any) -> None:
    found, _ = load(truth.url("idle_close"), requests=6, streams=2)
    assert kinds(found) == {None}
    assert found.reconnects == 4


@pytest.mark.parametrize(
    "behaviour",
    ["newline=crlf", "newline=cr", "split=1", "split=7", "comments", "interim", "nodone", "nousage", "together=3"],
)
def test_every_way_to_send_the_same_tokens_is_read(truth: Any, behaviour: str) -> None:
    found, _ = load(truth.url(behaviour), tokens=9)
    assert kinds(found) == {None}
    assert {len(record.stamps_ns) for record in found.records} == {3 if behaviour == "together=3" else 9}
    assert {record.tokens for record in found.records} == {9}
    assert {record.completion_tokens is None for record in found.records} == {behaviour == "nousage"}


@pytest.mark.parametrize("behaviour", ["role", "role,reasoning"])
def test_a_chat_s_tokens_are_those_with_text(truth: Any, behaviour: str) -> None:
    found, _ = load(truth.url(behaviour), endpoint="chat")
    assert kinds(found) == {None}
    assert {len(record.stamps_ns) for record in found.records} == {8}


def test_an_answer_in_one_piece_has_one_stamp(truth: Any) -> None:
    found, _ = load(truth.url("whole"))
    assert {(record.streamed, len(record.stamps_ns), record.tokens) for record in found.records} == {(False, 1, 8)}


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        ("status=400", "http_4xx"),
        ("status=429", "http_429"),
        ("status=500", "http_5xx"),
        ("cut=3", "cut"),
        ("bad=json", "malformed"),
        ("bad=utf8", "malformed"),
        ("bad=shape", "malformed"),
        ("bad=chunk", "malformed"),
        ("garbage", "malformed"),
        ("html", "malformed"),
        ("bad=error", "server_error"),
        ("tokens=0", "empty"),
    ],
)
def test_each_way_to_fail_has_its_class_and_every_request_is_tried(truth: Any, behaviour: str, kind: str) -> None:
    found, _ = load(truth.url(behaviour))
    assert kinds(found) == {kind}
    assert len(found.records) == 4


def test_a_cut_stream_keeps_the_tokens_it_brought(truth: Any) -> None:
    found, _ = load(truth.url("cut=3,gap=1"))
    assert {len(record.stamps_ns) for record in found.records} == {3}


def test_an_answer_without_an_end_times_out(truth: Any) -> None:
    found, _ = load(truth.url("hang=2"), requests=2, timeout_s=0.4)
    assert kinds(found) == {"timeout"}
    assert {len(record.stamps_ns) for record in found.records} == {2}
    assert all(0.4e9 <= record.end_ns - record.sent_ns < 10e9 for record in found.records)
    assert found.wall_s < 15


def test_nobody_listening_is_refused_for_each_stream() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        found, _ = load(f"http://127.0.0.1:{unused.getsockname()[1]}", requests=8, streams=2)
    assert [record.failure and record.failure.kind for record in found.records] == ["refused", "refused"]


def test_a_load_that_only_fails_is_given_up(truth: Any) -> None:
    found, _ = load(truth.url("status=500"), requests=500, streams=2)
    assert 16 <= len(found.records) <= 18


def test_failures_now_and_then_do_not_end_the_load(truth: Any) -> None:
    found, _ = load(truth.url("every=2"), requests=60, streams=2, tokens=2)
    assert len(found.records) == 60
    assert kinds(found) == {None, "http_5xx"}


def test_a_duration_ends_the_load_after_the_requests_in_flight(truth: Any) -> None:
    found, _ = load(truth.url("ttft=30,gap=5"), requests=2, streams=2, duration_s=0.5, repeat=True)
    assert kinds(found) == {None}
    assert len(found.records) > 2
    first = min(record.sent_ns for record in found.records)
    assert max(record.sent_ns for record in found.records) - first <= 0.5e9
    assert max(record.end_ns for record in found.records) - first >= 0.5e9


def test_a_key_goes_into_the_header_and_nowhere_else(truth: Any) -> None:
    headers = (("authorization", "Bearer sk-1"),)
    _, prompts = load(truth.url(), requests=1, streams=1, headers=headers)
    assert [entry["authorization"] for entry in truth.log() if entry["prompt"] == prompts[0]] == ["Bearer sk-1"]
    assert "sk-1" not in repr(Target("http://host", "/", headers))


@pytest.mark.parametrize("kernel_stamps", [True, False])
def test_what_has_come_lies_for_a_while_only_where_the_kernel_has_stamped_it(
    truth: Any, plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, kernel_stamps: bool
) -> None:
    monkeypatch.setattr("llmopt.bench.client.loop._MANY", 1)
    asked: list[int] = []
    monkeypatch.setattr(Pace, "pause_ns", lambda pace, within_ns: asked.append(within_ns) or 1000)
    found = drive(plan(truth.url("gap=2"), jobs=4, kernel_stamps=kernel_stamps), lambda exchange: exchange)
    assert len(found.records) == 4
    assert bool(asked) is (found.stamps == "kernel")


def test_a_full_store_reads_answers_as_they_end(truth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmopt.bench.client.store.HELD_BYTES", 3000)
    found, _ = load(truth.url(), requests=12, streams=2)
    assert sorted(record.prompt for record in found.records) == list(range(12))
    assert kinds(found) == {None}


@contextlib.contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server of one connection after the other, on plain sockets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def test_a_stream_split_into_single_bytes_with_pauses_is_stamped_at_its_end() -> None:
    """The token's first bytes come 50 ms before its last one; it is there when it is whole."""
    event = b'data: {"choices": [{"text": "a"}]}\n\n'
    tail = json.dumps({"usage": {"completion_tokens": 1, "prompt_tokens": 1}}).encode()
    whole = event + b"data: " + tail + b"\n\ndata: [DONE]\n\n"

    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: {len(whole)}\r\n\r\n".encode()
        connection.sendall(head + event[:10])
        time.sleep(0.05)
        connection.sendall(whole[10:])
        connection.recv(1)

    with answering(answer) as url:
        found, _ = load(url, requests=1, streams=1)
    assert kinds(found) == {None}
    assert found.records[0].stamps_ns[0] - found.records[0].sent_ns >= 50e6


def test_a_server_that_closes_without_a_word_is_cut() -> None:
    with answering(lambda connection: connection.recv(65536) and None) as url:
        found, _ = load(url, requests=2, streams=1)
    assert kinds(found) == {"cut"}
