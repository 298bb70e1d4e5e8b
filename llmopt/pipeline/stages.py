"""The stages, each as the action that it is: what goes in, with which settings, and the function that does it.

Making a Stage checks its settings and works out its key; nothing else happens before `runner.run` finds that the store
has no result for that key. So a misspelt setting is always an error, and a hit costs no look into the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmopt.artifacts.digest import sha256_file
from llmopt.artifacts.manifest import Action, canonical_json
from llmopt.artifacts.outcome import Json, Outcome, Progress
from llmopt.errors import LlmoptError, SettingsError
from llmopt.pipeline import inputs, machine, provenance
from llmopt.pipeline.inputs import Input
from llmopt.pipeline.runner import Stage
from llmopt.profiles import CALIBRATION_TEXT, HELDOUT_TEXT
from llmopt.profiles.settings import to_json

if TYPE_CHECKING:
    from llmopt.artifacts.store import Store
    from llmopt.bench import Subject
    from llmopt.calibrate import Calibration, CalibrationSettings
    from llmopt.compilers.base import Staged, Target
    from llmopt.compilers.trt_llm.builder import Builder
    from llmopt.quantizers import QuantizeSettings

#: Keys of a section that name an input of the stage and are no setting of it.
REFERENCES: Mapping[str, tuple[str, ...]] = {
    "quantize": ("calib", "calib_field", "adapter"),
    "compile": (),
    "eval": ("text", "tasks_path"),
    "bench": ("against", "baseline"),
}
#: The serving stack's versions: they are in a measurement as the cores are.
_SERVING = ("openvino", "openvino-genai", "uvicorn")


def calibration_source(store: Store, settings: Mapping[str, Any], progress: Progress) -> Input | None:
    """What a `quantize` calibrates on, by default the text shipped: a set, or what `calibrate` makes one of.

    None for a method that needs none.
    """
    from llmopt import quantizers

    if not quantizers.resolve(_own("quantize", settings)).needs_calibration:
        return None
    return inputs.calibration(store, str(settings.get("calib") or CALIBRATION_TEXT), progress)


def adapter(settings: Mapping[str, Any], progress: Progress) -> Input | None:
    """The LoRA adapter that a `quantize` merges first, if any."""
    reference = settings.get("adapter")
    if reference is None:
        return None
    if settings.get("method") == "convert":
        raise SettingsError(
            "an adapter cannot be merged into integers that are only converted",
            hint="quantize the checkpoint that they were made from, with the adapter",
        )
    return inputs.adapter(str(reference), progress)


def calibrate(model: Input, source: Input, settings: Mapping[str, Any], *, adapter: Input | None = None) -> Stage:
    """The calibration set for a `quantize` with these settings; of the model, only the tokenizer is in its key.

    Its check is also that of the model, as far as small files tell, so that nothing is tokenized in vain.
    """
    from llmopt import calibrate, quantizers

    inputs.require(model, "quantize", "model", "quantized-model")
    resolved = quantizers.resolve(_own("quantize", settings))
    assert isinstance(resolved, quantizers.QuantizeSettings)  # a conversion needs no calibration set
    own = _calibration_settings(model, source, settings, resolved)
    template = _template_id(model.path) if own.packing == "rows" else None
    ids = {"tokenizer": tokenizer_id(model.path), **_ids(data=source)} | (
        {} if template is None else {"chat_template": template}
    )
    base = None if adapter is None else adapter.path

    @cache
    def made() -> Calibration:
        return calibrate.make(model.path, source.files, own)

    def check() -> None:
        quantizers.check_model(model.path, resolved, adapter=base)
        made()

    def produce(out: Path, progress: Progress) -> Outcome:
        about: dict[str, Json] = {"inputs": dict(ids), **to_json(own)}
        return calibrate.write(made(), about, out, progress)

    return Stage(
        kind="calibration",
        action=Action(
            op="calibrate",
            op_version=calibrate.OP_VERSION,
            inputs=ids,
            settings=to_json(own),
            code=provenance.code_digest("calibrate"),
            deps=provenance.versions(calibrate.deps(own, chat=template is not None)),
            target={},
        ),
        check=check,
        produce=produce,
    )


def _calibration_settings(
    model: Input, source: Input, settings: Mapping[str, Any], resolved: QuantizeSettings
) -> CalibrationSettings:
    from llmopt import calibrate

    common, field, rows = resolved.common, settings.get("calib_field"), source.kind == "rows"
    if field is not None and not rows:
        raise SettingsError(
            f"`calib_field` is of a file with rows, and `{source.label}` is a plain text",
            hint="give a .jsonl or .parquet file, or leave it out",
        )
    return calibrate.CalibrationSettings(
        samples=common.samples,
        seq_len=common.seq_len,
        seed=common.seed,
        packing="rows" if rows else "text",
        field=None if field is None else str(field),
        eos_token_id=calibrate.eos_token_id(model.path) if rows else None,
    )


def tokenizer_id(model: Path) -> str:
    """The digest of a model's tokenizer.json."""
    file = model / "tokenizer.json"
    if not file.is_file():
        raise LlmoptError(
            f"no `tokenizer.json` in `{model}`",
            hint="save the tokenizer with transformers' `AutoTokenizer.from_pretrained(...).save_pretrained(...)`",
        )
    return f"sha256:{sha256_file(file)}"


def _template_id(model: Path) -> str | None:
    from llmopt.models.chat import TemplateSource

    source = TemplateSource.read(model)
    if source is None:
        return None
    return f"sha256:{hashlib.sha256(canonical_json([source.text, dict(source.special_tokens)])).hexdigest()}"


def quantize(
    model: Input,
    settings: Mapping[str, Any],
    calibration: Input | None = None,
    adapter: Input | None = None,
    *,
    memory_bytes: int | None = None,
    bfloat16: bool | None = None,
) -> Stage:
    """A quantized model from a checkpoint and, for a method that needs one, a calibration set.

    `memory_bytes` bounds what this process takes, and changes no bytes. `bfloat16` says whether products are of BF16
    factors, by default where this machine is fast at it and the settings leave it to it.
    """
    from llmopt import quantizers

    resolved = quantizers.resolve(_own("quantize", settings))
    if not resolved.needs_calibration:
        calibration = None
    if calibration is not None:
        resolved = quantizers.resolve(_own("quantize", settings) | _size_of(calibration, settings))
    inputs.require(model, "quantize", "model", "quantized-model")
    path = None if calibration is None else calibration.path
    merged = None if adapter is None else adapter.path
    if bfloat16 is None:
        bfloat16 = resolved.needs_calibration and resolved.common.precision == "auto" and machine.has_bfloat16()
    execution = quantizers.Execution(bfloat16=bfloat16, memory_bytes=memory_bytes)
    return Stage(
        kind="quantized-model",
        action=Action(
            op=f"quantize.{resolved.common.method}",
            op_version=quantizers.OP_VERSION,
            inputs=_ids(model=model, calibration=calibration, adapter=adapter),
            settings=resolved.to_json(),
            code=provenance.code_digest("quantize"),
            deps=provenance.versions(quantizers.deps(resolved)),
            target=machine.arithmetic() | {"products": "bfloat16" if bfloat16 else "float32"},
        ),
        check=lambda: quantizers.check(model.path, resolved, path, execution, adapter=merged),
        produce=lambda out, progress: quantizers.quantize(
            model.path, resolved, path, out, progress, execution, adapter=merged
        ),
        resumable=True,
    )


def _size_of(calibration: Input, settings: Mapping[str, Any]) -> dict[str, int]:
    """The size of a calibration set, which is what the settings mean where they do not say another."""
    from llmopt.calibrate import read_about

    about = read_about(calibration.path)
    size = {name: int(about[name]) for name in ("samples", "seq_len")}
    for name, value in size.items():
        if settings.get(name, value) != value:
            raise SettingsError(
                f"`{name}` cannot be {settings[name]}: the calibration set `{calibration.label}` has {value}",
                hint=f"leave `{name}` out, or calibrate on a text",
            )
    return size


def compile_(model: Input, settings: Mapping[str, Any]) -> Stage:
    """An engine from a checkpoint, plain or quantized, for a target that makes it in one go."""
    from llmopt import compilers
    from llmopt.compilers.base import Direct

    target = compilers.resolve(settings)
    assert isinstance(target, Direct)
    return _compile(
        "",
        target,
        {"model": model},
        check=lambda: compilers.check(model.path, target),
        produce=lambda out, progress: compilers.compile_model(model.path, target, out, progress),
    )


def compile_plan(model: Input, settings: Mapping[str, Any]) -> Stage:
    """What an engine of a staged target will be, what it takes and which device it needs."""
    target = _staged(settings)
    return _compile(
        ".plan",
        target,
        {"model": model},
        check=lambda: target.check(model.path),
        produce=lambda out, progress: target.plan(model.path, out, progress),
    )


def compile_prepare(model: Input, plan: Input, settings: Mapping[str, Any]) -> Stage:
    """A prepared engine, from the checkpoint and its plan."""
    target = _staged(settings)
    return _compile(
        "",
        target,
        {"model": model, "plan": plan},
        check=lambda: target.check(model.path),
        produce=lambda out, progress: target.prepare(model.path, plan.path, out, progress),
    )


def compile_build(prepared: Input, builder: Builder) -> Stage:
    """The engine that a prepared artifact is for, built on this machine's GPU by the software that `builder` names.

    Its key has that software and the GPU, so both are looked at here. Raises BackendMissingError where they are not
    what the artifact needs.
    """
    from llmopt import compilers
    from llmopt.compilers.trt_llm import build, target

    inputs.require(prepared, "compile --resume", "engine")
    cache = None if builder.timing_cache is None else inputs.text(builder.timing_cache, kind="timing cache")
    site = build.Site.find(prepared.path, builder)
    device = {"gpu": site.gpus[0].name, "arch": site.gpus[0].architecture, "driver": site.gpus[0].driver}
    return Stage(
        kind="engine",
        action=Action(
            op="compile.tensorrt-llm.build",
            op_version=compilers.OP_VERSION,
            inputs=_ids(prepared=prepared, timing_cache=cache),
            settings={},
            code=provenance.code_digest("compile.tensorrt-llm"),
            deps={name: version for name, version in site.versions.items() if version is not None},
            target={name: value for name, value in device.items() if value is not None},
        ),
        check=lambda: None,
        produce=lambda out, progress: target.build(site, out, progress),
    )


def is_staged(settings: Mapping[str, Any]) -> bool:
    """Whether the target is planned and prepared here, and built where its device is."""
    from llmopt import compilers
    from llmopt.compilers.base import Staged

    return isinstance(compilers.resolve(settings), Staged)


def _staged(settings: Mapping[str, Any]) -> Staged:
    from llmopt import compilers
    from llmopt.compilers.base import Staged

    target = compilers.resolve(settings)
    assert isinstance(target, Staged)
    return target


def _compile(
    part: str,
    target: Target,
    given: Mapping[str, Input],
    *,
    check: Callable[[], None],
    produce: Callable[[Path, Progress], Outcome],
) -> Stage:
    """One action of a compilation; what comes of a plan is `plan`, of anything else `engine`."""
    from llmopt import compilers

    inputs.require(given["model"], "compile", "model", "quantized-model")
    return Stage(
        kind="plan" if part else "engine",
        action=Action(
            op=f"compile.{target.target}{part}",
            op_version=compilers.OP_VERSION,
            inputs=_ids(**given),
            settings=to_json(target),
            code=provenance.code_digest(f"compile.{target.target}"),
            deps=provenance.versions(compilers.deps(target)),
            target={} if target.portable else machine.architecture(),
        ),
        check=check,
        produce=produce,
    )


def evaluate(model: Input, base: Input | None, settings: Mapping[str, Any]) -> Stage:
    """Perplexity of a model and its distance from a base; `text` in the settings is a file, as `calib` above.

    `tasks_path` is a folder with tasks of lm-evaluation-harness and their data: all that is in it is an input.
    """
    from llmopt import evaluate

    values = dict(settings)
    text, folder = inputs.text(values.pop("text", None) or HELDOUT_TEXT), values.pop("tasks_path", None)
    resolved = evaluate.resolve(values)
    if folder is not None and not resolved.tasks:
        raise SettingsError("`tasks_path` holds tasks, and none is asked for", hint="name them: `tasks: [mine]`")
    tasks = None if folder is None else inputs.tasks(folder)
    for each in (model, base):
        if each is not None:
            inputs.require(each, "eval", "model", "quantized-model")
    path, own = (None if each is None else each.path for each in (base, tasks))
    return Stage(
        kind="report",
        action=Action(
            op="eval",
            op_version=evaluate.OP_VERSION,
            inputs=_ids(model=model, base=base, text=text, tasks=tasks),
            settings=to_json(resolved),
            code=provenance.code_digest("eval"),
            deps=provenance.versions(evaluate.deps(resolved)),
            target=machine.arithmetic(),
        ),
        check=lambda: evaluate.check(model.path, path, text.path, resolved, tasks=own),
        produce=lambda out, progress: evaluate.evaluate(
            model.path, path, text.path, resolved, out, progress, tasks=own
        ),
    )


def bench(
    subjects: Mapping[str, Input | str],
    settings: Mapping[str, Any],
    *,
    tokenizer: Input | None = None,
    baseline: Input | None = None,
    store: Store | None = None,
) -> Stage:
    """A load test of engines and of servers (a URL), by the name each has in the report; for this machine only.

    `tokenizer`, a folder with tokenizer.json, makes prompts of an exact length for a server, as an engine's own does.
    `baseline` is a stored report to judge by; `store` knows what an engine was made from.
    """
    from llmopt import bench
    from llmopt.pipeline.lineage import lineage

    resolved = bench.resolve(_own("bench", settings))
    loads: dict[str, Subject] = {}
    for name, subject in subjects.items():
        if isinstance(subject, str):
            path = None if tokenizer is None else tokenizer.path
            loads[name] = bench.Subject(name=name, url=subject, tokenizer=path)
            continue
        inputs.require(subject, "bench", "engine")
        made_from = () if store is None else lineage(store, subject.id)
        loads[name] = bench.Subject(name=name, engine=subject.path, artifact=subject.id, lineage=made_from)
    engines = any(load.engine is not None for load in loads.values())
    file = resolved.workload.file
    workload = None if file is None else inputs.text(file, kind="workload")
    report = None if baseline is None else baseline.path
    return Stage(
        kind="report",
        action=Action(
            op="bench",
            op_version=bench.OP_VERSION,
            inputs={name: load.artifact or str(load.url) for name, load in loads.items()}
            | _ids(tokenizer=tokenizer, workload=workload, baseline_report=baseline),
            settings=_without_path(to_json(resolved)),
            code=provenance.code_digest("bench"),
            deps=provenance.versions(bench.deps(resolved)) | (_serving() if engines else {}),
            target=machine.fingerprint(),
        ),
        check=lambda: bench.check(loads, resolved, report),
        produce=lambda out, progress: bench.measure(loads, resolved, out, progress, baseline=report),
        repeatable=False,
    )


def import_bench(results: Sequence[Input], settings: Mapping[str, Any], *, baseline: Input | None = None) -> Stage:
    """A report from the result files of another load tester (several are rounds), judged as our own are."""
    from llmopt import bench

    resolved = bench.resolve(settings)
    paths, report = [result.path for result in results], None if baseline is None else baseline.path
    return Stage(
        kind="report",
        action=Action(
            op="bench.import",
            op_version=bench.OP_VERSION,
            inputs=_ids(
                **{f"result_{number}": result for number, result in enumerate(results)}, baseline_report=baseline
            ),
            settings={
                key: value
                for key, value in to_json(resolved).items()
                if key in ("slo", "gate", "gate_metrics", "margin", "alpha")
            },
            code=provenance.code_digest("bench"),
            deps=provenance.versions(("numpy",)),
            target={},
        ),
        check=lambda: bench.check_import(paths, resolved, report),
        produce=lambda out, progress: bench.import_results(paths, resolved, out, baseline=report),
        repeatable=False,  # it says when and where it was imported
    )


def _without_path(settings: dict[str, Json]) -> dict[str, Json]:
    """A workload's file is an input by its digest; where it lies is no setting."""
    workload = settings["workload"]
    file = workload.get("file") if isinstance(workload, dict) else None
    if not isinstance(workload, dict) or not isinstance(file, str):
        return settings
    return {**settings, "workload": {**workload, "file": Path(file).name}}


def _serving() -> dict[str, str]:
    """Versions of what serves the engines, as far as it is installed."""
    found = {name: provenance.installed(name) for name in _SERVING}
    return {name: version for name, version in found.items() if version is not None}


def _ids(**given: Input | None) -> dict[str, str]:
    """The digests of the inputs; where one was fetched, also from where: `model_source` beside `model`.

    So with its licence, where one is stated: `model_license`.
    """
    found: dict[str, str] = {}
    for name, given_input in given.items():
        if given_input is not None:
            more = {"source": given_input.source, "license": given_input.license}
            found[name] = given_input.id
            found |= {f"{name}_{about}": said for about, said in more.items() if said is not None}
    return found


def _own(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a section without its references."""
    return {key: value for key, value in values.items() if key not in REFERENCES[section]}


def settings_of(section: str, values: Mapping[str, Any]) -> dict[str, Json]:
    """The section with every default, its references included; SettingsError for what its stage does not take."""
    references = {key: values[key] for key in REFERENCES[section] if key in values}
    return _SETTINGS[section](_own(section, values)) | references


def _quantize_settings(values: Mapping[str, Any]) -> dict[str, Json]:
    from llmopt import quantizers

    return quantizers.resolve(values).to_json()


def _compile_settings(values: Mapping[str, Any]) -> dict[str, Json]:
    from llmopt import compilers

    return to_json(compilers.resolve(values))


def _eval_settings(values: Mapping[str, Any]) -> dict[str, Json]:
    from llmopt import evaluate

    return to_json(evaluate.resolve(values))


def _bench_settings(values: Mapping[str, Any]) -> dict[str, Json]:
    from llmopt import bench

    return to_json(bench.resolve(values))


_SETTINGS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Json]]] = {
    "quantize": _quantize_settings,
    "compile": _compile_settings,
    "eval": _eval_settings,
    "bench": _bench_settings,
}
