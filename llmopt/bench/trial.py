"""One load of the known-truth server in a process of its own, so that its CPU, memory and start are the client's alone.

`python -m llmopt.bench.trial SHAPE` takes its load as JSON and prints what it saw as JSON; see selftest.py.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmopt.bench.client.base import Exchange, Job, Plan, Target
from llmopt.bench.client.loop import drive
from llmopt.bench.client.store import HELD_BYTES
from llmopt.bench.endpoints import ENDPOINTS
from llmopt.bench.metrics.records import Record, read
from llmopt.memory import usage

ENDPOINT = "chat"
_PROMPT = "the of and to in a is that " * 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A load: `streams` at once, or so many requests a second at even distances."""

    url: str
    requests: int
    tokens: int  # of every answer
    streams: int | None = None
    rate: float | None = None
    core: int | None = None  # to run on; None: any

    def command(self) -> list[str]:
        """What runs it."""
        return [sys.executable, "-m", "llmopt.bench.trial", json.dumps(asdict(self))]


def plan(trial: Trial) -> Plan:
    """Every request carries its number, by which the server logs it."""
    endpoint = ENDPOINTS[ENDPOINT]
    target = Target(trial.url, endpoint.path_for("truth"))
    body = endpoint.body(model="truth", turns=[("user", _PROMPT)], output_tokens=trial.tokens)
    jobs = [
        Job(
            request=replace(target, headers=(("x-request-id", str(number)),)).request(body),
            prompt=number,
            due_ns=None if trial.rate is None else round(number / trial.rate * 1e9),
            wanted_tokens=trial.tokens,
        )
        for number in range(trial.requests)
    ]
    return Plan(targets=(target,), jobs=jobs, streams=trial.streams)


def run(trial: Trial) -> dict[str, Any]:
    """Drive the load here; CPU seconds include the connecting and all parsing."""
    prepared = plan(trial)
    before_s, waited_before_s = time.process_time(), _waited_s()
    load = drive(prepared, _read)
    cpu_s = time.process_time() - before_s
    return {
        "cpu_s": cpu_s,
        "waited_s": _waited_s() - waited_before_s,
        "peak_rss_bytes": usage()["peak_rss_bytes"],
        "data_bytes": sum(len(job.request) for job in prepared.jobs)
        + min(HELD_BYTES, sum(received for _, received in load.records)),
        "stamps": load.stamps,
        "requests": [
            {
                "id": str(record.prompt),
                "due_ns": record.due_ns,
                "sent_ns": record.sent_ns,
                "stamps_ns": list(record.stamps_ns),
                "failure": record.failure and record.failure.kind,
            }
            for record, _ in load.records
        ],
    }


def _read(exchange: Exchange) -> tuple[Record, int]:
    """With the bytes that were received."""
    return read(exchange, ENDPOINT), exchange.response.received_bytes if exchange.response is not None else 0


def _waited_s() -> float:
    """How long this thread has been ready to run while its core did something else."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def main() -> None:
    trial = Trial(**json.loads(sys.argv[1]))
    if trial.core is not None:
        os.sched_setaffinity(0, {trial.core})
    print(json.dumps(run(trial)))


if __name__ == "__main__":
    main()
