"""What the client is given and what it brings back. Stamps are nanoseconds of the monotonic clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from llmopt.bench.client.wire import Response

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request gave no answer. `kind` is a class of the report: refused, timeout, cut, malformed, http_5xx, ..."""

    kind: str
    detail: str


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go. `headers` hold the key, so they are never printed."""

    url: str  # of the server, without the endpoint's path
    path: str
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def request(self, body: bytes) -> bytes:
        """The whole request as bytes."""
        parts = urlsplit(self.url)
        lines = [f"POST {parts.path}{self.path} HTTP/1.1", f"host: {parts.netloc}"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        lines += ["accept: text/event-stream, application/json", "content-type: application/json"]
        lines += [f"content-length: {len(body)}", "", ""]
        return "\r\n".join(lines).encode("latin-1") + body


@dataclass(slots=True)
class Job:
    """One request to send, prepared beforehand.

    `then` makes the job that may follow in the same conversation from how this one ended (None: the conversation is
    over). The `due_ns` of a job made so is on the monotonic clock, as the stamps of the exchange are, and may leave
    time for thinking. It must be picklable where several processes share a load.
    """

    request: bytes  # head and body, as they go over the wire
    prompt: int  # index of the item in the workload, for the report
    turn: int = 0  # of its conversation
    target: int = 0  # index into the plan's targets
    due_ns: int | None = None  # after the load's start; None: as soon as a stream is free
    wanted_tokens: int | None = None  # output tokens that it asks for
    then: Callable[[Exchange], Job | None] | None = None


@dataclass(slots=True)
class Exchange:
    """One request as it went over the wire."""

    job: Job
    due_ns: int | None = None  # when it was to be sent
    sent_ns: int = 0  # just before the write, on a connection that stands; `end_ns` where it never was
    end_ns: int = 0  # the last byte, or the failure
    response: Response | None = None
    failure: Failure | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A load, as data: it can be split among processes.

    Closed loop (`streams`): so many connections, each of which sends the next job when its last one has ended; when
    the jobs are due is not looked at.
    Open loop (`streams` None): every job has its `due_ns` and is sent then, whatever else is in flight.
    """

    targets: tuple[Target, ...]
    jobs: Sequence[Job]
    streams: int | None = None
    in_flight: int | None = None  # open loop: at most so many at once, what is due beyond it waits and is late
    ramp_s: float = 0.0  # closed loop: the streams start evenly over this time
    duration_s: float | None = None  # no job starts later; those in flight then still end and count
    repeat: bool = False  # closed loop with a duration: begin again at the first job when all are used up
    timeout_s: float = 120.0  # for one request, from its sending to its last byte
    kernel_stamps: bool = True  # stamps of the kernel's receive where it gives them, else taken on reading

    def split(self, parts: int) -> list[Plan]:
        """The same load as `parts` plans (fewer where there are fewer streams or jobs) that run side by side.

        Jobs are dealt out one by one, so that each part has its share of every moment of a schedule, and as many as
        its share of the streams.
        """
        parts = max(1, min(parts, len(self.jobs), self.streams or len(self.jobs), self.in_flight or len(self.jobs)))
        hands = parts if self.streams is None else self.streams
        return [
            replace(
                self,
                jobs=[job for at, job in enumerate(self.jobs) if at % hands % parts == part],
                streams=None if self.streams is None else _share(self.streams, parts, part),
                in_flight=None if self.in_flight is None else _share(self.in_flight, parts, part),
            )
            for part in range(parts)
        ]


@dataclass(slots=True)
class Load(Generic[R]):
    """What a load brought: a record of each request, and how the client fared. Loads of several processes merge."""

    records: list[R]
    started_ns: int
    wall_s: float
    cpu_s: float  # of the client's threads, during the load
    lags_ms: list[float]  # from a receive's kernel stamp to its reading (sampled); how late the loop ran without them
    late_ms: list[float]  # open loop: from when each job was due to when it was sent
    reconnects: int
    stamps: str = "kernel"  # or "user", or "mixed"
    processes: int = 1

    @classmethod
    def merged(cls, loads: Sequence[Load[R]]) -> Load[R]:
        """One load of those that were started together: records and samples joined, never averaged."""
        kinds = {load.stamps for load in loads}
        return cls(
            records=[record for load in loads for record in load.records],
            started_ns=min(load.started_ns for load in loads),
            wall_s=max(load.wall_s for load in loads),
            cpu_s=sum(load.cpu_s for load in loads),
            lags_ms=[lag for load in loads for lag in load.lags_ms],
            late_ms=[late for load in loads for late in load.late_ms],
            reconnects=sum(load.reconnects for load in loads),
            stamps=kinds.pop() if len(kinds) == 1 else "mixed",
            processes=sum(load.processes for load in loads),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """How a load stands while it runs."""

    elapsed_s: float
    in_flight: int
    ended: int
    failed: int  # of those that have ended; by HTTP's status or worse, as the answers are not read yet
    chunks: int  # about one a token

    @classmethod
    def joined(cls, watches: Sequence[Watch]) -> Watch:
        """That of processes which share a load."""
        return cls(
            elapsed_s=max(watch.elapsed_s for watch in watches),
            in_flight=sum(watch.in_flight for watch in watches),
            ended=sum(watch.ended for watch in watches),
            failed=sum(watch.failed for watch in watches),
            chunks=sum(watch.chunks for watch in watches),
        )


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a load. `load` has all that ended before it, and what was in flight as failures `interrupted`."""

    def __init__(self, load: Load[Any]) -> None:
        super().__init__("interrupted")
        self.load = load


def _share(whole: int, parts: int, part: int) -> int:
    """Of `whole` things dealt to `parts` hands, how many hand number `part` has."""
    return (whole - part + parts - 1) // parts
