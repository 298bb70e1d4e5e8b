"""The server that judges the client, judged by a socket and the clock."""

from __future__ import annotations

import http.client
import json
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmopt.bench.serving import serving

TTFT_NS, GAP_NS = 30_000_000, 4_000_000


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    command = [sys.executable, "-m", "llmopt.bench.truth", "--ttft-ms", "30", "--gap-ms", "4"]
    log = tmp_path_factory.mktemp("truth") / "log"
    with serving("truth", Path(), log, lambda _: command, start_timeout_s=60) as running:
        yield running.url.removeprefix("http://")


@contextmanager
def connected(address: str) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(address, timeout=20)
    try:
        connection.connect()
        yield connection
    finally:
        connection.close()


def get(address: str, path: str) -> Any:
    with connected(address) as connection:
        connection.request("GET", path)
        return json.load(connection.getresponse())


def logged(address: str, identity: str) -> dict[str, Any]:
    (found,) = [request for request in get(address, "/log")["requests"] if request["id"] == identity]
    return dict(found)


def own_error_ns(address: str) -> float:
    """By how much a stamp of sending may be wrong, as the server says: it can lose its core just behind a send."""
    return float(get(address, "/log")["half_width_us"]["max"]) * 1e3


def body(tokens: object, **more: object) -> bytes:
    fields = {"messages": [{"role": "user", "content": "one two three"}], "max_tokens": tokens, "stream": True, **more}
    return json.dumps(fields).encode()


def answer(
    connection: http.client.HTTPConnection, identity: str, *, tokens: int = 5, path: str = "/v1/chat/completions"
) -> list[dict[str, Any]]:
    """The events of one answer."""
    connection.request("POST", path, body(tokens), {"x-request-id": identity})
    response = connection.getresponse()
    assert response.status == 200
    *events, end, rest = response.read().decode().split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def ask(address: str, identity: str, *, tokens: int = 5, path: str = "/v1/chat/completions") -> list[dict[str, Any]]:
    with connected(address) as connection:
        return answer(connection, identity, tokens=tokens, path=path)


def test_no_token_leaves_before_it_is_due(address: str) -> None:
    ask(address, "due", tokens=9)
    log = logged(address, "due")
    due_ns = [log["arrived_ns"] + TTFT_NS + k * GAP_NS for k in range(9)]
    width_ns = get(address, "/log")["half_width_us"]["max"] * 1e3
    assert all(sent_ns >= due - width_ns for sent_ns, due in zip(log["sent_ns"], due_ns, strict=True))


def test_an_answer_starts_between_its_request_and_its_receipt(address: str) -> None:
    with connected(address) as connection:
        before_ns = time.monotonic_ns()
        connection.request("POST", "/v1/chat/completions", body(5), {"x-request-id": "between"})
        asked_ns = time.monotonic_ns()
        connection.getresponse().read()
        after_ns = time.monotonic_ns()
    log = logged(address, "between")
    clocks_apart_ns = 1_000_000  # the kernel stamps by the clock of the day, which is turned into the monotonic one
    assert before_ns - clocks_apart_ns <= log["arrived_ns"] <= asked_ns + clocks_apart_ns
    assert log["arrived_ns"] < log["sent_ns"][0] < log["sent_ns"][-1] < after_ns + own_error_ns(address)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_every_token_is_an_event_and_usage_counts_them(address: str, path: str) -> None:
    events = ask(address, "count" + path, tokens=7, path=path)
    *tokens, usage = [event for event in events if event.get("usage") or "role" not in str(event["choices"])]
    assert len(tokens) == usage["usage"]["completion_tokens"] == len(logged(address, "count" + path)["sent_ns"]) == 7
    assert tokens[-1]["choices"][0]["finish_reason"] == "length"


def test_a_connection_serves_one_request_after_another(address: str) -> None:
    with connected(address) as connection:
        answer(connection, "first of two")
        socket_before = connection.sock
        answer(connection, "second of two", tokens=1)
        assert connection.sock is socket_before
    first_ns, second_ns = logged(address, "first of two")["sent_ns"][-1], logged(address, "second of two")["arrived_ns"]
    assert first_ns < second_ns + own_error_ns(address)


def test_streams_run_side_by_side(address: str) -> None:
    names = [f"side {i}" for i in range(12)]
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: ask(address, name, tokens=50), names))
    logs = [logged(address, name) for name in names]
    assert max(log["sent_ns"][0] for log in logs) < min(log["sent_ns"][-1] for log in logs)


def test_a_request_in_pieces_arrives_with_its_last_byte(address: str) -> None:
    host, _, port = address.partition(":")
    data = body(1)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nx-request-id: pieces\r\ncontent-length: {len(data)}\r\n\r\n".encode()
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        for piece in (head[:20], head[20:] + data[:9]):
            connection.sendall(piece)
            time.sleep(0.03)
        before_ns = time.monotonic_ns()
        connection.sendall(data[9:])
        connection.recv(1 << 16)
        assert logged(address, "pieces")["arrived_ns"] >= before_ns - 1_000_000


def test_a_client_that_leaves_costs_the_others_nothing(address: str) -> None:
    before = get(address, "/log")["cut"]
    with connected(address) as leaving:
        leaving.request("POST", "/v1/chat/completions", body(500), {"x-request-id": "leaves"})
        leaving.getresponse().read(10)
    ask(address, "stays", tokens=20)
    assert get(address, "/log")["cut"] == before + 1
    assert len(logged(address, "stays")["sent_ns"]) == 20


@pytest.mark.parametrize("data", [b"{", b"[]", body(0), body("many"), body(5, stream=False)])
def test_a_bad_request_is_said_to_be_one(address: str, data: bytes) -> None:
    with connected(address) as connection:
        connection.request("POST", "/v1/completions", data)
        response = connection.getresponse()
        assert response.status == 400
        assert json.load(response)["error"]["message"]


def test_it_names_its_model(address: str) -> None:
    assert [model["id"] for model in get(address, "/v1/models")["data"]] == ["truth"]


def test_its_own_error_is_in_its_log(address: str) -> None:
    ask(address, "error")
    log = get(address, "/log")
    assert log["sends"] == sum(len(request["sent_ns"]) for request in log["requests"])
    assert 0 < log["half_width_us"]["p50"] <= log["half_width_us"]["p99"] <= log["half_width_us"]["max"]
    assert log["late_us"]["p50"] <= log["late_us"]["max"]
