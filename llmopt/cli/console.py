"""Where a command's words go: the result to stdout, progress and logs to stderr. Nothing depends on colour.

With `--json-lines` both go to stdout, one JSON object a line: `{"event": "progress", "line": ..., "time_s": ...}` with
the stage's facts, and last `{"event": "result", ...}` or `{"event": "error", ...}`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmopt.errors import LlmoptError

if TYPE_CHECKING:
    from llmopt.artifacts.outcome import Json
    from llmopt.cli.bar import Bar


@dataclass(slots=True)
class _Pace:
    """How long the steps of one stage take. One without `seconds` was done before this process, and tells nothing."""

    stage: Json
    spent_s: float = 0.0
    steps: int = 0

    def eta_s(self, done: float, total: float, seconds: Json) -> float | None:
        """What is left to do at the pace of the steps done here; None before the first of them."""
        if isinstance(seconds, int | float):
            self.spent_s, self.steps = self.spent_s + seconds, self.steps + 1
        return self.spent_s / self.steps * max(0.0, total - done) if self.steps else None


class Console:
    """One a command. With `--json` stdout gets exactly one object, also for an error."""

    def __init__(
        self, *, as_json: bool = False, as_lines: bool = False, quiet: bool = False, verbose: bool = False
    ) -> None:
        self.as_json = as_json
        self.as_lines = as_lines
        self.quiet = quiet
        self.verbose = verbose
        self._out = sys.stdout  # as it is now: a stage may hide it from a library that prints
        self._start = time.monotonic()
        self._pace = _Pace(None)
        self._bar: Bar | None = None

    def progress(self, line: str, /, **facts: Json) -> None:
        """See `llmopt.artifacts.outcome.Progress`. On a terminal what counts steps becomes a bar; a load is seen."""
        if self.quiet and not self.as_lines:
            return
        facts = self._with_eta(facts)
        if self.as_lines:
            time_s = round(time.monotonic() - self._start, 3)
            self._print_json({"event": "progress", "line": line, "time_s": time_s} | facts)
        elif facts.get("stage") == "load":  # twice a second: to be watched, not to be read in a log
            if _is_terminal():
                self._drawn().watch(facts)
        elif (facts.get("watched") and not _is_terminal()) or (self._on_bar(facts) and not self.verbose):
            return
        else:
            self._say(line)

    def detail(self, line: str) -> None:
        """Said with `--verbose` only."""
        if self.verbose:
            self.progress(line)

    def result(self, text: str, value: Mapping[str, Any]) -> None:
        self.close()
        if self.as_lines:
            self._print_json({"event": "result", **value})
        elif self.as_json:
            self._print_json(value)
        else:
            print(text, file=self._out, flush=True)

    def error(self, error: LlmoptError) -> None:
        self.close()
        if self.verbose:
            traceback.print_exception(error)
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"\nhint: {error.hint}", file=sys.stderr)
        code = int(error.code)
        if self.as_lines:
            self._print_json({"event": "error", "message": error.message, "hint": error.hint, "code": code})
        elif self.as_json:
            self._print_json({"error": error.message, "hint": error.hint, "exit_code": code})

    def close(self) -> None:
        """Leave the bar, if there is one, as it is: from here on others write to the terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _with_eta(self, facts: dict[str, Json]) -> dict[str, Json]:
        stage, done, total = facts.get("stage"), facts.get("done"), facts.get("total")
        if not isinstance(done, int | float) or not isinstance(total, int | float):
            return facts
        if stage != self._pace.stage:
            self._pace = _Pace(stage)
        eta_s = self._pace.eta_s(done, total, facts.get("seconds"))
        return facts if eta_s is None else {**facts, "eta_s": round(eta_s, 1)}

    def _on_bar(self, facts: Mapping[str, Json]) -> bool:
        """Show a step on the bar; whether it is a block's, of which the bar says all that its line would."""
        if "total" not in facts or not _is_terminal():
            return False
        self._drawn().update(facts)
        return "block" in facts

    def _drawn(self) -> Bar:
        if self._bar is None:
            from llmopt.cli.bar import Bar

            self._bar = Bar()
        return self._bar

    def _say(self, line: str) -> None:
        stamp = f"[{time.monotonic() - self._start:7.1f} s] " if self.verbose else ""
        if self._bar is not None:
            self._bar.say(stamp + line)
        else:
            print(stamp + line, file=sys.stderr, flush=True)

    def _print_json(self, value: Mapping[str, Any]) -> None:
        print(json.dumps(value, ensure_ascii=False, default=str), file=self._out, flush=True)


def _is_terminal() -> bool:
    """Whether stderr is one on which a line can be drawn again."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


#: The console of the command that is running; `main` replaces it once the command has read its flags.
current = Console()


def start(*, as_json: bool, quiet: bool, verbose: bool, as_lines: bool = False) -> Console:
    """The console for a command with these flags, from here on also the one for its errors."""
    global current
    current = Console(as_json=as_json, as_lines=as_lines, quiet=quiet, verbose=verbose)
    return current
