from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmopt.bench.client.base import Exchange, Failure, Job, Target
from llmopt.bench.client.wire import Response
from llmopt.bench.workload.jobs import jobs
from llmopt.bench.workload.source import Conversation, Turn

END_NS = 5_000_000_000
TARGETS = (Target("http://a:1", "/x"), Target("http://b:2", "/x", (("authorization", "Bearer k"),)))


@dataclass(frozen=True)
class Echo:
    """An endpoint that sends what it is given as JSON, and answers in plain text."""

    def body(self, *, model: str, turns: Sequence[tuple[str, str]], output_tokens: int) -> bytes:
        return json.dumps({"model": model, "turns": turns, "tokens": output_tokens}).encode()

    def answer(self, response: Response) -> str:
        return response.body().decode()


def conversation(number: int, turns: int = 1, think_s: float = 0.0) -> Conversation:
    said = [(("user", f"question {number}.{i}"),) for i in range(turns)]
    made = tuple(Turn(said=s, output_tokens=10 + i, think_s=think_s if i else 0.0) for i, s in enumerate(said))
    return Conversation(number=number, turns=made)


def made(*conversations: Conversation, arrivals_ns: Sequence[int] | None = None) -> list[Job]:
    return jobs(conversations, endpoint=Echo(), model="m", targets=TARGETS, arrivals_ns=arrivals_ns)


def sent(job: Job) -> dict[str, Any]:
    head, _, body = job.request.partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head
    found: dict[str, Any] = json.loads(body)
    return found


def answered(job: Job, text: str = "so", *, status: int = 200, failure: Failure | None = None) -> Exchange:
    response = Response()
    response.feed(1, f"HTTP/1.1 {status} X\r\ncontent-length: {len(text)}\r\n\r\n{text}".encode())
    return Exchange(job, None, 1, END_NS, response, failure)


def follow(job: Job, text: str = "so") -> Job:
    assert job.then is not None
    found = job.then(answered(job, text))
    assert found is not None
    return found


def test_a_job_carries_its_prompt_and_asks_for_its_tokens() -> None:
    (job,) = made(conversation(7))
    assert sent(job) == {"model": "m", "turns": [["user", "question 7.0"]], "tokens": 10}
    assert (job.prompt, job.turn, job.wanted_tokens, job.then) == (7, 0, 10, None)


def test_targets_take_turns() -> None:
    found = made(*map(conversation, range(4)))
    assert [job.target for job in found] == [0, 1, 0, 1]
    assert [b"host: b:2" in job.request for job in found] == [False, True, False, True]
    assert [b"Bearer k" in job.request for job in found] == [False, True, False, True]


def test_a_conversation_stays_on_its_target() -> None:
    _, job = made(conversation(0, 2), conversation(1, 2))
    following = follow(job)
    assert following.target == job.target == 1
    assert b"host: b:2" in following.request


def test_a_later_turn_has_the_whole_history_with_the_real_answers() -> None:
    (first,) = made(conversation(0, turns=3))
    third = follow(follow(first, "one"), "two")
    assert sent(third)["turns"] == [
        ["user", "question 0.0"],
        ["assistant", "one"],
        ["user", "question 0.1"],
        ["assistant", "two"],
        ["user", "question 0.2"],
    ]
    assert (third.turn, third.wanted_tokens, third.then) == (2, 12, None)


def test_a_later_turn_is_due_after_the_time_to_think() -> None:
    (job,) = made(conversation(0, 2, think_s=1.5), arrivals_ns=[3])
    assert job.due_ns == 3
    assert follow(job).due_ns == END_NS + 1_500_000_000


def test_arrivals_are_those_of_the_conversations() -> None:
    assert [job.due_ns for job in made(*map(conversation, range(3)), arrivals_ns=[0, 10, 30])] == [0, 10, 30]
    assert [job.due_ns for job in made(*map(conversation, range(2)))] == [None, None]


def test_a_conversation_ends_where_an_answer_fails() -> None:
    (job,) = made(conversation(0, 2))
    assert job.then is not None
    assert job.then(answered(job, status=500)) is None
    assert job.then(answered(job, failure=Failure("cut", "early"))) is None
    assert job.then(Exchange(job, None, 1, END_NS, None, Failure("refused", "no"))) is None


def test_jobs_survive_pickling_with_the_turns_that_follow() -> None:
    (job,) = made(conversation(0, 2))
    again = pickle.loads(pickle.dumps(job))
    assert sent(follow(again)) == sent(follow(job))
