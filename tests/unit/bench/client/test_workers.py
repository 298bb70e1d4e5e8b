"""A load shared by processes is the same load: nothing is lost, sent twice, or begun early."""

from __future__ import annotations

import os
import signal
import threading
import time
from operator import attrgetter, methodcaller
from pathlib import Path
from typing import Any

import pytest

from llmopt.bench.client import workers
from llmopt.bench.client.base import Interrupted, Job, Plan, Target, Watch
from llmopt.errors import LlmoptError

TARGET_PATH = "/v1/completions"
BODY = b'{"prompt": "p", "max_tokens": 4}'

read = attrgetter("job.prompt", "sent_ns", "failure")  # picklable, as a reader must be


def make_plan(url: str, jobs: int = 12, **options: Any) -> Plan:
    target = Target(url, TARGET_PATH)
    options = {"streams": 3, "timeout_s": 20.0, **options}
    return Plan(targets=(target,), jobs=[Job(target.request(BODY), number) for number in range(jobs)], **options)


def children() -> set[int]:
    """Processes that this one has started and that still run a load."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == os.getpid() and b"llmopt.bench.client.workers" in (folder / "cmdline").read_bytes():
                    found.add(int(folder.name))
            except OSError:
                continue
    return found


def test_every_job_is_sent_by_one_of_the_processes(truth: Any) -> None:
    found = workers.drive(make_plan(truth.url("ttft=10")), read, processes=2)
    assert sorted(prompt for prompt, _, _ in found.records) == list(range(12))
    assert {failure for _, _, failure in found.records} == {None}
    assert found.processes == 2
    assert all(sent_ns >= found.started_ns for _, sent_ns, _ in found.records)
    assert not children()


def test_one_process_is_this_one(truth: Any) -> None:
    """Nothing need be picklable."""
    found = workers.drive(make_plan(truth.url()), lambda exchange: os.getpid(), processes=1)
    assert set(found.records) == {os.getpid()}


def test_all_begin_together(truth: Any) -> None:
    found = workers.drive(make_plan(truth.url("ttft=10"), jobs=8, streams=2), read, processes=2)
    first = [min(sent for prompt, sent, _ in found.records if prompt % 2 == part) for part in (0, 1)]
    assert abs(first[0] - first[1]) < 0.5e9


def test_the_watch_sees_all_processes(truth: Any) -> None:
    seen: list[Watch] = []
    workers.drive(make_plan(truth.url("ttft=900"), jobs=4, streams=4), read, processes=2, watch=seen.append)
    assert max(state.in_flight for state in seen) == 4
    assert (seen[-1].ended, seen[-1].in_flight) == (4, 0)


def test_a_process_that_dies_is_an_error(truth: Any) -> None:
    def kill_one() -> None:
        while not children():
            time.sleep(0.01)
        os.kill(min(children()), signal.SIGKILL)

    threading.Thread(target=kill_one, daemon=True).start()
    with pytest.raises(LlmoptError, match="killed by signal 9"):
        workers.drive(make_plan(truth.url("ttft=200"), jobs=20, streams=2), read, processes=2)
    assert not children()


def test_a_reader_that_fails_is_an_error(truth: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LlmoptError, match="ended with exit code 1"):
        workers.drive(make_plan(truth.url()), methodcaller("nonsense"), processes=2)
    assert "nonsense" in capfd.readouterr().err


def test_ctrl_c_stops_all_and_keeps_what_they_have(truth: Any) -> None:
    """The first request of each stream ends at once, the second has no end."""
    plan = make_plan(truth.url("ttft=20"), jobs=4, streams=2)
    hangs = Target(truth.url("hang=1"), TARGET_PATH)
    plan.jobs[2].request = plan.jobs[3].request = hangs.request(BODY)
    interrupted: list[Watch] = []

    def watch(state: Watch) -> None:
        if state.ended == 2 and state.in_flight == 2 and not interrupted:
            interrupted.append(state)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted) as caught:
        workers.drive(plan, read, processes=2, watch=watch)
    kinds = {prompt: failure and failure.kind for prompt, _, failure in caught.value.load.records}
    assert kinds == {0: None, 1: None, 2: "interrupted", 3: "interrupted"}
    assert not children()
