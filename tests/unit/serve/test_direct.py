"""The engine without HTTP, by its real process over a tiny engine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


class Direct:
    def __init__(self, engine: Path, log: Path) -> None:
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "llmopt.serve.direct", str(engine)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )

    def send(self, **message: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def receive(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline() or "{}")

    def until_ended(self, *ids: int) -> list[tuple[int, int, int, str | None, str | None]]:
        """(stamp, id, tokens, finish, error) of each event, until all these requests have ended."""
        left, found = set(ids), []
        while left:
            message = self.receive()
            for id_, count, finish, error in message.get("events", ()):
                found.append((message["at_ns"], id_, count, finish, error))
                left -= {id_} if finish or error else set()
        return found

    def stop(self) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        code = self.process.wait(20)
        self.process.stdout.close()
        return code


@pytest.fixture(scope="module")
def direct(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Direct]:
    running = Direct(engine, tmp_path_factory.mktemp("direct") / "log")
    assert running.receive() == {"ready": True}
    yield running
    assert running.stop() == 0


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "any", "prompt": "the server", "temperature": 0, "ignore_eos": True, "max_tokens": 8} | fields


def test_a_request_has_as_many_tokens_as_the_server_gives_it(direct: Direct, server: Any) -> None:
    usage = server.complete("the server", max_tokens=8, ignore_eos=True)["usage"]
    direct.send(id=1, body=body())
    assert direct.receive() == {"id": 1, "prompt_tokens": usage["prompt_tokens"]}
    assert sum(count for _, _, count, _, _ in direct.until_ended(1)) == usage["completion_tokens"] == 8


def test_a_chat_is_rendered_by_its_template(direct: Direct, server: Any) -> None:
    messages = [{"role": "user", "content": "hello"}]
    status, reply = server.request("POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 1})
    assert status == 200
    direct.send(id=2, body={"messages": messages, "max_tokens": 1})
    assert direct.receive()["prompt_tokens"] == reply["usage"]["prompt_tokens"]
    direct.until_ended(2)


def test_stamps_are_of_the_clock_that_processes_share(direct: Direct) -> None:
    before_ns = time.monotonic_ns()
    direct.send(id=3, body=body())
    stamps = [at_ns for at_ns, *_ in direct.until_ended(3)]
    times = [before_ns, *stamps, time.monotonic_ns()]
    assert times == sorted(times)
    assert len(set(stamps)) == 8


def test_requests_run_side_by_side(direct: Direct) -> None:
    for id_ in (4, 5):
        direct.send(id=id_, body=body(max_tokens=64))
    order = [id_ for _, id_, *_ in direct.until_ended(4, 5)]
    assert order != sorted(order)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_tokens": 100_000}, "the context is 8192"),
        ({"prompt": None}, "`prompt` must be"),
        ({"n": 2}, "`n` is not"),
    ],
)
def test_what_the_server_would_refuse_is_an_error_of_that_request(direct: Direct, fields: Any, says: str) -> None:
    direct.send(id=6, body=body(**fields))
    [(_, id_, count, finish, error)] = direct.until_ended(6)
    assert (id_, count, finish) == (6, 0, None)
    assert says in str(error)


def test_a_cancelled_request_makes_room(direct: Direct) -> None:
    direct.send(id=7, body=body(max_tokens=8000))
    direct.send(cancel=7)
    direct.send(id=8, body=body())
    assert direct.until_ended(8)[-1][1] == 8


def test_a_folder_that_is_no_engine_is_said(tmp_path: Path) -> None:
    running = Direct(tmp_path, tmp_path / "log")
    assert "is not an engine" in running.receive()["fatal"]
    assert running.stop() == 1
