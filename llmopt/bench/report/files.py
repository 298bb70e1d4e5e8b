"""The report's files: report.json holds all figures; each of the others is the same for another reader.

requests.parquet (every stamp) is written while the load runs, by `requests.Requests`; `write` comes after it, for the
charts of report.html are drawn from it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmopt.errors import LlmoptError

if TYPE_CHECKING:
    from llmopt.bench.report.words import Report

#: What a user can ask a copy of, by the name of the flag.
FORMS: Mapping[str, str] = {
    "json": "report.json", "html": "report.html", "junit": "junit.xml", "csv": "report.csv",
    "markdown": "report.md", "summary": "summary.md", "vllm": "vllm.json",
}  # fmt: skip


def write(out: Path, report: Report) -> None:
    """report.json first, so that whatever befalls the others, the figures are there.

    What makes them is imported here, after the load: before it, every import delays the first request.
    """
    from llmopt.bench.report import flat, junit, markdown, page, rows

    _put(out / FORMS["json"], json.dumps(_finite(report), indent=1, ensure_ascii=False) + "\n")
    measured = rows.read(out)
    _put(out / FORMS["markdown"], markdown.markdown(report))
    _put(out / FORMS["summary"], markdown.summary(report))
    _put(out / FORMS["junit"], junit.junit(report))
    _put(out / FORMS["csv"], flat.csv_rows(report))
    _put(out / FORMS["vllm"], flat.vllm(report, measured))
    _put(out / FORMS["html"], page.page(report, measured))


def copy(out: Path, form: str, to: Path) -> None:
    """A form of the report in `out` as the file `to`."""
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / FORMS[form], to)
    except OSError as error:
        raise LlmoptError(f"cannot write `{to}`: {error.strerror}", hint="choose another file") from None


def _finite(value: Any) -> Any:
    """Null for what JSON has no number for: other readers than Python's refuse a file with `NaN`."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _put(file: Path, text: str) -> None:
    """All of it or the file as it was."""
    aside = file.with_name(f"{file.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)
