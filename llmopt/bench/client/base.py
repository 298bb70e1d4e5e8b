"""What the client is given and what it brings back. Stamps are nanoseconds of the monotonic clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar
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
    over); its `due_ns` may leave time for thinking. It must be picklable where several processes share a load.
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
    due_ns: int | None  # when it was to be sent
    sent_ns: int  # just before the write, on a connection that stands
    end_ns: int  # the last byte, or the failure
    response: Response | None
    failure: Failure | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A load, as data: it can be split among processes.

    Closed loop (`streams`): so many connections, each of which sends the next job when its last one has ended.
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
        """The same load as `parts` plans (fewer where there are fewer streams or jobs) that run side by side."""
        raise NotImplementedError


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
        """One load of those that ran side by side, on one machine or on many: records joined, never averaged."""
        raise NotImplementedError
