"""What a load test came to: for people a table, for CI files, annotations and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmopt.cli.tables import table
from llmopt.errors import Exit, LlmoptError

if TYPE_CHECKING:
    from llmopt.cli.options import Session

_CODES = {"fail": Exit.GATE_FAILED, "inconclusive": Exit.GATE_INCONCLUSIVE}
_COLUMNS = (
    ("TTFT p50", "ttft_ms_p50"),
    ("p99", "ttft_ms_p99"),
    ("ITL p50", "itl_ms_p50"),
    ("p99", "itl_ms_p99"),
    ("E2E p50", "e2e_ms_p50"),
    ("tokens/s", "tokens_per_s"),
    ("requests/s", "requests_per_s"),
)
_SCHEDULED = ("scheduled p99", "ttft_scheduled_ms_p99")  # of an open loop: TTFT since the request was due


def exit_code(metrics: Mapping[str, Any]) -> int:
    """5 where a threshold or the gate failed, 7 where the gate could not tell, else 0."""
    verdict = (metrics.get("gate") or {}).get("verdict")
    return int(_CODES.get(str(verdict), Exit.OK))


class Forms:
    """The files that were asked for beside the report; made before the load, to find those that cannot be written."""

    def __init__(self, session: Session, **files: str | None) -> None:
        self._session = session
        self._files = {form: Path(file) for form, file in files.items() if file is not None}
        for file in self._files.values():
            folder = file.parent
            if file.is_dir() or not os.access(folder if folder.is_dir() else folder.parent, os.W_OK):
                raise LlmoptError(f"cannot write `{file}`", hint="give a file in a folder that can be written")

    def deliver(self, folder: Path) -> None:
        """Copy the forms of the report in `folder`; on GitHub also annotate, and add to the step's summary."""
        from llmopt.bench.report import files, markdown
        from llmopt.bench.report.folder import FILE, read_report

        if not (folder / FILE).is_file():
            return  # it ended before there was anything to tell
        for form, file in self._files.items():
            files.copy(folder, form, file)
        if os.environ.get("GITHUB_ACTIONS") == "true":
            for line in markdown.workflow_commands(read_report(folder)):
                print(line, file=sys.stderr, flush=True)
        step = os.environ.get("GITHUB_STEP_SUMMARY")
        if step:
            try:
                with Path(step).open("a", encoding="utf-8") as file_:
                    file_.write((folder / files.FORMS["summary"]).read_text(encoding="utf-8"))
            except OSError as error:
                self._session.console.progress(f"no step summary: {error}")


def text(report: Mapping[str, Any]) -> str:
    """The table of a report, its verdict and what it found by searching."""
    from llmopt.bench.report import words

    levels = words.levels(report)
    open_loop = any(words.figure(summary, _SCHEDULED[1]) is not None for _, _, summary in levels)
    columns = [*_COLUMNS[:2], *([_SCHEDULED] if open_loop else []), *_COLUMNS[2:]]
    rows = [["SUBJECT", "LOAD", "REQUESTS", "ERRORS", *(title for title, _ in columns)]]
    for subject, level, summary in levels:
        figures = [words.number(words.figure(summary, name)) for _, name in columns]
        rows.append([subject, level, str(summary["requests"]), str(words.figure(summary, "errors")), *figures])
    verdict = words.verdict(report)
    lines = [table(rows, left=2), ""]
    sweep = report.get("sweep")
    if sweep:
        unit = "streams" if sweep["kind"] == "streams" else "requests/s"
        best = "none meets the thresholds" if sweep["best"] is None else f"{sweep['best']:g} {unit}"
        knee = "none" if sweep["knee"] is None else f"{sweep['knee']:g}"
        larger = ", and a larger load may do as well" if sweep["at_limit"] else ""
        lines.append(f"knee      {knee}, best {best}{larger}; {sweep['stopped']}")
    first, *more = verdict.sentences
    lines.append(f"verdict   {verdict.title.lower()}: {first}")
    lines += [f"          {sentence}" for sentence in more]
    return "\n".join(lines)
