"""The folder of a report: made before the load, read back when it is stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmopt.bench.gate import names
from llmopt.errors import LlmoptError

SCHEMA = "llmopt.report/2"
FILE = "report.json"


def prepare(out: Path) -> None:
    """Make the folder, so that one that cannot be written is found before the load."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").write_bytes(b"")
        (out / ".writable").unlink()
    except OSError as error:
        raise LlmoptError(f"cannot write to `{out}`: {error.strerror}", hint="choose another folder") from None


def read_report(path: Path) -> dict[str, Any]:
    """The report in a folder, or in a file of its own. Raises LlmoptError."""
    file = path / FILE if path.is_dir() else path
    hint = "give a report that `llmopt bench` or `llmopt bench import` made: its folder, its id or its name"
    try:
        found = json.loads(file.read_bytes())
    except OSError as error:
        raise LlmoptError(f"no report at `{file}`: {error.strerror}", hint=hint) from None
    except ValueError:
        raise LlmoptError(f"`{file}` is not JSON", hint=hint) from None
    if not isinstance(found, dict) or not str(found.get("schema", "")).startswith("llmopt.report/"):
        raise LlmoptError(f"`{file}` is not a report of a load test", hint=hint)
    if found["schema"] != SCHEMA:
        raise LlmoptError(f"`{file}` has the schema `{found['schema']}`, not `{SCHEMA}`", hint="measure it anew")
    return found


def digest(path: Path) -> str:
    """What names the report in a folder, or in a file of its own."""
    return f"sha256:{hashlib.sha256((path / FILE if path.is_dir() else path).read_bytes()).hexdigest()}"


def rounds_of(report: Mapping[str, Any]) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """level -> figure -> baseline and candidate, one value a round, of the figures that a gate takes by default.

    A figure that some round has not, or as 0, is left out: it has no ratio.
    """
    sides = [report["results"].get(name, {}) for name in ("baseline", "candidate")]
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for level in sides[1]:
        for metric in names.GATED:
            rounds = [side.get(level, {}).get("rounds", ()) for side in sides]
            form = next((form for form in names.forms(metric) if any(each.get(form) for each in rounds[1])), metric)
            base, cand = ([each.get(form) or 0.0 for each in of] for of in rounds)
            if base and cand and all(base + cand):
                found.setdefault(level, {})[form] = (base, cand)
    return found
