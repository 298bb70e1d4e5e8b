"""Where a command's words go: the result to stdout, progress and logs to stderr. Nothing depends on colour."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any

from llmopt.errors import LlmoptError


class Console:
    """One a command. With `--json` stdout gets exactly one object, also for an error."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.verbose = verbose
        self._start = time.monotonic()

    def progress(self, line: str) -> None:
        if self.quiet:
            return
        stamp = f"[{time.monotonic() - self._start:7.1f} s] " if self.verbose else ""
        print(stamp + line, file=sys.stderr, flush=True)

    def detail(self, line: str) -> None:
        """Said with `--verbose` only."""
        if self.verbose:
            self.progress(line)

    def result(self, text: str, value: Mapping[str, Any]) -> None:
        print(json.dumps(value, ensure_ascii=False, default=str) if self.as_json else text, flush=True)

    def error(self, error: LlmoptError) -> None:
        if self.verbose:
            traceback.print_exception(error)
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"\nhint: {error.hint}", file=sys.stderr)
        if self.as_json:
            self.result("", {"error": error.message, "hint": error.hint, "exit_code": int(error.code)})


#: The console of the command that is running; `main` replaces it once the command has read its flags.
current = Console()


def start(*, as_json: bool, quiet: bool, verbose: bool) -> Console:
    """The console for a command with these flags, from here on also the one for its errors."""
    global current
    current = Console(as_json=as_json, quiet=quiet, verbose=verbose)
    return current
