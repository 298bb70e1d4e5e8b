"""The four stages, each as the action that it is: what goes in, with which settings, and the function that does it.

Making a Stage checks its settings and works out its key; nothing else happens before `runner.run` finds that the store
has no result for that key. So a misspelt setting is always an error, and a hit costs no look into the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from llmopt.artifacts.manifest import Action
from llmopt.artifacts.outcome import Json
from llmopt.errors import SettingsError
from llmopt.pipeline import inputs, machine, provenance
from llmopt.pipeline.inputs import Input
from llmopt.pipeline.runner import Stage
from llmopt.profiles import CALIBRATION_TEXT, HELDOUT_TEXT
from llmopt.profiles.settings import to_json

if TYPE_CHECKING:
    from llmopt.bench import Subject

#: Keys of a section that name an input of the stage and are no setting of it.
REFERENCES: Mapping[str, tuple[str, ...]] = {
    "quantize": ("calib",),
    "compile": (),
    "eval": ("text", "tasks_path"),
    "bench": ("against",),
}
#: The serving stack's versions: they are in a measurement as the cores are.
_SERVING = ("openvino", "openvino-genai", "uvicorn")


def quantize(model: Input, settings: Mapping[str, Any]) -> Stage:
    """A quantized model from a checkpoint; `calib` in the settings is a text file, by default the one shipped."""
    from llmopt import quantizers

    values = dict(settings)
    text = values.pop("calib", None)
    resolved = quantizers.resolve(values)
    calibration = inputs.text(text or CALIBRATION_TEXT) if resolved.needs_calibration else None
    inputs.require(model, "quantize", "model", "quantized-model")
    path = None if calibration is None else calibration.path
    return Stage(
        kind="quantized-model",
        action=Action(
            op=f"quantize.{resolved.common.method}",
            op_version=quantizers.OP_VERSION,
            inputs=_ids(model=model, calibration=calibration),
            settings=resolved.to_json(),
            code=provenance.code_digest("quantize"),
            deps=provenance.versions(quantizers.deps(resolved)),
            target=machine.arithmetic(),
        ),
        check=lambda: quantizers.check(model.path, resolved, path),
        produce=lambda out, progress: quantizers.quantize(model.path, resolved, path, out, progress),
    )


def compile_(model: Input, settings: Mapping[str, Any]) -> Stage:
    """An engine from a checkpoint, plain or quantized."""
    from llmopt import compilers

    target = compilers.resolve(settings)
    inputs.require(model, "compile", "model", "quantized-model")
    return Stage(
        kind="engine",
        action=Action(
            op=f"compile.{target.target}",
            op_version=compilers.OP_VERSION,
            inputs=_ids(model=model),
            settings=to_json(target),
            code=provenance.code_digest("compile"),
            deps=provenance.versions(compilers.deps(target)),
            target=machine.architecture(),
        ),
        check=lambda: compilers.check(model.path, target),
        produce=lambda out, progress: compilers.compile_model(model.path, target, out, progress),
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


def bench(subjects: Mapping[str, Input | str], settings: Mapping[str, Any], *, tokenizer: Input | None = None) -> Stage:
    """A load test of engines and of servers (a URL), by the name each has in the report; for this machine only.

    `tokenizer`, a folder with tokenizer.json, makes prompts of an exact length for a server, as an engine's own does.
    """
    from llmopt import bench

    resolved = bench.resolve({key: value for key, value in settings.items() if key != "against"})
    loads: dict[str, Subject] = {}
    for name, subject in subjects.items():
        if isinstance(subject, str):
            path = None if tokenizer is None else tokenizer.path
            loads[name] = bench.Subject(name=name, url=subject, tokenizer=path)
            continue
        inputs.require(subject, "bench", "engine")
        loads[name] = bench.Subject(name=name, engine=subject.path, artifact=subject.id)
    engines = any(load.engine is not None for load in loads.values())
    return Stage(
        kind="report",
        action=Action(
            op="bench",
            op_version=bench.OP_VERSION,
            inputs={name: load.artifact or str(load.url) for name, load in loads.items()} | _ids(tokenizer=tokenizer),
            settings=to_json(resolved),
            code=provenance.code_digest("bench"),
            deps=provenance.versions(bench.deps(resolved)) | (_serving() if engines else {}),
            target=machine.fingerprint(),
        ),
        check=lambda: bench.check(loads, resolved),
        produce=lambda out, progress: bench.measure(loads, resolved, out, progress),
        repeatable=False,
    )


def _serving() -> dict[str, str]:
    """Versions of what serves the engines, as far as it is installed."""
    found = {name: provenance.installed(name) for name in _SERVING}
    return {name: version for name, version in found.items() if version is not None}


def _ids(**given: Input | None) -> dict[str, str]:
    return {name: source.id for name, source in given.items() if source is not None}


def settings_of(section: str, values: Mapping[str, Any]) -> dict[str, Json]:
    """The section with every default, its references included; SettingsError for what its stage does not take."""
    references = {key: values[key] for key in REFERENCES[section] if key in values}
    own = {key: value for key, value in values.items() if key not in references}
    return _SETTINGS[section](own) | references


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
