from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest

from llmopt.bench.client.base import Exchange, Job, Plan, Target
from llmopt.bench.client.wire import events

PATH = "/v1/completions"


def body(tokens: int = 4) -> bytes:
    return json.dumps({"prompt": str(uuid4()), "max_tokens": tokens}).encode()


@pytest.fixture
def plan() -> Callable[..., Plan]:
    """A plan whose jobs ask the servers at `urls` in turn."""

    def make(*urls: str, jobs: int = 4, due_s: Sequence[float] = (), tokens: int = 4, **options: Any) -> Plan:
        targets = tuple(Target(url, PATH) for url in urls)
        made = []
        for number in range(len(due_s) or jobs):
            at = number % len(targets)
            made.append(Job(targets[at].request(body(tokens)), number, target=at))
        if due_s:
            made = [replace(job, due_ns=int(due * 1e9)) for job, due in zip(made, due_s, strict=True)]
        options = {"timeout_s": 20.0, "streams": None if due_s else 2, **options}
        return Plan(targets=targets, jobs=made, **options)

    return make


@pytest.fixture
def keep() -> Callable[[Exchange], Exchange]:
    """A reader that reads nothing."""
    return lambda exchange: exchange


@pytest.fixture
def tokens_of() -> Callable[[Exchange], int]:
    """How many events with text an exchange brought."""

    def count(exchange: Exchange) -> int:
        assert exchange.response is not None
        return sum(b'"text"' in data for _, data in events(exchange.response))

    return count
