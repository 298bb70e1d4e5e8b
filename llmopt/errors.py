"""The one error a user can act on, and the exit codes that CI reads."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of every command; documented in README.md and part of the CLI's contract."""

    OK = 0
    ERROR = 1
    USAGE = 2
    BACKEND_MISSING = 3
    VERIFICATION_FAILED = 4
    GATE_FAILED = 5
    MEASUREMENT_INVALID = 6
    GATE_INCONCLUSIVE = 7
    INTERRUPTED = 130


class LlmoptError(Exception):
    """A failure the user can act on: what is wrong, and in `hint` what to do about it.

    Caught at one boundary (cli/app.py) and printed without a traceback. Anything else is a bug and keeps its own.
    """

    code: Exit = Exit.ERROR

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class SettingsError(LlmoptError):
    """A setting or an argument that cannot be used."""

    code = Exit.USAGE


class BackendMissingError(LlmoptError):
    """A library or a device that the command needs is not here."""

    code = Exit.BACKEND_MISSING


class CorruptError(LlmoptError):
    """Stored bytes are not the bytes that their digest names."""

    code = Exit.VERIFICATION_FAILED


class MeasurementInvalidError(LlmoptError):
    """The load was not held, so the figures mean nothing."""

    code = Exit.MEASUREMENT_INVALID


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that names the known word nearest to `word`, or else all of them."""
    words = sorted(known)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    if close:
        return f"did you mean `{close[0]}`?"
    return "known: " + ", ".join(f"`{w}`" for w in words)
