"""Bench: load-test an OpenAI-compatible server, or an engine that bench serves itself, and report what clients see.

settings.py   what a run does: subjects and settings
preflight.py  what can be found wrong before the load
endpoints.py  what is sent to an endpoint and where its answer has the text
workload/     what is asked, when: prompts of exact length, arrivals, traces, conversations
client/       the load: sends on time, stores (kernel stamp, bytes), parses nothing meanwhile
metrics/      from stored bytes to records, from records to figures, and whether these mean anything
gate/         figures against thresholds, a baseline, a history: the statistics and the verdict
report/       report.json, requests.parquet, Markdown, JUnit, HTML
answers.py    an answer's text, usage and end, whatever the endpoint
serving.py    starts an engine's server and always stops it
level.py      one level: what a subject is asked, the load, what came back
findings.py   figures, comparisons and verdict over all levels
sweep.py      the search for the knee and the largest load
run.py        the order of it all
truth.py      a server that knows when it sent what; selftest.py measures the client by it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llmopt.artifacts.outcome import Outcome, Progress
from llmopt.bench.preflight import check
from llmopt.bench.settings import BenchSettings, Subject, resolve

__all__ = [
    "OP_VERSION",
    "BenchSettings",
    "Subject",
    "check",
    "check_import",
    "deps",
    "import_results",
    "measure",
    "resolve",
]

OP_VERSION = 2


def deps(settings: BenchSettings) -> tuple[str, ...]:
    """The distributions whose versions may change what is sent."""
    return ("numpy", "orjson", "tokenizers")


def measure(
    subjects: Mapping[str, Subject],
    settings: BenchSettings,
    out: Path,
    progress: Progress,
    *,
    baseline: Path | None = None,
    command: Callable[[Path], Sequence[str]] | None = None,
) -> Outcome:
    """Load every subject and write the report to the empty folder `out`; blocks until done.

    `baseline` is a stored report that the candidate is judged against where no baseline is loaded. `command` makes the
    command line that serves an engine folder (default: `python -m llmopt serve`). Raises `MeasurementInvalidError`
    after writing the report, marked `"valid": false`, where the figures mean nothing. The verdict of the gate is in the
    outcome's metrics.
    """
    from llmopt.bench.run import run
    from llmopt.bench.serving import serve_command

    return run(subjects, settings, out, progress, command or serve_command, baseline)


def check_import(results: Sequence[Path], settings: BenchSettings, baseline: Path | None) -> None:
    """Whether the result files of another load tester are understood. Raises LlmoptError."""
    from llmopt.bench import imported

    imported.check(results, settings, baseline)


def import_results(
    results: Sequence[Path], settings: BenchSettings, out: Path, *, baseline: Path | None = None
) -> Outcome:
    """Write a report of another load tester's results to the empty folder `out`."""
    from llmopt.bench import imported

    return imported.make(results, settings, out, baseline)
