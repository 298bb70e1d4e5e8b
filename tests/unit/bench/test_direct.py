"""The loop over an engine's process, with a process that does as it is told."""

from __future__ import annotations

import json
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmopt.bench.client.base import Failure, Interrupted, Job, Load, Plan, Target
from llmopt.bench.direct import running
from llmopt.bench.endpoints import ENDPOINTS
from llmopt.bench.metrics.records import Record
from llmopt.errors import LlmoptError, MeasurementInvalidError

# Answers each request with so many tokens as it asks for, 5 ms each, one request after the other.
CHILD = textwrap.dedent("""
    import json, os, sys, time
    mode = sys.argv[1]
    def say(**message):
        print(json.dumps(message), flush=True)
    if mode == "broken":
        say(fatal="no such device: NPU")
        sys.exit(1)
    if mode == "crash":
        sys.exit("ModuleNotFoundError: No module named 'openvino_genai'")
    if mode == "slow":
        time.sleep(60)
    say(ready=True)
    for line in sys.stdin:
        message = json.loads(line)
        if "cancel" in message:
            continue
        id, count = message["id"], message["body"]["max_tokens"]
        if mode == "die" and id == 3:
            print("fatal: the device is gone", file=sys.stderr)
            sys.exit(9)
        say(id=id, prompt_tokens=len(message["body"]["prompt"]))
        if mode == "hang":
            continue
        if mode == "refuse" and id == 2:
            say(at_ns=time.monotonic_ns(), events=[[id, 0, None, "too long"]])
            continue
        for n in range(1, count + 1):
            time.sleep(0.005)
            say(at_ns=time.monotonic_ns(), events=[[id, 1, "length" if n == count else None, None]])
""")


@pytest.fixture
def command(tmp_path: Path) -> Callable[[str], Callable[[Path], list[str]]]:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    return lambda mode: lambda engine: [sys.executable, str(script), mode]


def plan(count: int = 6, *, streams: int | None = 2, **fields: Any) -> Plan:
    target = Target("http://nowhere", "/v1/completions")
    bodies = [
        ENDPOINTS["completions"].body(model="m", turns=[("user", "x" * (n + 1))], output_tokens=3) for n in range(count)
    ]
    jobs = [Job(target.request(body), n, wanted_tokens=3) for n, body in enumerate(bodies)]
    return Plan(targets=(target,), jobs=jobs, streams=streams, **fields)


def drive(folder: Path, load: Plan, command: Callable[[Path], list[str]]) -> Load[Record]:
    with running("candidate", folder, folder / "log", command) as direct:
        return direct.drive(load)


def test_every_job_has_a_record_with_a_stamp_a_token(command: Any, tmp_path: Path) -> None:
    load = drive(tmp_path, plan(), command("good"))
    assert sorted(record.prompt for record in load.records) == list(range(6))
    for record in load.records:
        assert (record.failure, record.tokens, record.finish, record.wanted_tokens) == (None, 3, "length", 3)
        assert record.prompt_tokens == record.prompt + 1
        stamps = list(record.stamps_ns)
        assert [record.sent_ns, *stamps, record.end_ns] == sorted([record.sent_ns, *stamps, record.end_ns])
        assert stamps[-1] - stamps[0] >= 10_000_000
    assert load.wall_s >= 6 * 3 * 0.005


def test_so_many_requests_as_streams_are_with_the_engine(command: Any, tmp_path: Path) -> None:
    load = drive(tmp_path, plan(streams=3), command("good"))
    edges = [(record.sent_ns, 1) for record in load.records] + [(record.end_ns, -1) for record in load.records]
    in_flight = most = 0
    for _, step in sorted(edges):
        in_flight += step
        most = max(most, in_flight)
    assert most == 3


def test_a_duration_ends_a_load_that_repeats_its_jobs(command: Any, tmp_path: Path) -> None:
    load = drive(tmp_path, plan(2, repeat=True, duration_s=0.2), command("good"))
    assert len(load.records) > 2
    assert load.wall_s >= 0.2


def test_one_engine_can_be_driven_again(command: Any, tmp_path: Path) -> None:
    with running("candidate", tmp_path, tmp_path / "log", command("good")) as direct:
        assert [len(direct.drive(plan(2)).records) for _ in range(2)] == [2, 2]


def test_a_request_that_the_engine_refuses_fails_alone(command: Any, tmp_path: Path) -> None:
    load = drive(tmp_path, plan(), command("refuse"))
    failures = [record.failure for record in load.records if record.failure is not None]
    assert failures == [Failure("server_error", "too long")]
    assert len(load.records) == 6


def test_a_request_without_an_end_times_out(command: Any, tmp_path: Path) -> None:
    load = drive(tmp_path, plan(2, timeout_s=0.1), command("hang"))
    assert [record.failure.kind for record in load.records if record.failure] == ["timeout"] * 2


def test_an_engine_that_cannot_be_loaded_is_said(command: Any, tmp_path: Path) -> None:
    with pytest.raises(LlmoptError, match="no such device: NPU"):
        drive(tmp_path, plan(), command("broken"))


def test_an_engine_that_crashes_at_its_start_is_said_with_its_last_words(command: Any, tmp_path: Path) -> None:
    with pytest.raises(LlmoptError, match="did not start") as caught:
        drive(tmp_path, plan(), command("crash"))
    assert "No module named" in str(caught.value.hint)


def test_an_engine_that_takes_too_long_to_load_is_ended(command: Any, tmp_path: Path) -> None:
    with pytest.raises(LlmoptError, match="not loaded within"):  # noqa: SIM117
        with running("candidate", tmp_path, tmp_path / "log", command("slow"), start_timeout_s=0.1, stop_timeout_s=0.1):
            pass


def test_an_engine_that_dies_makes_the_load_invalid(command: Any, tmp_path: Path) -> None:
    with pytest.raises(MeasurementInvalidError, match="the engine of `candidate` died") as caught:
        drive(tmp_path, plan(), command("die"))
    assert "the device is gone" in str(caught.value.hint)


def test_ctrl_c_keeps_what_has_ended(command: Any, tmp_path: Path) -> None:
    timer = threading.Timer(0.4, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    began_s = time.monotonic()
    with pytest.raises(Interrupted) as caught:
        drive(tmp_path, plan(2, repeat=True, duration_s=60), command("good"))
    timer.join()
    assert time.monotonic() - began_s < 30
    kinds = [record.failure.kind if record.failure else "" for record in caught.value.load.records]
    assert kinds.count("interrupted") == 2
    assert "" in kinds


def test_there_is_no_open_loop(command: Any, tmp_path: Path) -> None:
    with pytest.raises(LlmoptError, match="no open loop"):
        drive(tmp_path, plan(streams=None), command("good"))


def test_there_are_no_conversations(command: Any, tmp_path: Path) -> None:
    talk = plan()
    talk.jobs[0].then = lambda exchange: None
    with pytest.raises(LlmoptError, match="no conversations"):
        drive(tmp_path, talk, command("good"))


def test_the_child_is_told_the_body_of_the_request() -> None:
    job = plan(1).jobs[0]
    assert json.loads(job.request.partition(b"\r\n\r\n")[2])["prompt"] == "x"
