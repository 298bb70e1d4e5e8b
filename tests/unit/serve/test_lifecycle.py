"""How a server starts, ends, and behaves when something else ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LONG = {"prompt": "the server", "max_tokens": 8000, "ignore_eos": True}
Start = Callable[..., Any]


def worker_of(server: Any) -> int:
    """The process id of the engine."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == server.process.pid:
            return int(stat.parent.name)
    raise AssertionError("the server has no child")


def gone(pid: int) -> bool:
    """Whether the process has ended, reaped or not."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_is_in_flight_finish(start: Start, number: signal.Signals) -> None:
    server = start()
    worker = worker_of(server)
    stream = server.stream(**LONG | {"max_tokens": 3000})
    chunks = iter(stream)
    next(chunks)
    server.signal(number)
    rest = list(chunks)
    assert stream.done
    assert rest[-1]["choices"][0]["finish_reason"] == "length"
    stream.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))
    assert server.process.wait(10) == 0
    assert server.log() == ""
    assert gone(worker)


def test_a_second_signal_ends_it_at_once(start: Start) -> None:
    server = start()
    worker = worker_of(server)
    stream = server.stream(**LONG)
    chunks = iter(stream)
    next(chunks)
    server.signal(signal.SIGINT)
    time.sleep(0.2)
    server.signal(signal.SIGINT)
    *_, last = chunks
    assert last["error"]["message"] == "the server is stopping"
    assert server.process.wait(10) == 130
    stream.close()
    assert server.log() == ""
    assert gone(worker)


def test_draining_is_bounded(start: Start) -> None:
    server = start(drain_s=0.2)
    stream = server.stream(**LONG)
    chunks = iter(stream)
    next(chunks)
    server.signal(signal.SIGTERM)
    *_, last = chunks
    assert last["error"]["message"] == "the server is stopping"
    assert server.process.wait(10) == 0
    stream.close()
    assert server.log() == ""


def test_a_client_that_does_not_read_cannot_keep_the_server(start: Start) -> None:
    server = start(drain_s=0.2)
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", server.port))
        body = json.dumps(LONG | {"prompt": ["the server"] * 8, "stream": True}).encode()
        deaf.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        deaf.recv(10)
        time.sleep(0.5)  # until the server cannot write any more
        server.signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
    assert server.log() == ""


def test_a_signal_while_the_engine_loads_ends_it(engine: Path, start: Start) -> None:
    server = start(wait=False)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            worker = worker_of(server)
            break
        except AssertionError:
            time.sleep(0.01)
    server.signal(signal.SIGTERM)
    assert server.process.wait(10) == 130
    assert server.log() == ""
    assert gone(worker)


def test_a_client_that_goes_frees_its_place(start: Start) -> None:
    server = start(max_batch=1)
    begin = time.monotonic()
    server.complete(**LONG | {"max_tokens": 2000})
    quarter_s = time.monotonic() - begin
    stream = server.stream(**LONG)
    next(iter(stream))
    stream.close()
    begin = time.monotonic()
    server.complete(max_tokens=1)
    assert time.monotonic() - begin < quarter_s


def test_a_client_that_goes_before_its_turn_is_forgotten(start: Start) -> None:
    server = start(max_batch=1)
    first = server.stream(**LONG)
    next(iter(first))
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port)) as waiting:
            body = b'{"prompt":"a","max_tokens":8000,"ignore_eos":true}'
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
            waiting.sendall(head + body)
            time.sleep(0.05)
    first.close()
    begin = time.monotonic()
    server.complete(max_tokens=1)
    assert time.monotonic() - begin < 1


def test_a_dead_engine_is_a_500_in_flight_and_a_503_afterwards(start: Start) -> None:
    server = start()
    stream = server.stream(**LONG)
    chunks = iter(stream)
    next(chunks)
    os.kill(worker_of(server), signal.SIGKILL)
    *_, last = chunks
    assert last["error"]["type"] == "server_error"
    assert not stream.done
    stream.close()
    assert server.request("GET", "/health")[0] == 503
    status, reply = server.request("POST", "/v1/completions", {"prompt": "a"})
    assert (status, reply["error"]["type"]) == (503, "server_error")
    assert server.stop() == 0
    assert "the engine failed: the engine process ended (exit code -9, 1 requests in flight)" in server.log()


def test_an_engine_that_dies_before_the_first_token_is_a_500(start: Start, in_background: Any) -> None:
    server = start(max_batch=1)
    running = server.stream(**LONG)
    next(iter(running))
    replies: list[Any] = []
    body = {"prompt": "a", "stream": True, "max_tokens": 5}
    waiting = in_background(lambda: replies.append(server.request("POST", "/v1/completions", body)))
    time.sleep(0.1)
    os.kill(worker_of(server), signal.SIGKILL)
    waiting.join()
    running.close()
    status, reply = replies[0]
    assert (status, reply["error"]["type"]) == (500, "server_error")
    assert "the engine failed" in reply["error"]["message"]


def test_the_engine_ends_with_a_server_that_is_killed(start: Start) -> None:
    server = start()
    worker = worker_of(server)
    stream = server.stream(**LONG)
    next(iter(stream))
    server.process.kill()
    server.process.wait()
    stream.close()
    assert gone(worker)


def test_an_engine_that_cannot_be_loaded_is_an_error(engine: Path, start: Start, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(engine, tmp_path / "broken"))
    file = broken / "openvino_model.xml"
    file.write_text(file.read_text()[:1000])
    server = start(broken)
    assert server.process.wait(10) == 1
    assert "error: the engine could not be loaded" in server.log()


def test_the_runtimes_cache_is_kept_where_told(start: Start, tmp_path: Path) -> None:
    cache = tmp_path / "some" / "cache"
    first = start(cache_dir=str(cache)).complete(max_tokens=20)
    assert list(cache.iterdir())
    assert start(cache_dir=str(cache)).complete(max_tokens=20)["choices"] == first["choices"]
