"""The order of a bench: for each round, for each subject, for each concurrency: warm up, load, check, record.

Subjects are loaded one at a time: an engine's server runs only while it is measured, so none takes memory or cores from
another, and a round sees a fresh one. Prompts are the same for all subjects of a round, and new in each round, for a
server at a URL may still have those of the last round in its prefix cache.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from llmopt.artifacts.outcome import Json, Outcome, Progress
from llmopt.bench import preflight
from llmopt.bench.client.base import Exchange, Load, Target
from llmopt.bench.client.loop import closed_loop
from llmopt.bench.endpoints import ENDPOINTS, Endpoint, body
from llmopt.bench.metrics import figures as metrics
from llmopt.bench.metrics import validity
from llmopt.bench.metrics.figures import Level
from llmopt.bench.metrics.records import Record, read
from llmopt.bench.report import files as report
from llmopt.bench.serving import Server, last_lines, serving
from llmopt.bench.settings import BenchSettings, Subject
from llmopt.bench.workload.prompts import Prompts
from llmopt.errors import LlmoptError, MeasurementInvalidError

_POOL = 512  # distinct prompts of a load that ends by time


def run(
    subjects: Mapping[str, Subject],
    settings: BenchSettings,
    out: Path,
    progress: Progress,
    command: Callable[[Path], Sequence[str]],
) -> Outcome:
    """See `llmopt.bench.measure`."""
    preflight.check(subjects, settings)
    bench = _Bench(subjects, settings, out, progress, command)
    report.prepare(out)
    environment = report.environment()
    try:
        bench.measure()
    except KeyboardInterrupt:
        bench.write(environment, invalid="interrupted")
        raise
    except LlmoptError as error:
        bench.write(environment, invalid=error.message)
        raise
    bench.write(environment, invalid=None)
    return bench.outcome()


@dataclass(frozen=True, slots=True)
class _Work:
    """What a level sends, to every subject alike."""

    streams: int
    warmup: list[str]
    prompts: list[str]
    repeat: bool


@dataclass(slots=True)
class _Bench:
    subjects: Mapping[str, Subject]
    settings: BenchSettings
    out: Path
    progress: Progress
    command: Callable[[Path], Sequence[str]]
    levels: list[Level] = field(default_factory=list)
    models: dict[str, str] = field(default_factory=dict)
    key: str | None = field(default_factory=preflight.api_key, repr=False)
    exact_prompts: bool = False

    @property
    def endpoint(self) -> Endpoint:
        return ENDPOINTS[self.settings.endpoint]

    def measure(self) -> None:
        for subject in self.subjects.values():
            if subject.url is not None:
                self.models[subject.name] = preflight.probe(subject.url, self.key, self.settings.model)
        source = self._prompt_source()
        rng = random.Random(self.settings.seed)
        for number in range(self.settings.rounds):
            work = [self._work(streams, source) for streams in self.settings.concurrency]
            order = list(self.subjects.values())
            rng.shuffle(order)
            for subject in order:
                self._measure_subject(subject, number, work)

    def write(self, environment: Mapping[str, Json], *, invalid: str | None) -> None:
        results = self.results()
        report.write(
            self.out,
            settings=self.settings,
            subjects=self.subjects,
            models=self.models,
            environment=environment,
            results=results,
            ratios=_ratios(results),
            notes=self.notes(),
            invalid=invalid,
        )

    def outcome(self) -> Outcome:
        results = self.results()
        figures: dict[str, Json] = {
            name: {at: metrics.compact(summary) for at, summary in levels.items()} for name, levels in results.items()
        }
        if ratios := _ratios(results):
            figures["ratio"] = ratios
        return Outcome(metrics=figures, events=tuple(self.notes()))

    def _prompt_source(self) -> Prompts:
        owner = next((s for s in self.subjects.values() if s.tokenizer_file is not None), None)
        source = Prompts(
            owner.tokenizer_file if owner else None,
            tokens=self.settings.prompt_tokens,
            seed=self.settings.seed,
            special=not self.endpoint.templated,
        )
        self.exact_prompts = source.exact and not self.endpoint.templated
        by = f"by the tokenizer of `{owner.name}`" if owner else "by their characters, as there is no tokenizer"
        self.progress(f"prompts of {self.settings.prompt_tokens} tokens {by}")
        return source

    def _work(self, streams: int, source: Prompts) -> _Work:
        requests = self.settings.requests_at(streams)
        return _Work(
            streams=streams,
            warmup=source.take(self.settings.warmup),
            prompts=source.take(_POOL if requests is None else requests),
            repeat=requests is None,
        )

    def _measure_subject(self, subject: Subject, number: int, work: Sequence[_Work]) -> None:
        with self._server(subject) as (url, server):
            target = self._target(subject, url)
            for item in work:
                self._warm_up(subject, target, server, item)
                load = self._load(subject, target, item.prompts, item.streams, item)
                level = Level(
                    subject=subject.name,
                    streams=item.streams,
                    round=number,
                    records=tuple(load.records),
                    wall_s=load.wall_s,
                    cpu_s=load.cpu_s,
                    lags_ms=tuple(load.lags_ms),
                    reconnects=load.reconnects,
                )
                self._keep(level, server)

    @contextmanager
    def _server(self, subject: Subject) -> Iterator[tuple[str, Server | None]]:
        if subject.url is not None:
            yield subject.url, None
            return
        if subject.engine is None:
            raise LlmoptError(f"`{subject.name}` is neither a URL nor an engine", hint="give one of them")
        self.progress(f"{subject.name}: starting its server")
        log = self.out / f"server-{subject.name}.log"
        with serving(subject.name, subject.engine, log, self.command) as server:
            self.models[subject.name] = preflight.probe(server.url, None, None)
            yield server.url, server

    def _target(self, subject: Subject, url: str) -> Target:
        headers = (("authorization", f"Bearer {self.key}"),) if self.key and subject.url is not None else ()
        return Target(preflight.base_url(url), self.endpoint.path, headers)

    def _warm_up(self, subject: Subject, target: Target, server: Server | None, work: _Work) -> None:
        """Raises an error that says what the server has against the requests, if it answers none."""
        if not work.warmup:
            return
        load = self._load(subject, target, work.warmup, min(work.streams, len(work.warmup)), None)
        if any(record.failure is None for record in load.records):
            return
        if server is not None:
            server.check_alive(1.0)
        first, model = load.records[0], self.models[subject.name]
        if first.status in (401, 403):
            raise preflight.refused_key(target.url, first.status, self.key)
        hint = {
            404: f"does it offer `{target.path}` and the model `{model}`? see `--endpoint` and `--model`",
            400: "lower `--prompt-tokens` or `--output-tokens` if they are more than the model's context",
        }.get(first.status, last_lines(server.log) if server is not None else "send it one request by hand")
        raise LlmoptError(f"`{subject.name}` answers no request: {validity.describe(load.records)}", hint=hint)

    def _load(
        self, subject: Subject, target: Target, prompts: Sequence[str], streams: int, timed: _Work | None
    ) -> Load[Record]:
        model = self.models[subject.name]
        bodies = [
            body(self.endpoint, model=model, prompt=prompt, output_tokens=self.settings.output_tokens)
            for prompt in prompts
        ]
        return closed_loop(
            target,
            bodies,
            self._read,
            streams=streams,
            timeout_s=self.settings.timeout_s,
            duration_s=self.settings.duration_s if timed else None,
            repeat=timed.repeat if timed else False,
        )

    def _read(self, exchange: Exchange) -> Record:
        record = read(exchange, self.endpoint)
        if record.failure is None:
            return record
        detail = preflight.redacted(record.failure.detail, self.key)
        return replace(record, failure=replace(record.failure, detail=detail))

    def _keep(self, level: Level, server: Server | None) -> None:
        """Write the level down; raises MeasurementInvalidError if it is not valid."""
        self.levels.append(level)
        report.append_requests(self.out, level)
        self.progress(
            f"{level.subject} c{level.streams}: {_line(level)}",
            stage="bench",
            done=len(self.levels),
            total=self.settings.rounds * len(self.subjects) * len(self.settings.concurrency),
            seconds=round(level.wall_s, 3),
            subject=level.subject,
            streams=level.streams,
            round=level.round,
        )
        failed = any(record.failure is not None for record in level.records)
        if server is not None:
            server.check_alive(1.0 if failed else 0.0)
        if reason := validity.invalid(level):
            hint = last_lines(server.log) if server is not None else "see to the cause and measure again"
            raise MeasurementInvalidError(reason, hint=hint)

    def results(self) -> dict[str, dict[str, dict[str, Json]]]:
        """subject -> "c4" -> its figures over all rounds, with those of each round when there are several."""
        found: dict[str, dict[str, dict[str, Json]]] = {}
        for (name, streams), levels in self._grouped().items():
            summary = metrics.summarise(levels)
            if len(levels) > 1:
                summary["rounds"] = [
                    {"round": level.round, **metrics.compact(metrics.summarise([level]))} for level in levels
                ]
            found.setdefault(name, {})[f"c{streams}"] = summary
        return found

    def notes(self) -> list[str]:
        found = []
        for (name, streams), levels in self._grouped().items():
            found += validity.notes(levels, self.settings, exact_prompts=self.exact_prompts)
            if self.settings.requests_at(streams) is None and any(len(level.records) > _POOL for level in levels):
                found.append(f"`{name}` c{streams}: prompts came again after {_POOL} requests; a cache may have helped")
        return found

    def _grouped(self) -> dict[tuple[str, int], list[Level]]:
        groups: dict[tuple[str, int], list[Level]] = {}
        for subject in self.subjects.values():
            for level in self.levels:
                if level.subject == subject.name:
                    groups.setdefault((level.subject, level.streams), []).append(level)
        return groups


def _ratios(results: Mapping[str, Mapping[str, Mapping[str, Json]]]) -> dict[str, Json]:
    """ "c4" -> candidate over baseline, where both were measured."""
    candidate, baseline = results.get("candidate", {}), results.get("baseline", {})
    return {
        at: metrics.ratios(metrics.compact(candidate[at]), metrics.compact(baseline[at]))
        for at in candidate
        if at in baseline
    }


def _line(level: Level) -> str:
    figures = metrics.compact(metrics.summarise([level]))
    ttft, itl = figures.get("ttft_ms_p50"), figures.get("itl_ms_p50")
    return (
        f"{figures['requests']} requests, {figures['errors']} errors, TTFT {ttft} ms, "
        f"ITL {itl} ms, {figures['tokens_per_s']} tokens/s"
    )
