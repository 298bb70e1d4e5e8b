"""The order of a bench: for each round, for each subject, for each level: warm up, load, check, record.

Subjects are loaded one at a time: an engine's server runs only while it is measured, so none takes memory or cores from
another, and a round sees a fresh one. What is asked is the same for all subjects of a round, and new in each round, for
a server at a URL may still have the prompts of the last round in its prefix cache.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.artifacts.outcome import Json, Outcome, Progress
from llmopt.bench import level, preflight
from llmopt.bench.level import Loader, PartialLevel, Served
from llmopt.bench.report import folder
from llmopt.bench.report.environment import environment
from llmopt.bench.serving import last_lines, serving
from llmopt.bench.settings import BenchSettings, LoadShape, Subject
from llmopt.bench.workload.source import Source, open_source
from llmopt.errors import LlmoptError, MeasurementInvalidError
from llmopt.profiles.settings import to_json

if TYPE_CHECKING:
    from llmopt.bench.gate.verdict import Judgement
    from llmopt.bench.metrics.figures import Level
    from llmopt.bench.metrics.records import Record
    from llmopt.bench.report.requests import Requests
    from llmopt.bench.sweep import Sweep


def run(
    subjects: Mapping[str, Subject],
    settings: BenchSettings,
    out: Path,
    progress: Progress,
    command: Callable[[Path], Sequence[str]],
    baseline: Path | None = None,
) -> Outcome:
    """See `llmopt.bench.measure`."""
    preflight.check(subjects, settings, baseline)
    bench = _Bench(subjects=subjects, settings=settings, out=out, progress=progress, command=command, baseline=baseline)
    try:
        bench.measure()
    except PartialLevel as partial:
        bench.add(partial.level)
        bench.write(invalid="interrupted")
        raise KeyboardInterrupt from None
    except KeyboardInterrupt:
        bench.write(invalid="interrupted")
        raise
    except LlmoptError as error:
        bench.write(invalid=error.message)
        raise
    return bench.write(invalid=None)


@dataclass(slots=True, kw_only=True)
class _Bench:
    subjects: Mapping[str, Subject]
    settings: BenchSettings
    out: Path
    progress: Progress
    command: Callable[[Path], Sequence[str]]
    baseline: Path | None  # a stored report
    loader: Loader = field(init=False)
    environment: dict[str, Json] = field(init=False)
    requests: Requests | None = None  # with the first level: numpy and pyarrow would hold up the first request
    levels: list[Level] = field(default_factory=list)
    models: dict[str, str] = field(default_factory=dict)
    judgement: Judgement | None = None
    sweep: Sweep | None = None
    notes: list[str] = field(default_factory=list)
    asked: dict[int, int | None] = field(default_factory=dict)  # tokens of each prompt, as the server should count them
    total: int | None = None  # levels in all, as far as can be known

    def __post_init__(self) -> None:
        folder.prepare(self.out)
        self.environment = environment()
        headers = preflight.headers_of(self.settings)
        self.loader = Loader(self.settings, self.progress, headers, preflight.secrets_of(headers))

    def measure(self) -> None:
        for subject in self.subjects.values():
            for url in subject.urls:
                self.models[subject.name] = preflight.probe(url, self.loader.headers, self.settings)
        source = self._open_source()
        if self.settings.sweep is not None:
            self._sweep(source)
        else:
            self._measure_rounds(source)

    def write(self, *, invalid: str | None) -> Outcome:
        """All files of the report, from whatever has been measured."""
        from llmopt.bench import findings
        from llmopt.bench.metrics.figures import CONVENTIONS, compact
        from llmopt.bench.report import files, words

        levels = self.levels if self.settings.sweep is None else sorted(self.levels, key=_size)
        found = findings.results(levels, self.settings)
        notes = [*self.notes, *self.loader.notes, *findings.notes(levels, self._asked)]
        if len(self.subjects) > 1 or self.baseline is not None:
            notes += findings.thin(self.levels, self.settings)
        report: dict[str, Json] = {
            "schema": folder.SCHEMA,
            "valid": invalid is None,
            "invalid_because": invalid,
            "settings": to_json(self.settings),
            "subjects": {subject.name: self._about(subject) for subject in self.subjects.values()},
            "results": {name: dict(at) for name, at in found.items()},
            "ratio": findings.ratios(found),
            "gate": None,
            "sweep": None if self.sweep is None else self.sweep.to_json(),
            "notes": [*notes],
            "environment": self.environment,
            "conventions": dict(CONVENTIONS),
        }
        judgement, problem = self.judgement, None
        if self.baseline is not None and invalid is None:
            try:
                judgement = findings.against_report(report, self.baseline, self.settings)
            except LlmoptError as error:  # what was measured is written down all the same
                problem = error
        gate: dict[str, Json] | None = None
        if invalid is None:
            gate = findings.gate(
                found,
                self.settings,
                judgement,
                self._held(),
                baseline=None if judgement is None else self.baseline,
                none_meets=self._none_meets,
            )
        report["gate"] = gate
        if self.requests is not None:
            self.requests.close()
        files.write(self.out, report)
        if problem is not None:
            raise problem
        figures: dict[str, Json] = {
            name: {at: compact(summary) for at, summary in levels.items()} for name, levels in found.items()
        }
        figures |= {key: report[key] for key in ("ratio", "sweep") if report[key]}
        if gate is not None:
            figures["gate"] = {key: gate[key] for key in ("verdict", "reason") if key in gate}
        return Outcome(metrics=figures, events=tuple(words.notes(report)))

    def _held(self) -> list[str] | None:
        """The levels that the thresholds are for: of a sweep, the largest load that meets them, else the smallest."""
        if self.sweep is None:
            return None
        best, settings = self.sweep.best, self.settings
        load = min(point.load for point in self.sweep.points) if best is None else best
        return [(settings.at_rate(load) if self.sweep.kind == "rate" else settings.at_streams(round(load))).label]

    @property
    def _none_meets(self) -> bool:
        """Whether a sweep has searched in vain."""
        return self.sweep is not None and self.sweep.best is None

    def _open_source(self) -> Source:
        owner = next((s for s in self.subjects.values() if s.tokenizer_file is not None), None)
        source = open_source(
            self.settings.workload,
            owner.tokenizer_file if owner else None,
            self.settings.seed,
            templated=self.loader.endpoint.templated,
        )
        self.notes += source.notes
        if not (owner is None and source.exact):  # texts of a file are as long as they are
            by = f"by the tokenizer of `{owner.name}`" if owner else "by their characters, as there is no tokenizer"
            self.progress(f"prompts are made to length {by}")
        return source

    def _measure_rounds(self, source: Source) -> None:
        loads = self.settings.loads(timed=source.timed)
        order, number = random.Random(self.settings.seed), 0
        for look, rounds in enumerate(self.settings.looks):
            self.total = rounds * len(self.subjects) * len(loads)
            while number < rounds:
                self._round(source, loads, order, number)
                number += 1
            if len(self.subjects) < 2:
                return
            from llmopt.bench import findings
            from llmopt.bench.gate.verdict import LEAST_ROUNDS

            if not self.settings.gate and rounds < LEAST_ROUNDS:
                return  # the ratios are told, and nothing is made of them
            self.judgement = findings.judge(self.levels, self.settings, look)
            if self.judgement.verdict != "inconclusive":
                return

    def _asked(self, record: Record) -> int | None:
        return self.asked.get(record.prompt) if record.turn == 0 else None

    def _prepare(self, load: LoadShape, source: Source, number: int) -> level.Work:
        work = level.prepare(self.settings, load, source, self.settings.seed + number)
        if source.exact and not self.loader.endpoint.templated:
            self.asked |= {each.number: each.turns[0].prompt_tokens for each in work.measured}
        return work

    def _round(self, source: Source, loads: Sequence[LoadShape], order: random.Random, number: int) -> None:
        works = [self._prepare(load, source, number) for load in loads]
        subjects = list(self.subjects.values())
        order.shuffle(subjects)
        for subject in subjects:
            with self._serve(subject) as served:
                for work in works:
                    self.loader.warm_up(served, work)
                    self._keep(served, work, self.loader.measure(served, work, number))

    def _sweep(self, source: Source) -> None:
        """Loads of the one subject, each chosen by what those before it have shown."""
        from llmopt.bench import findings
        from llmopt.bench.gate import slo
        from llmopt.bench.metrics import validity
        from llmopt.bench.metrics.figures import compact
        from llmopt.bench.sweep import Kind, Measured, sweep

        settings = self.settings
        (subject,) = self.subjects.values()
        with self._serve(subject) as served:

            def measure(size: float) -> Measured:
                shape = settings.at_rate(size) if settings.sweep == "rate" else settings.at_streams(round(size))
                work = self._prepare(shape, source, len(self.levels))
                self.loader.warm_up(served, work)
                found = self.loader.measure(served, work, len(self.levels))
                self.add(found)
                figures = compact(findings.summarised([found], settings))
                meets = not slo.broken(settings.slos, figures) if settings.slos else None
                return Measured(figures=figures, valid=validity.invalid(found) is None, meets=meets)

            kind: Kind = "rate" if settings.sweep == "rate" else "streams"
            since_due = kind == "rate"
            self.sweep = sweep(measure, kind=kind, latency="e2e_scheduled_ms_p50" if since_due else "e2e_ms_p50")

    @contextmanager
    def _serve(self, subject: Subject) -> Iterator[Served]:
        if subject.urls:
            yield Served(subject=subject, model=self.models[subject.name], urls=subject.urls)
            return
        if subject.engine is None:
            raise LlmoptError(f"`{subject.name}` is neither a URL nor an engine", hint="give one of them")
        if self.settings.in_process:
            from llmopt.bench.direct import running

            self.models[subject.name] = subject.engine.name
            with running(subject.name, subject.engine, self.out / f"engine-{subject.name}.log") as direct:
                yield Served(subject=subject, model=subject.engine.name, urls=(), direct=direct)
            return
        self.progress(f"{subject.name}: starting its server")
        log = self.out / f"server-{subject.name}.log"
        with serving(subject.name, subject.engine, log, self.command) as server:
            self.models[subject.name] = preflight.probe(server.url, (), self.settings)
            yield Served(subject=subject, model=self.models[subject.name], urls=(server.url,), server=server)

    def _keep(self, served: Served, work: level.Work, measured: Level) -> None:
        """Write the level down; raises MeasurementInvalidError if it is not valid."""
        from llmopt.bench.metrics import validity

        self.add(measured)
        begun = [record.prompt for record in measured.records if record.turn == 0]
        if len(set(begun)) < len(begun):
            self.notes.append(
                f"`{measured.subject}` {measured.load.label}: prompts came again after {len(set(begun))} requests; "
                "a cache may have helped"
            )
        server = served.server
        failed = any(record.failure is not None for record in measured.records)
        if server is not None:
            server.check_alive(1.0 if failed else 0.0)
        if reason := validity.invalid(measured):
            hint = last_lines(server.log) if server is not None else validity.hint(measured)
            raise MeasurementInvalidError(reason, hint=hint)

    def add(self, measured: Level) -> None:
        """Write the requests of a level down, and say what came of it."""
        from llmopt.bench.report.requests import Requests

        if self.requests is None:
            self.requests = Requests(self.out)
        self.levels.append(measured)
        self.requests.append(measured)
        self._say(measured)

    def _say(self, measured: Level) -> None:
        from llmopt.bench import findings
        from llmopt.bench.metrics.figures import compact
        from llmopt.bench.report.words import number

        figures = compact(findings.summarised([measured], self.settings))
        told = {name: number(figures.get(name)) for name in ("ttft_ms_p50", "itl_ms_p50", "tokens_per_s")}
        self.progress(
            f"{measured.subject} {measured.load.label}: {figures['requests']} requests, {figures['errors']} errors, "
            f"TTFT {told['ttft_ms_p50']} ms, ITL {told['itl_ms_p50']} ms, {told['tokens_per_s']} tokens/s",
            stage="bench",
            done=len(self.levels),
            **({} if self.total is None else {"total": self.total}),
            seconds=round(measured.wall_s, 3),
            subject=measured.subject,
            load=measured.load.label,
            round=measured.round,
        )

    def _about(self, subject: Subject) -> dict[str, Json]:
        about: dict[str, Json] = {"model": self.models.get(subject.name), "lineage": [dict(x) for x in subject.lineage]}
        if subject.url is not None:
            about["url"] = subject.url
        if subject.engine is not None:
            about["engine"] = subject.engine.name
        if subject.artifact is not None:
            about["artifact"] = subject.artifact
        return about


def _size(level: Level) -> float:
    """How much was asked of the client."""
    return level.load.streams or level.load.rate or 0.0
