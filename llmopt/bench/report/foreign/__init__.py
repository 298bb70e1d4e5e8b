"""Reads what other load testers wrote, so that their results can be gated and kept beside ours.

A figure gets the name of our convention only where theirs is the same; what each tool counts is in CONVENTIONS.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from llmopt.artifacts.outcome import Json
from llmopt.bench.report.foreign import aiperf_json, guidellm_json, vllm_json
from llmopt.bench.report.foreign.base import Object, Run
from llmopt.errors import LlmoptError

MAX_ERROR_SHARE = 0.01
CONVENTIONS: Mapping[str, Mapping[str, str]] = {
    "guidellm": guidellm_json.CONVENTIONS,
    "aiperf": aiperf_json.AIPERF,
    "genai-perf": aiperf_json.GENAI_PERF,
    "vllm": vllm_json.CONVENTIONS,
}
_FILES = ("benchmarks.json", "profile_export_aiperf.json", "profile_export_genai_perf.json")
_COUNTS = ("requests", "answered", "tokens", "errors")  # of several runs the sum; of all else the median


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """The runs of one tool. Several at one level are rounds of it."""

    tool: str
    version: str | None
    model: str | None
    levels: Mapping[str, dict[str, Json]]
    requests: tuple[dict[str, Json], ...]
    conventions: Mapping[str, str]
    notes: tuple[str, ...]
    invalid_because: str | None

    def report(self) -> dict[str, Any]:
        """The parts of report.json that come from the files; whoever writes it adds schema, settings, environment."""
        return {
            "valid": self.invalid_because is None,
            "invalid_because": self.invalid_because,
            "subjects": {
                "candidate": {"model": self.model, "imported_from": f"{self.tool} {self.version or ''}".strip()}
            },
            "results": {"candidate": dict(self.levels)},
            "gate": None,
            "sweep": None,
            "notes": list(self.notes),
            "conventions": dict(self.conventions),
        }


def read(paths: Sequence[Path]) -> Imported:
    """The runs in `paths`, files or folders of one tool; an `LlmoptError` says which file is not understood."""
    runs = [run for path in paths for run in _runs(path)]
    if not runs:
        raise LlmoptError("there is no run to import", hint="name the result file of a load tester")
    tools = {run.tool for run in runs}
    if len(tools) > 1:
        raise LlmoptError(
            f"these are results of several tools: {', '.join(sorted(tools))}", hint="import one at a time"
        )
    by_level: dict[str, list[Run]] = {}
    for run in runs:
        by_level.setdefault(run.label, []).append(run)
    requests: list[dict[str, Json]] = []
    for label, same in by_level.items():
        for number, run in enumerate(same):
            where: dict[str, Json] = {"subject": "candidate", "level": label, "round": number}
            requests += [where | row for row in run.requests]
    rounds = {label: len(same) for label, same in by_level.items() if len(same) > 1}
    tool = tools.pop()
    notes = [f"imported from {tool}: whether its client kept up with the load is not known"]
    notes += [f"{label}: each figure is the median of {count} runs" for label, count in rounds.items()]
    levels = {label: _together([run.summary for run in same]) for label, same in by_level.items()}
    return Imported(
        tool=tool,
        version=runs[0].version,
        model=runs[0].model,
        levels=levels,
        requests=tuple(requests),
        conventions=CONVENTIONS[tool],
        notes=tuple(notes),
        invalid_because=_invalid(levels),
    )


def _runs(path: Path) -> list[Run]:
    """Every run of a file, an object each or several in one."""
    file = _file(path)
    found: list[Run] = []
    for data in _objects(file):
        try:
            found += _read(data, file)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise LlmoptError(
                f"`{file}` has another layout than the versions that are known: {type(error).__name__} {error}",
                hint="guidellm 0.3 to 0.8, aiperf to 0.13, genai-perf 0.0.16 and vLLM to 0.32 are known",
            ) from error
    return found


def _read(data: Object, file: Path) -> list[Run]:
    """What the tool was shows in its keys."""
    if isinstance(data.get("benchmarks"), list):
        return list(guidellm_json.read(data))
    if isinstance(data.get("request_latency"), Mapping) and "unit" in data["request_latency"]:
        return [aiperf_json.read(data, file)]
    if "request_throughput" in data and "completed" in data:
        return [vllm_json.read(data)]
    keys = ", ".join(f"`{key}`" for key in list(data)[:6]) or "nothing"
    raise LlmoptError(
        f"`{file}` is not a result that can be imported: it has {keys}",
        hint="give benchmarks.json of guidellm, profile_export_aiperf.json, or what --save-result of vLLM wrote",
    )


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in _FILES:
        for file in sorted(path.rglob(name)):
            return file
    raise LlmoptError(f"`{path}` has no result of a load tester", hint=f"it may be one of {', '.join(_FILES)}")


def _objects(file: Path) -> list[dict[str, Any]]:
    """The JSON object of a file, or one from each line, which vLLM's --append-result writes."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LlmoptError(f"cannot read `{file}`: {error}", hint="give the JSON file that the tool wrote") from None
    try:
        objects = [json.loads(text)]
    except ValueError:
        try:
            objects = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise LlmoptError(f"`{file}` is not JSON: {error}", hint="give the file as the tool wrote it") from None
    if not all(isinstance(each, dict) for each in objects):
        raise LlmoptError(f"`{file}` holds no JSON object", hint="give the JSON file that the tool wrote")
    return objects


def _together(summaries: Sequence[dict[str, Json]]) -> dict[str, Json]:
    """One summary; of several runs with the compact figures of each as `rounds`, and figures that are their median."""
    if len(summaries) == 1:
        return summaries[0]
    merged = {key: _median([each.get(key) for each in summaries]) for key in summaries[0]}
    merged |= {key: _summed([each.get(key) for each in summaries]) for key in _COUNTS if key in summaries[0]}
    return merged | {"rounds": [{"round": number, **_compact(each)} for number, each in enumerate(summaries)]}


def _summed(values: Sequence[Json]) -> Json:
    """The sum of counts, or of those of each kind; None where a run has none."""
    objects = [value for value in values if isinstance(value, dict)]
    if objects:
        kinds = dict.fromkeys(kind for each in objects for kind in each)
        return {kind: _summed([each.get(kind, 0) for each in objects]) for kind in kinds}
    numbers = [value for value in values if isinstance(value, int)]
    return sum(numbers) if len(numbers) == len(values) else None


def _median(values: Sequence[Json]) -> Json:
    objects = [value for value in values if isinstance(value, dict)]
    if objects:
        keys = [key for key in objects[0] if key != "ci95"]
        return {key: _median([each.get(key) for each in objects]) for key in keys}
    numbers = [value for value in values if isinstance(value, int | float)]
    return median(numbers) if numbers else None


def _compact(summary: Object) -> dict[str, Json]:
    flat: dict[str, Json] = {}
    for name, value in summary.items():
        if isinstance(value, Mapping) and name != "errors":
            flat |= {f"{name}_{key}": each for key, each in value.items() if key not in ("count", "min", "max", "ci95")}
        elif name not in ("errors", "answered", "wall_s", "tokens"):
            flat[name] = value
    return flat | {"errors": sum(summary["errors"].values())}


def _invalid(levels: Mapping[str, Object]) -> str | None:
    for label, summary in levels.items():
        if not summary["answered"]:
            return f"no request at {label} was answered"
        if summary["error_share"] > MAX_ERROR_SHARE:
            return f"{summary['error_share']:.1%} of the requests at {label} failed"
    return None
