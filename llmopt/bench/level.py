"""One level: what a subject is asked, the load that asks it, and what came back."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from llmopt.artifacts.outcome import Json, Progress
from llmopt.bench import preflight
from llmopt.bench.client import workers
from llmopt.bench.client.base import Interrupted, Load, Plan, Target, Watch
from llmopt.bench.endpoints import ENDPOINTS, Endpoint
from llmopt.bench.metrics.records import Record, read
from llmopt.bench.serving import Server, last_lines
from llmopt.bench.settings import BenchSettings, LoadShape, Subject
from llmopt.bench.workload.arrivals import arrivals_s, replay_s
from llmopt.bench.workload.jobs import jobs
from llmopt.bench.workload.source import Conversation, Source
from llmopt.errors import LlmoptError

if TYPE_CHECKING:
    from llmopt.bench.direct import Direct
    from llmopt.bench.metrics.figures import Level

_POOL = 512  # distinct conversations of a closed loop that ends by time
_NOWHERE = "http://in-process"  # where requests go that are sent nowhere
_FULL = 0.85  # of a core: a client process that takes more is given another beside it
_JUDGED_FROM_S = 1.0  # a shorter load is mostly its beginning


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a level sends, to every subject alike. `at_s` is when, of an open loop."""

    load: LoadShape
    warmup: Sequence[Conversation]
    measured: Sequence[Conversation]
    at_s: Sequence[float] | None
    repeat: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A subject that answers. `server` is the process that bench started for it, if it did; `direct`: no HTTP."""

    subject: Subject
    model: str
    urls: tuple[str, ...]
    server: Server | None = None
    direct: Direct | None = None  # in place of a server: the engine in a process without one

    @property
    def is_here(self) -> bool:
        """Whether it runs on this machine, so that what the machine tells is about it."""
        hosts = (urlsplit(url).hostname or "" for url in self.urls)
        return all(host == "localhost" or host.startswith("127.") or host == "::1" for host in hosts)


def prepare(settings: BenchSettings, load: LoadShape, source: Source, seed: int) -> Work:
    """Take from the source what this level sends: the warm-up first, then all that is measured."""
    # The first turns will do: later ones would be waited for as long as a user thinks.
    warmup = [replace(each, turns=each.turns[:1]) for each in source.take(settings.warmup)]
    if source.timed:
        source.rewind()  # a trace ends: every level and round begins with its first request
    count = settings.requests_at(load)
    if load.streams is not None:
        pool = _POOL if count is None else count
        return Work(load=load, warmup=warmup, measured=source.take(pool), at_s=None, repeat=count is None)
    if load.rate is not None:
        at_s = arrivals_s(
            settings.arrivals,
            load.rate,
            count=count,
            duration_s=settings.duration_s,
            burstiness=settings.burstiness,
            seed=seed,
            ramp_s=settings.ramp_s,
        )
        measured = source.take(len(at_s))
        return Work(load=load, warmup=warmup, measured=measured, at_s=at_s[: len(measured)], repeat=False)
    measured = source.take(source.size or 0 if count is None else count)
    times = replay_s([each.at_s or 0.0 for each in measured], speed=settings.speed) if measured else []
    last_s = settings.duration_s if settings.duration_s is not None else math.inf
    kept = [(each, at_s) for each, at_s in zip(measured, times, strict=True) if at_s < last_s]
    return Work(load=load, warmup=warmup, measured=[e for e, _ in kept], at_s=[at for _, at in kept], repeat=False)


@dataclass(slots=True)
class Loader:
    """Loads subjects, and remembers how many processes of the client that takes."""

    settings: BenchSettings
    progress: Progress
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)
    processes: int = field(init=False)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.processes = self.settings.processes or 1

    @property
    def endpoint(self) -> Endpoint:
        return ENDPOINTS[self.settings.endpoint]

    def warm_up(self, served: Served, work: Work) -> None:
        """Raises an error that says what the server has against the requests, if it answers none."""
        if not work.warmup:
            return
        load = self._drive(served, self._plan(served, work.warmup, min(work.load.streams or 4, len(work.warmup))), None)
        if any(record.failure is None for record in load.records):
            return
        if served.server is not None:
            served.server.check_alive(1.0)
        raise self._refusal(served, load.records[0])

    def measure(self, served: Served, work: Work, number: int) -> Level:
        """Load the subject; again with another process where the client's cores were not enough and more are there."""
        while True:
            level = self._measure(served, work, number)
            share = level.cpu_s / level.wall_s / level.processes if level.wall_s else 0.0
            most = len(os.sched_getaffinity(0))
            full = share > _FULL and level.wall_s >= _JUDGED_FROM_S
            if self.settings.processes is not None or not full or 2 * self.processes > most or served.direct:
                return level
            self.processes *= 2
            self.progress(f"one core was not enough ({share:.0%}): again with {self.processes} processes of the client")
            where = f"`{served.subject.name}` {work.load.label}"
            self.notes.append(
                f"{where}: measured again with {self.processes} processes of the client, and with prompts that the "
                "server had seen: a cache may have helped"
            )

    def _measure(self, served: Served, work: Work, number: int) -> Level:
        from llmopt.bench.metrics import telemetry

        about: dict[str, Json] = {"stage": "load", "subject": served.subject.name, "load": work.load.label}
        if self.settings.duration_s is not None:
            about["duration_s"] = self.settings.duration_s
        if not work.repeat:
            about["total"] = sum(len(each.turns) for each in work.measured)

        def watch(now: Watch) -> None:
            self.progress(
                "",
                **about,
                round=number,
                seconds=round(now.elapsed_s, 3),
                in_flight=now.in_flight,
                ended=now.ended,
                failed=now.failed,
                tokens=now.chunks,
            )

        def level(load: Load[Record]) -> Level:
            from llmopt.bench.metrics.figures import Level  # with numpy, so not before the load

            return Level(
                subject=served.subject.name,
                load=work.load,
                round=number,
                records=tuple(load.records),
                started_ns=load.started_ns,
                wall_s=load.wall_s,
                cpu_s=load.cpu_s,
                lags_ms=tuple(load.lags_ms),
                late_ms=tuple(load.late_ms),
                reconnects=load.reconnects,
                stamps=load.stamps,
                processes=load.processes,
                window_ns=self._window_ns(load),
                server=told.result(),
            )

        plan = self._plan(served, work.measured, work.load.streams, work)
        urls = [telemetry.metrics_url(url, self.settings.endpoint) for url in served.urls]
        try:
            with telemetry.watching(urls, machine=served.is_here, headers=plan.targets[0].headers) as told:
                load = self._drive(served, plan, watch)
        except Interrupted as interrupted:
            raise PartialLevel(level(interrupted.load)) from None
        return level(load)

    def _drive(self, served: Served, plan: Plan, watch: Callable[[Watch], None] | None) -> Load[Record]:
        if served.direct is not None:
            return served.direct.drive(plan)
        try:
            load = workers.drive(
                plan, partial(read, endpoint=self.settings.endpoint), processes=self.processes, watch=watch
            )
        except Interrupted as interrupted:
            interrupted.load.records = [self._without_secrets(record) for record in interrupted.load.records]
            raise
        load.records = [self._without_secrets(record) for record in load.records]
        return load

    def _without_secrets(self, record: Record) -> Record:
        """Some servers repeat the key in their errors."""
        if record.failure is None:
            return record
        detail = preflight.redacted(record.failure.detail, self.secrets)
        return replace(record, failure=replace(record.failure, detail=detail))

    def _plan(
        self, served: Served, conversations: Sequence[Conversation], streams: int | None, work: Work | None = None
    ) -> Plan:
        headers = self.headers if served.server is None else ()
        path = self.endpoint.path_for(served.model)
        urls = served.urls or (_NOWHERE,)
        targets = tuple(Target(preflight.base_url(url), path, headers) for url in urls)
        at_ns = None if work is None or work.at_s is None else [round(at * 1e9) for at in work.at_s]
        settings = self.settings
        return Plan(
            targets=targets,
            jobs=jobs(conversations, endpoint=self.endpoint, model=served.model, targets=targets, arrivals_ns=at_ns),
            streams=streams,
            in_flight=settings.in_flight if work is not None else None,
            ramp_s=settings.ramp_s if work is not None and streams is not None else 0.0,
            duration_s=settings.duration_s if work is not None else None,
            repeat=work is not None and work.repeat,
            timeout_s=settings.timeout_s,
        )

    def _window_ns(self, load: Load[Record]) -> tuple[int, int] | None:
        """What counts of a load, from its start: not its warm-up and cool-down. None where all of it does."""
        warm_ns, cool_ns = (round(s * 1e9) for s in (self.settings.warmup_s, self.settings.cooldown_s))
        if not warm_ns and not cool_ns:
            return None
        last_ns = max((record.sent_ns for record in load.records), default=load.started_ns)
        return warm_ns, last_ns - load.started_ns - cool_ns + 1

    def _refusal(self, served: Served, first: Record) -> LlmoptError:
        """What to say of a server that answers no request of the warm-up."""
        url = served.urls[0] if served.urls else served.subject.name
        if first.status in (401, 403):
            return preflight.refused_key(url, first.status, any(name == "authorization" for name, _ in self.headers))
        path = self.endpoint.path_for(served.model)
        hint = {
            404: f"does it offer `{path}` and the model `{served.model}`? see `--endpoint` and `--model`",
            400: "lower `--prompt-tokens` or `--output-tokens` if they are more than the model's context",
            429: "it limits requests: lower the load, or raise the limit of the key",
        }.get(
            first.status,
            last_lines(served.server.log) if served.server is not None else "send it one request by hand",
        )
        assert first.failure is not None
        return LlmoptError(
            f"`{served.subject.name}` answers no request: {first.failure.kind} ({first.failure.detail})", hint=hint
        )


class PartialLevel(KeyboardInterrupt):
    """Ctrl-C during a load; `level` has what had come back."""

    def __init__(self, level: Level) -> None:
        super().__init__()
        self.level = level
