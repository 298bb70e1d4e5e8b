"""The load tests that a store has of one thing, oldest first, and where their figures changed for good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmopt.artifacts.manifest import Action, Manifest
from llmopt.artifacts.outcome import Json
from llmopt.errors import LlmoptError, nearest

if TYPE_CHECKING:
    from llmopt.artifacts.store import Store
    from llmopt.bench.gate.history import ChangePoint

OPERATIONS = ("bench", "bench.import")
#: Settings that change no figure on average, or only how many there are.
_PASSED_OVER = ("seed", "rounds", "max_rounds", "gate", "margin", "alpha", "gate_metrics", "slo", "processes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A stored report's figures of the candidate."""

    artifact: str
    created_s: float  # since 1970
    figures: Mapping[str, Mapping[str, Json]]  # by level


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One figure at one level over all reports that have it."""

    level: str
    metric: str
    reports: Sequence[Report]
    values: Sequence[float]
    changes: Sequence[ChangePoint]

    def to_json(self) -> dict[str, Json]:
        return {
            "level": self.level,
            "metric": self.metric,
            "values": [
                {"artifact": report.artifact, "created": report.created_s, "value": value}
                for report, value in zip(self.reports, self.values, strict=True)
            ],
            "changes": [
                {**change.to_json(), "artifact": self.reports[change.index].artifact} for change in self.changes
            ],
        }


def reports(store: Store, like: str | None = None) -> list[Report]:
    """Those measured with the settings and on the machine of the report `like` (None: of the newest), oldest first."""
    stored = [
        (manifest, created_s) for manifest, created_s in reversed(store.ls()) if _action(manifest).op in OPERATIONS
    ]
    if not stored:
        raise LlmoptError("the store has no load test", hint="make one: `llmopt bench SUBJECT`")
    model = stored[-1][0] if like is None else store.get(like)
    wanted = _conditions(_action(model))
    return [
        Report(artifact=manifest.id, created_s=created_s, figures=_figures(manifest))
        for manifest, created_s in stored
        if _conditions(_action(manifest)) == wanted
    ]


def series(found: Sequence[Report], metrics: Sequence[str]) -> list[Series]:
    """Every level's series of each metric, with its changes."""
    levels = dict.fromkeys(level for report in found for level in report.figures)
    every = [one for level in levels for metric in metrics if (one := _series(found, level, metric)) is not None]
    for metric in metrics:
        if all(one.metric != metric for one in every):
            known = {name for report in found for figures in report.figures.values() for name in figures}
            raise LlmoptError(f"no report has the figure `{metric}`", hint=nearest(metric, known))
    return every


def _series(found: Sequence[Report], level: str, metric: str) -> Series | None:
    from llmopt.bench.gate.history import change_points

    pairs = [(report, value) for report in found if (value := _positive(report, level, metric)) is not None]
    if not pairs:
        return None
    values = [value for _, value in pairs]
    return Series(
        level=level,
        metric=metric,
        reports=[report for report, _ in pairs],
        values=values,
        changes=change_points(values),
    )


def _positive(report: Report, level: str, metric: str) -> float | None:
    value = report.figures.get(level, {}).get(metric)
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _figures(manifest: Manifest) -> dict[str, Mapping[str, Json]]:
    candidate = manifest.metrics.get("candidate")
    levels = candidate.items() if isinstance(candidate, dict) else ()
    return {level: figures for level, figures in levels if isinstance(figures, dict)}


def _conditions(action: Action) -> dict[str, object]:
    settings = {name: value for name, value in action.settings.items() if name not in _PASSED_OVER}
    data = {name: action.inputs.get(name) for name in ("workload", "tokenizer")}
    return {"op": action.op, "settings": settings, "target": dict(action.target), **data}


def _action(manifest: Manifest) -> Action:
    if manifest.action is None:
        return Action(op="", op_version=0, inputs={}, settings={}, code="", deps={}, target={})
    return manifest.action
