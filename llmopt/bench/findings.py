"""From the levels of all rounds to what a report says: figures, comparisons, thresholds and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmopt.artifacts.outcome import Json
from llmopt.bench.gate import names, slo, stored, verdict
from llmopt.bench.gate.verdict import Judgement
from llmopt.bench.metrics import figures, validity
from llmopt.bench.metrics.figures import Level
from llmopt.bench.metrics.records import Record
from llmopt.bench.report.folder import digest, read_report
from llmopt.bench.settings import BenchSettings

#: subject -> level -> figures
Results = dict[str, dict[str, dict[str, Json]]]


def results(levels: Sequence[Level], settings: BenchSettings) -> Results:
    """The figures of each subject at each level over all rounds, with those of each round when there are several."""
    found: Results = {}
    for (subject, label), group in _grouped(levels).items():
        summary = summarised(group, settings)
        if len(group) > 1:
            summary["rounds"] = [{"round": each.round, **_compact([each], settings)} for each in group]
        found.setdefault(subject, {})[label] = summary
    return found


def summarised(group: Sequence[Level], settings: BenchSettings) -> dict[str, Json]:
    return figures.summarise(group, slo=slo.per_request(settings.slos))


def notes(levels: Sequence[Level], asked_prompt_tokens: Callable[[Record], int | None]) -> list[str]:
    """What bears on the figures, of every subject and level."""
    where: dict[tuple[str, str], list[str]] = {}  # what is said of several levels is said once
    for (subject, label), group in _grouped(levels).items():
        for note in validity.notes(group, asked_prompt_tokens=asked_prompt_tokens):
            where.setdefault((subject, note), []).append(label)
    return [f"`{subject}` {', '.join(labels)}: {note}" for (subject, note), labels in where.items()]


def thin(levels: Sequence[Level], settings: BenchSettings) -> list[str]:
    """Of the compared figures, those for which a round has too few requests, so that they are mostly chance."""
    found = []
    for metric in settings.gate_metrics:
        least = names.least_requests(metric)
        fewest = min((len(level.records) for level in levels), default=least)
        if names.split(metric)[1] in ("p99", "p99.9") and fewest < least:
            found.append(f"`{metric}` of {fewest} requests a round is mostly chance: {least} make it a figure")
    return found


def ratios(found: Results) -> dict[str, Json]:
    """level -> candidate over baseline, where both were measured."""
    candidate, baseline = found.get("candidate", {}), found.get("baseline", {})
    return {
        at: figures.ratios(figures.compact(candidate[at]), figures.compact(baseline[at]))
        for at in candidate
        if at in baseline
    }


def judge(levels: Sequence[Level], settings: BenchSettings, look: int) -> Judgement:
    """Candidate against baseline over the rounds so far. `look` counts from 0 in the settings' looks."""
    paired: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for (subject, label), group in _grouped(levels).items():
        for each in group:
            compact = _compact([each], settings)
            for metric in settings.gate_metrics:
                form = next((form for form in names.forms(metric) if compact.get(form) is not None), metric)
                value = compact.get(form)
                sides = paired.setdefault(label, {}).setdefault(form, ([], []))
                sides[subject == "candidate"].append(float(value) if isinstance(value, int | float) else 0.0)
    there = {
        label: {metric: sides for metric, sides in metrics.items() if any(sides[0]) or any(sides[1])}
        for label, metrics in paired.items()
    }
    metrics = list(dict.fromkeys(metric for found in there.values() for metric in found))
    return verdict.judge(
        there,
        margin=settings.margin,
        alpha=settings.alpha,
        metrics=metrics,
        look=look,
        looks=settings.looks,
        seed=settings.seed,
    )


def against_report(report: Mapping[str, Any], baseline: Path, settings: BenchSettings) -> Judgement:
    """The candidate of this report against that of the stored one."""
    return stored.against_report(
        report,
        read_report(baseline),
        margin=settings.margin,
        alpha=settings.alpha,
        metrics=None if settings.gate_metrics == names.GATED else settings.gate_metrics,
    )


def gate(
    found: Results,
    settings: BenchSettings,
    judgement: Judgement | None,
    held: Sequence[str] | None = None,
    *,
    baseline: Path | None = None,
    none_meets: bool = False,
) -> dict[str, Json] | None:
    """The verdict on thresholds and comparison as a report has it; None where there is neither.

    The comparison decides only with `gate: true`; it is reported in any case. `held` are the levels that the thresholds
    are for (None: all of them). `none_meets`: a sweep has found no load that meets them.
    `baseline` is the stored report that was compared with.
    """
    checked: list[dict[str, Json]] = [
        {**each.to_json(), "level": label, "subject": "candidate"}
        for label, summary in found.get("candidate", {}).items()
        if held is None or label in held
        for each in slo.check(settings.slos, figures.compact(summary))
    ]
    if judgement is None and not settings.slos:
        return None
    outcome: str | None = "pass" if settings.slos else None
    if any(not each["met"] for each in checked) or (settings.slos and none_meets):
        outcome = "fail"
    elif settings.gate and judgement is not None:
        outcome = judgement.verdict
    about: dict[str, Json] = {"looks": [], "comparisons": []} if judgement is None else judgement.to_json()
    stored_as = None if baseline is None else digest(baseline)
    return {**about, "verdict": outcome, "enforced": settings.gate, "slo": [*checked], "baseline": stored_as}


def _compact(group: Sequence[Level], settings: BenchSettings) -> dict[str, Json]:
    return figures.compact(summarised(group, settings))


def _grouped(levels: Sequence[Level]) -> dict[tuple[str, str], list[Level]]:
    """The rounds of each subject and level, in the order of the first."""
    groups: dict[tuple[str, str], list[Level]] = {}
    for level in levels:
        groups.setdefault((level.subject, level.load.label), []).append(level)
    return groups
