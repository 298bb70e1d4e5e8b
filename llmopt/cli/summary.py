"""What `llmopt run` says at its end: one table of figures, then the artifacts and which of them were there already.

And what `llmopt quantize` says of its model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from llmopt.artifacts.disk import byte_size
from llmopt.cli import prepared, verdict
from llmopt.cli.tables import table
from llmopt.errors import Exit
from llmopt.pipeline.plan import Run, Step
from llmopt.pipeline.runner import StageResult

Format = Callable[[Any], str]


def text(run: Run) -> str:
    figures = [["", "base", "quantized", "ratio"], *_figures(run)]
    if run.step("quantize") is None:
        figures = [row[:2] for row in figures]
    notes = [prepared.text(result, prepared.about(result)) for result in _prepared(run)]
    twice = "\n".join(_not_reproducible(run.steps))
    tables = [*([table(figures)] if len(figures) > 1 else []), _artifacts(run.steps)]
    return "\n\n".join([*tables, *([twice] if twice else []), *notes])


#: Metrics of a quantized model that `quantized` shows.
QUANTIZED = frozenset(
    {"bits_per_weight", "weight_bytes", "relative_error_mean", "relative_error_max", "relative_error_max_linear"}
)


def quantized(metrics: Mapping[str, Any]) -> str:
    """Size and error of a quantized model, as far as they are known; empty where neither is."""
    where = metrics.get("relative_error_max_linear")
    shown: tuple[tuple[str, str, Format], ...] = (
        ("bits per weight", "bits_per_weight", "{:.3f}".format),
        ("size of weights", "weight_bytes", byte_size),
        ("mean relative error", "relative_error_mean", "{:.4f}".format),
        ("max relative error", "relative_error_max", lambda error: f"{error:.4f}" + (f"  {where}" if where else "")),
    )
    rows = [[label, show(metrics[name])] for label, name, show in shown if name in metrics]
    return table(rows, left=2) if rows else ""


def planned(run: Run) -> str:
    """Of a dry run: what is there and what is to do."""
    blocks = []
    lines = [["STAGE", "OPERATION", "KEY", "STATE"]]
    for step in run.steps:
        state = "in the store" if step.result is not None else "to do"
        if step.waits_for is not None:
            state = f"unknown until `{step.waits_for}` has run"
        lines.append([step.name, step.op or "", (step.key or "")[:12], state])
        blocks += [f"{step.name} is not in the store:", *(f"  {line}" for line in step.differs)] if step.differs else []
    blocks += _not_reproducible(run.steps)
    return "\n".join([table(lines, left=4), *([""] if blocks else []), *blocks])


def _not_reproducible(steps: Sequence[Step]) -> list[str]:
    """All results of each action that has given several; the last is the one that was taken."""
    found = [step for step in steps if step.results]
    return [
        line
        for step in found
        for line in (f"{step.name} is not reproducible:", *(f"  {artifact}" for artifact in step.results))
    ]


#: What a pipeline is for, the first that it has: `--json` says that of its run.
_MADE = ("compile-build", "compile", "quantize", "eval", "bench")


def value(run: Run) -> dict[str, Any]:
    """For `--json`: a stage's own keys for the thing that was made (the engine, say), then all stages."""
    results = {step.name: step.result for step in run.steps if step.result is not None}
    made = next((results[name] for name in _MADE if name in results), None)
    return (made.to_json() if made else {}) | {
        "pipeline": run.pipeline,
        "cached": len(results) == len(run.steps) and all(result.cached for result in results.values()),
        "seconds": round(sum(result.seconds for result in results.values()), 3),
        "stages": [step.to_json() for step in run.steps],
    }


def exit_code(run: Run) -> int:
    """What was only prepared goes before what a gate says."""
    return int(Exit.BACKEND_MISSING) if _prepared(run) else verdict.exit_code(run.metrics("bench"))


def _prepared(run: Run) -> list[StageResult]:
    """The engines that were prepared and not built."""
    built = {step.name.removesuffix("-build") for step in run.steps if step.name.endswith("-build")}
    found = [step.result for step in run.steps if step.name not in built and step.result is not None]
    return [result for result in found if result.status == "prepared"]


def _artifacts(steps: Sequence[Step]) -> str:
    lines = [["STAGE", "ARTIFACT", "KIND", "SIZE", "TIME"]]
    for step in steps:
        result = step.result
        if result is not None:
            took = "cached" if result.cached else f"{result.seconds:.1f} s"
            lines.append([step.name, result.artifact[:19], result.kind, byte_size(result.bytes), took])
        else:
            lines.append([step.name, f"waits for {step.waits_for}", "", "", ""])
    return table(lines, left=3)


def _figures(run: Run) -> Iterator[list[str]]:
    """Rows of what was measured: of the base, of the quantized model (or of the only one), and their ratio."""
    quantized = run.step("quantize") is not None
    bytes_of = {name: step.result.bytes for step in run.steps if (name := step.name) and step.result is not None}
    base_engine = bytes_of.get("compile-base" if quantized else "compile")
    yield from _row("model", byte_size, run.model_bytes, bytes_of.get("quantize"))
    yield from _row("engine", byte_size, base_engine, bytes_of.get("compile") if quantized else None)
    yield from _evaluation(run.metrics("eval"), quantized)
    yield from _load(run.metrics("bench"), "baseline" if quantized else "candidate", "candidate" if quantized else "")


def _evaluation(metrics: Mapping[str, Any], quantized: bool) -> Iterator[list[str]]:
    own = metrics.get("perplexity")
    yield from _row(
        "perplexity", "{:.3f}".format, *((metrics.get("base_perplexity"), own) if quantized else (own, None))
    )
    for label, name, show in (
        ("KL from base, nats", "kl_mean", "{:.5f}".format),
        ("top-1 agreement", "top1_agreement", "{:.2%}".format),
    ):
        if name in metrics:
            yield [label, "", show(metrics[name]), ""]
    for name, figure in metrics.items():
        task, slash, metric = name.partition("/")
        if slash and not metric.startswith("base_") and "_stderr" not in metric:
            pair = (metrics.get(f"{task}/base_{metric}"), figure) if quantized else (figure, None)
            yield from _row(name, "{:.4f}".format, *pair)


def _load(metrics: Mapping[str, Any], base: str, other: str) -> Iterator[list[str]]:
    for level in metrics.get("candidate", {}):
        streams = level.removeprefix("c")
        for label, name, show in (
            ("TTFT p50", "ttft_ms_p50", "{:.1f} ms".format),
            ("ITL p50", "itl_ms_p50", "{:.2f} ms".format),
            ("TPOT p50", "tpot_ms_p50", "{:.2f} ms".format),
            ("tokens/s", "tokens_per_s", "{:.1f}".format),
        ):
            pair = (metrics.get(subject, {}).get(level, {}).get(name) for subject in (base, other))
            yield from _row(f"{label}, {streams} at once", show, *pair)


def _row(label: str, show: Format, base: float | None, other: float | None) -> Iterator[list[str]]:
    """Nothing at all where neither was measured."""
    if base is not None or other is not None:
        ratio = f"{other / base:.2f}" if base and other is not None else ""
        yield [label, *("" if value is None else show(value) for value in (base, other)), ratio]
