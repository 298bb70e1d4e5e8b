"""The report's files: report.json (all figures), report.md (the table) and requests.jsonl (every stamp)."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import llmopt
from llmopt.artifacts.outcome import Json
from llmopt.bench.metrics.figures import CONVENTIONS, Level
from llmopt.bench.settings import BenchSettings, Subject
from llmopt.errors import LlmoptError
from llmopt.profiles.settings import to_json

SCHEMA = "llmopt.report/1"
REQUESTS = "requests.jsonl"

_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "TTFT ms p50": ("ttft_ms", "p50"),
    "p99": ("ttft_ms", "p99"),
    "ITL ms p50": ("itl_ms", "p50"),
    "p99 ": ("itl_ms", "p99"),
    "TPOT ms p50": ("tpot_ms", "p50"),
    "E2E ms p50": ("e2e_ms", "p50"),
    "tokens/s": ("tokens_per_s",),
    "requests/s": ("requests_per_s",),
}


def prepare(out: Path) -> None:
    """Make the folder and the file of requests, so that a folder that cannot be written is found before the load."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / REQUESTS).write_bytes(b"")
    except OSError as error:
        raise LlmoptError(f"cannot write to `{out}`: {error.strerror}", hint="choose another folder") from None


def append_requests(out: Path, level: Level) -> None:
    """One line for each request, in microseconds: `sent_us` since the level's first, all else since its own sending."""
    first_ns = min((record.sent_ns for record in level.records), default=0)
    with (out / REQUESTS).open("a", encoding="utf-8") as file:
        for record in level.records:
            line = {
                "subject": level.subject,
                "concurrency": level.streams,
                "round": level.round,
                "prompt": record.prompt,
                "sent_us": (record.sent_ns - first_ns) // 1000,
                "end_us": (record.end_ns - record.sent_ns) // 1000,
                "chunks_us": [(stamp - record.sent_ns) // 1000 for stamp in record.stamps_ns],
                "prompt_tokens": record.prompt_tokens,
                "completion_tokens": record.completion_tokens,
            }
            if record.failure is not None:
                line |= {"error": record.failure.kind, "detail": record.failure.detail}
            file.write(json.dumps(line, separators=(",", ":"), ensure_ascii=False) + "\n")


def write(
    out: Path,
    *,
    settings: BenchSettings,
    subjects: Mapping[str, Subject],
    models: Mapping[str, str],
    environment: Mapping[str, Json],
    results: Mapping[str, Mapping[str, Mapping[str, Json]]],
    ratios: Mapping[str, Json],
    notes: Sequence[str],
    invalid: str | None,
) -> None:
    """Write report.json and report.md; `invalid` says why the figures mean nothing, None that they hold."""
    report: dict[str, object] = {
        "schema": SCHEMA,
        "valid": invalid is None,
        "invalid_because": invalid,
        "settings": to_json(settings),
        "subjects": {subject.name: _subject(subject, models) for subject in subjects.values()},
        "results": results,
        "ratio": ratios,
        "notes": list(notes),
        "environment": environment,
        "conventions": CONVENTIONS,
    }
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    (out / "report.json").write_text(text, encoding="utf-8")
    page = markdown(results, ratios, notes, environment, invalid)
    (out / "report.md").write_text(page, encoding="utf-8")


def markdown(
    results: Mapping[str, Mapping[str, Mapping[str, Json]]],
    ratios: Mapping[str, Json],
    notes: Sequence[str],
    environment: Mapping[str, Json],
    invalid: str | None,
) -> str:
    """The page that a pull request shows: verdict, table, notes, machine."""
    lines = ["# Load test", ""]
    if invalid is not None:
        lines += [f"**Not valid: {invalid}**", ""]
    lines += [
        "| subject | streams | requests | errors | " + " | ".join(name.strip() for name in _COLUMNS) + " |",
        "|---|" + "---:|" * (3 + len(_COLUMNS)),
    ]
    for subject, levels in results.items():
        for at, summary in levels.items():
            lines.append(_row(subject, at, summary))
    for at, figures in ratios.items():
        if isinstance(figures, dict):
            lines.append(_ratio_row(at, figures))
    if notes:
        lines += ["", *(f"- {note}" for note in notes)]
    cpu, cores, system = (environment.get(name) for name in ("cpu", "cores", "system"))
    return "\n".join([*lines, "", f"Machine: {cpu}, {cores} cores, {system}", ""])


def environment() -> dict[str, Json]:
    """What the figures depend on and a reader can know: the machine that made the load, and the versions."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_1min": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "llmopt": llmopt.__version__,
        "tokenizers": _version("tokenizers"),
        "stamps": "monotonic clock on receipt",
    }


def _subject(subject: Subject, models: Mapping[str, str]) -> dict[str, Json]:
    fields: dict[str, Json] = {"model": models.get(subject.name)}
    if subject.url is not None:
        fields["url"] = subject.url
    if subject.engine is not None:
        fields["engine"] = subject.engine.name
    if subject.artifact is not None:
        fields["artifact"] = subject.artifact
    return fields


def _row(subject: str, at: str, summary: Mapping[str, Json]) -> str:
    errors = summary["errors"]
    failed = ", ".join(f"{count} {kind}" for kind, count in errors.items()) if isinstance(errors, dict) else ""
    cells = [subject, at.removeprefix("c"), str(summary["requests"]), failed or "0"]
    for path in _COLUMNS.values():
        value: Json = dict(summary)
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        cells.append("-" if value is None else f"{value:.2f}")
    return "| " + " | ".join(cells) + " |"


def _ratio_row(at: str, figures: Mapping[str, Json]) -> str:
    cells = ["candidate / baseline", at.removeprefix("c"), "", ""]
    for path in _COLUMNS.values():
        value = figures.get("_".join(path))
        cells.append("-" if value is None else f"{value:.3f}")
    return "| " + " | ".join(cells) + " |"


def _cpu_model() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
