"""The queue in front of the runtime, with a runtime that does as it is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llmopt.serve import worker as module
from llmopt.serve.worker import Worker


class Handle:
    def __init__(self, tokens: int) -> None:
        self.left = tokens
        self.status = "RUNNING"
        self.unread: list[Any] = []

    def advance(self) -> None:
        if self.status == "CANCEL":
            self.status = "IGNORED"
        if self.status == "RUNNING":
            self.left -= 1
            reason = "NONE" if self.left else "LENGTH"
            self.status = "RUNNING" if self.left else "FINISHED"
            self.unread.append(SimpleNamespace(generated_ids=[7], finish_reason=SimpleNamespace(name=reason)))

    def can_read(self) -> bool:
        return bool(self.unread)

    def read(self) -> dict[int, Any]:
        return {0: self.unread.pop(0)}

    def get_status(self) -> Any:
        return SimpleNamespace(name=self.status)

    def cancel(self) -> None:
        self.status = "CANCEL"


class Pipeline:
    def __init__(self) -> None:
        self.handles: dict[int, Handle] = {}

    def add_request(self, id_: int, tokens: Any, config: Any) -> Handle:
        if config["max_tokens"] > 500:
            raise RuntimeError("Check failed\nat some line")
        self.handles[id_] = Handle(config["max_tokens"])
        return self.handles[id_]

    def step(self) -> None:
        for handle in self.handles.values():
            handle.advance()


@pytest.fixture
def pipeline() -> Pipeline:
    return Pipeline()


@pytest.fixture
def worker(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Worker:
    """Room for two requests of 31 + 1 tokens (two blocks each, one of them spare)."""
    monkeypatch.setattr(module, "generation_config", lambda request, eos: request)
    return Worker(pipeline, blocks=4, max_batch=8, eos_token_ids=[0])


def request(id_: int, prompt: int = 28, max_tokens: int = 3) -> dict[str, Any]:
    return {"add": id_, "tokens": [1] * prompt, "max_tokens": max_tokens}


def drain(worker: Worker) -> list[Any]:
    events = []
    while worker.busy:
        events += worker.step()
    return events


def test_every_token_and_the_reason_of_the_end_are_told(worker: Worker) -> None:
    worker.add(request(1))
    assert drain(worker) == [(1, [7], None, None), (1, [7], None, None), (1, [7], "length", None)]


def test_what_the_cache_cannot_hold_in_full_waits_its_turn(worker: Worker, pipeline: Pipeline) -> None:
    for id_ in (1, 2, 3):
        worker.add(request(id_))
    worker.step()
    assert list(pipeline.handles) == [1, 2]
    ends = [event[0] for event in drain(worker) if event[2]]
    assert ends == [1, 2, 3]


def test_a_small_request_does_not_overtake_a_large_one(worker: Worker, pipeline: Pipeline) -> None:
    worker.add(request(1))
    worker.add(request(2, prompt=60))
    worker.add(request(3))
    worker.step()
    assert list(pipeline.handles) == [1]
    drain(worker)
    assert list(pipeline.handles) == [1, 2, 3]


def test_no_more_sequences_run_than_the_batch_holds(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "generation_config", lambda request, eos: request)
    worker = Worker(pipeline, blocks=100, max_batch=2, eos_token_ids=[0])
    for id_ in (1, 2, 3):
        worker.add(request(id_))
    worker.step()
    assert list(pipeline.handles) == [1, 2]


def test_a_cancelled_request_says_nothing_more_and_frees_its_blocks(worker: Worker, pipeline: Pipeline) -> None:
    for id_ in (1, 2, 3):
        worker.add(request(id_, max_tokens=4))
    worker.step()
    worker.cancel(1)
    assert [event[0] for event in worker.step()] == [2]
    worker.step()
    assert list(pipeline.handles) == [1, 2, 3]


def test_a_waiting_request_can_be_cancelled(worker: Worker, pipeline: Pipeline) -> None:
    for id_ in (1, 2, 3):
        worker.add(request(id_))
    worker.step()
    worker.cancel(3)
    drain(worker)
    assert list(pipeline.handles) == [1, 2]


def test_cancelling_what_has_ended_is_nothing(worker: Worker) -> None:
    worker.add(request(1))
    drain(worker)
    worker.cancel(1)
    assert not worker.busy


def test_a_request_that_the_runtime_refuses_fails_alone(worker: Worker) -> None:
    worker.add(request(1, prompt=1, max_tokens=501) | {"tokens": []})
    worker.add(request(2))
    worker._free_blocks = 100
    events = drain(worker)
    assert events[0] == (1, [], None, "the runtime refused the request: Check failed")
    assert events[-1] == (2, [7], "length", None)


def test_a_request_that_the_runtime_drops_is_an_error(worker: Worker, pipeline: Pipeline) -> None:
    worker.add(request(1))
    worker.step()
    pipeline.handles[1].status = "IGNORED"
    assert worker.step() == [(1, [], None, "the runtime dropped the request: ignored")]
    assert not worker.busy
