"""A report from the results of another load tester, judged as our own are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from llmopt.artifacts.outcome import Json, Outcome
from llmopt.bench import findings
from llmopt.bench.gate.verdict import Judgement
from llmopt.bench.metrics.figures import compact
from llmopt.bench.preflight import check_gate
from llmopt.bench.report import files, folder, foreign
from llmopt.bench.report.environment import environment
from llmopt.bench.report.requests import Requests
from llmopt.bench.report.words import notes
from llmopt.bench.settings import BenchSettings
from llmopt.errors import MeasurementInvalidError


def check(results: Sequence[Path], settings: BenchSettings, baseline: Path | None) -> None:
    """Whether the files are understood, and there is something to judge them by. Raises LlmoptError."""
    foreign.read(results)
    check_gate(settings, compared=baseline is not None)
    if baseline is not None:
        folder.read_report(baseline)


def make(results: Sequence[Path], settings: BenchSettings, out: Path, baseline: Path | None) -> Outcome:
    """Write the report of `results` (runs of one tool) to the folder `out`.

    Raises MeasurementInvalidError after writing it where the tool's own figures say that the run means nothing.
    """
    folder.prepare(out)
    imported = foreign.read(results)
    report: dict[str, Any] = {
        "schema": folder.SCHEMA,
        **imported.report(),
        "ratio": {},
        "settings": {"imported": [path.name for path in results], "slo": list(settings.slo)},
        "environment": environment(),
    }
    report["notes"] = [*report["notes"], "the environment is that of the machine that imported it"]
    with Requests(out) as requests:
        for _, rows in groupby(imported.requests, key=lambda row: (row["level"], row["round"])):
            requests.append_rows(list(rows))
    judgement: Judgement | None = None
    if baseline is not None and imported.invalid_because is None:
        judgement = findings.against_report(report, baseline, settings)
    gate = findings.gate(report["results"], settings, judgement, baseline=baseline)
    report["gate"] = gate if imported.invalid_because is None else None
    files.write(out, report)
    if imported.invalid_because is not None:
        raise MeasurementInvalidError(imported.invalid_because, hint="see to the cause and measure again")
    metrics: dict[str, Json] = {
        "candidate": {label: compact(summary) for label, summary in report["results"]["candidate"].items()}
    }
    if gate is not None:
        metrics["gate"] = {key: gate[key] for key in ("verdict", "reason") if key in gate}
    return Outcome(metrics=metrics, events=tuple(notes(report)))
