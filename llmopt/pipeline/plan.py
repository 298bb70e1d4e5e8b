"""`llmopt run`: a pipeline becomes a chain of stages, each an action that is in the store already or has to be done."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmopt import profiles
from llmopt.artifacts.outcome import Json, Progress, within
from llmopt.errors import BackendMissingError, SettingsError, nearest
from llmopt.pipeline import inputs, runner, stages
from llmopt.pipeline.explain import distinct_results, explain
from llmopt.pipeline.inputs import Input
from llmopt.pipeline.runner import Stage, StageResult

if TYPE_CHECKING:
    from llmopt.artifacts.store import Store
    from llmopt.compilers.trt_llm.builder import Builder


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """What to do with which model; every section holds settings that its stage takes.

    notes: what the file that it was read from says that is not carried, or otherwise.
    """

    name: str
    model: str
    sections: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> tuple[str, ...]:
        """What there is to do, in this order."""
        base = ("compile-base",) if self.sections.get("bench", {}).get("against") == "base" else ()
        steps = {"quantize": (), "compile": base, "eval": (), "bench": ()}
        return tuple(step for name, more in steps.items() if name in self.sections for step in (name, *more))


@dataclass(frozen=True, kw_only=True)
class Step:
    """One stage of a run: its result, or what is known of it without doing it."""

    name: str
    op: str | None = None
    key: str | None = None  # None: it depends on an artifact that is not there yet
    waits_for: str | None = None  # the step that makes that artifact
    result: StageResult | None = None
    differs: tuple[str, ...] = ()  # from the nearest stored action: why this one is not a hit
    results: tuple[str, ...] = ()  # all that the same action has given, where they are several: not reproducible

    def to_json(self) -> dict[str, Json]:
        about: dict[str, Json] = {"stage": self.name, "op": self.op, "action": self.key, "cached": False}
        if self.waits_for:
            about["waits_for"] = self.waits_for
        if self.differs:
            about["differs"] = list(self.differs)
        if self.results:
            about["results"] = list(self.results)
        return about | (self.result.to_json() if self.result else {})


@dataclass(frozen=True, kw_only=True)
class Run:
    """What became of a pipeline. `model_bytes` is the size of the model that it started from."""

    pipeline: str
    model_bytes: int
    steps: Sequence[Step]

    def step(self, name: str) -> Step | None:
        return next((step for step in self.steps if step.name == name), None)

    def metrics(self, name: str) -> Mapping[str, Json]:
        """Of the step's result; empty where there is none."""
        step = self.step(name)
        return step.result.metrics if step is not None and step.result is not None else {}


@dataclass(frozen=True, slots=True)
class _Pending:
    """In place of an input: the artifact that `step` has not made yet."""

    step: str


def load(reference: str, overrides: Sequence[str] = ()) -> Pipeline:
    """Read a pipeline file, a shipped profile or LMI's serving.properties, apply `key.sub=value` overrides and check
    every setting."""
    profile, notes = _read(reference)
    for override in overrides:
        profile = _override(profile, override)
    if profile.model is None:
        said = "option.model_id=" if reference.endswith(".properties") else "model:"
        raise SettingsError(
            f"the pipeline `{reference}` names no model", hint=f"`--set model=FOLDER`, or write `{said}` in it"
        )
    sections = profile.sections
    if not sections:
        raise SettingsError(f"the pipeline `{reference}` has no stage", hint=nearest("", profiles.SECTIONS))
    for name in sections:
        resolved(profile, name)
    if "bench" in sections and "compile" not in sections:
        raise SettingsError("`bench` measures an engine, and nothing compiles one", hint="add a section `compile:`")
    pipeline = Pipeline(name=profile.name, model=profile.model, sections=sections, notes=notes)
    if "compile-base" in pipeline.steps and "quantize" not in sections:
        raise SettingsError("`bench.against: base` needs a quantized model to set against it", hint="add `quantize:`")
    return pipeline


def run(
    store: Store,
    pipeline: Pipeline,
    progress: Progress,
    *,
    dry_run: bool = False,
    why: bool = False,
    keep: Callable[[str, Path], None] | None = None,
    builder: Builder | None = None,
    deny: Sequence[str] = (),
) -> Run:
    """Do every stage that the store has no result of, or with `dry_run` only say which those are.

    `why` finds out what separates a miss from what the store has. `keep` is that of `runner.execute`, called with the
    step's name too. `builder` is what builds the engines of a staged target here. An input whose licence `deny` names
    is refused before the first stage, whether or not what it would make is in the store.
    """
    for note in pipeline.notes:
        progress(note)
    chain = _Chain(store, progress, dry_run=dry_run, why=why, keep=keep, builder=builder, deny=deny)
    steps, sections = pipeline.steps, pipeline.sections
    source = inputs.model(store, pipeline.model, progress, deny=deny)
    base: Input | _Pending = source
    model = base
    engines: dict[str, Input | _Pending] = {}
    if "quantize" in steps:
        model = chain.quantize(source, sections["quantize"])
    if "compile" in steps:
        engines["candidate"] = chain.compile("compile", model, sections["compile"])
    if "compile-base" in steps:
        engines["baseline"] = chain.compile("compile-base", base, sections["compile"])
    if "eval" in steps:
        pair = (model, base) if "quantize" in steps else (model,)
        chain.step("eval", lambda model, base=None: stages.evaluate(model, base, sections["eval"]), *pair)
    if "bench" in steps:
        chain.step(
            "bench",
            lambda *loads: stages.bench(
                dict(zip(engines, loads, strict=True)),
                sections["bench"],
                baseline=inputs.report(store, sections["bench"].get("baseline")),
                store=store,
            ),
            *engines.values(),
        )
    return Run(pipeline=pipeline.name, model_bytes=source.bytes, steps=chain.steps)


def compile_model(
    store: Store,
    model: Input,
    settings: Mapping[str, Any],
    progress: Progress,
    *,
    builder: Builder | None = None,
) -> StageResult:
    """The engine of `llmopt compile`; one of a staged target is built only where there is a `builder` and its device.

    Where these are not what it needs, that is told, and the engine stays prepared.
    """
    if not stages.is_staged(settings):
        return runner.run(store, stages.compile_(model, settings), progress)
    made = inputs.product(runner.run(store, stages.compile_plan(model, settings), progress))
    prepared = runner.run(store, stages.compile_prepare(model, made, settings), progress)
    if builder is None:
        return prepared
    try:
        return build_engine(store, inputs.product(prepared), builder, progress)
    except BackendMissingError as error:
        progress(f"not built: {error.message}")
        return prepared


def build_engine(store: Store, prepared: Input, builder: Builder, progress: Progress) -> StageResult:
    """The engine of a prepared artifact, built on this machine."""
    return runner.run(store, stages.compile_build(prepared, builder), progress)


def quantize_stage(
    store: Store,
    source: Input,
    settings: Mapping[str, Any],
    progress: Progress,
    *,
    memory_bytes: int | None = None,
    deny: Sequence[str] = (),
) -> Stage:
    """The stage of `llmopt quantize`, once its calibration set is in the store; `deny` as in `run`."""
    calibration = stages.calibration_source(store, settings, progress)
    adapter = stages.adapter(settings, progress)
    inputs.refuse_denied((source, adapter, calibration), deny)
    if calibration is not None and calibration.kind != "calibration":
        made = runner.run(store, stages.calibrate(source, calibration, settings, adapter=adapter), progress)
        calibration = inputs.product(made)
    return stages.quantize(source, settings, calibration, adapter, memory_bytes=memory_bytes)


class _Chain:
    def __init__(
        self,
        store: Store,
        progress: Progress,
        *,
        dry_run: bool,
        why: bool,
        keep: Callable[[str, Path], None] | None,
        builder: Builder | None,
        deny: Sequence[str],
    ) -> None:
        self.steps: list[Step] = []
        self._builder, self._deny = builder, deny
        self._store, self._progress, self._dry_run, self._why, self._keep = store, progress, dry_run, why, keep

    def quantize(self, source: Input, settings: Mapping[str, Any]) -> Input | _Pending:
        """Two steps where there is a text to calibrate on, else one."""
        texts = stages.calibration_source(self._store, settings, self._progress)
        adapter = stages.adapter(settings, self._progress)
        inputs.refuse_denied((source, adapter, texts), self._deny)
        needs: list[Input | _Pending] = [source]
        if texts is not None and texts.kind == "calibration":
            needs.append(texts)
        elif texts is not None:
            needs.append(
                self.step("calibrate", lambda base: stages.calibrate(base, texts, settings, adapter=adapter), source)
            )

        def make(base: Input, calibration: Input | None = None) -> Stage:
            return stages.quantize(base, settings, calibration, adapter)

        return self.step("quantize", make, *needs)

    def compile(self, name: str, model: Input | _Pending, settings: Mapping[str, Any]) -> Input | _Pending:
        """One step; of a staged target up to three, of which the last needs a builder and its device.

        What could only be prepared cannot be measured: whatever comes after waits for the build.
        """
        if not stages.is_staged(settings):
            return self.step(name, lambda model: stages.compile_(model, settings), model)
        made = self.step(f"{name}-plan", lambda model: stages.compile_plan(model, settings), model)
        prepared = self.step(name, lambda model, made: stages.compile_prepare(model, made, settings), model, made)
        builder = self._builder
        if builder is None:
            return _Pending(f"{name}-build")
        try:
            return self.step(f"{name}-build", lambda prepared: stages.compile_build(prepared, builder), prepared)
        except BackendMissingError as error:
            self._progress(f"{name}: not built: {error.message}")
            return _Pending(f"{name}-build")

    def step(self, name: str, make: Callable[..., Stage], *needs: Input | _Pending) -> Input | _Pending:
        """Do, find or only describe one stage; what comes back is the input of the next."""
        step, product = self._take(name, make, needs)
        self.steps.append(step)
        return product

    def _take(
        self, name: str, make: Callable[..., Stage], needs: Sequence[Input | _Pending]
    ) -> tuple[Step, Input | _Pending]:
        for need in needs:
            if isinstance(need, _Pending):
                return Step(name=name, waits_for=need.step), _Pending(name)
        stage = make(*needs)
        op, key = stage.action.op, stage.action.key
        result = runner.find(self._store, stage, self._progress)
        differs = explain(self._store, stage.action) if self._why and result is None else ()
        if result is None and self._dry_run:
            stage.check()
            return Step(name=name, op=op, key=key, differs=differs), _Pending(name)
        if result is None:
            for line in differs:
                self._progress(f"{name}: {line}")
            keep = None if self._keep is None else partial(self._keep, name)
            result = runner.execute(self._store, stage, within(self._progress, name, step=name), keep=keep)
        results = distinct_results(self._store, stage.action)
        step = Step(name=name, op=op, key=key, differs=differs, result=result, results=results)
        return step, inputs.product(result)


def _read(reference: str) -> tuple[profiles.Profile, tuple[str, ...]]:
    """The profile, and what is to be told of how it was read."""
    if not reference.endswith(".properties"):
        return profiles.load(reference), ()
    from llmopt.compilers.deploy import lmi_read

    read = lmi_read.read(reference)
    return read.profile, read.notes


def _override(profile: profiles.Profile, override: str) -> profiles.Profile:
    """`quantize.bits=3`, `compile.build.workers=2` or `model=demo/model`; a path is relative to the current folder."""
    path, equals, text = override.partition("=")
    section, dot, key = path.partition(".")
    if not equals or (dot and not all(key.split("."))):
        raise SettingsError(f"`--set {override}` is not `key=value`", hint="for example `--set quantize.bits=3`")
    if path == "model":
        return dataclasses.replace(profile, model=text)
    if section not in profiles.SECTIONS:
        known = ["model", *(f"{name}.{key}" for name, values in profile.sections.items() for key in values)]
        raise SettingsError(f"`--set {override}`: a pipeline has no section `{section}`", hint=nearest(path, known))
    if not dot:
        raise SettingsError(f"`--set {override}` names no setting", hint=f"for example `--set {section}.key=value`")
    sections = {name: dict(values) for name, values in profile.sections.items()}
    sections[section] = profiles.assign(sections.get(section, {}), key, text)
    return dataclasses.replace(profile, sections=sections, origins={**profile.origins, path: f"--set {path}"})


def resolved(profile: profiles.Profile, section: str) -> dict[str, Json]:
    """The section with every default; what its stage would refuse is refused, with the file and line it is in."""
    values = profile.section(section)
    try:
        if section == "bench" and values.get("against", "base") != "base":
            raise SettingsError(f"`bench.against` cannot be `{values['against']}`", hint="known: `base`")
        return stages.settings_of(section, values)
    except SettingsError as error:
        named = (key for key in values if f"`{key}`" in error.message or f".{key}`" in error.message)
        origin = profile.origins.get(f"{section}.{next(named, None)}", profile.origins.get(section))
        raise SettingsError(f"{origin}: {error.message}" if origin else error.message, hint=error.hint) from None
