"""Run a command in this process, as the console script would."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llmopt.cli.app import main


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout, which must be one JSON object and nothing else."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value

    @property
    def error(self) -> str:
        """The message and hint on stderr, without progress before them."""
        return self.err[self.err.index("error: ") :]


RunCommand = Callable[..., Ran]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMOPT_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def llmopt(store: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[RunCommand]:
    """llmopt("quantize", folder, "--bits", 3) -> Ran, with a store of the test's own."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> Ran:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capfd.readouterr())

    yield run
    signal.signal(signal.SIGTERM, before)


OnATerminal = Callable[..., tuple[str, str]]


@pytest.fixture
def on_a_terminal() -> OnATerminal:
    """on_a_terminal(code, "argument", NO_COLOR="1") -> stdout of that Python, and what a terminal on stderr got."""

    def run(work: str, *arguments: str, **environment: str) -> tuple[str, str]:
        ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30", **environment}
        command = [sys.executable, "-c", work, *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment)
        os.close(theirs)
        sent = bytearray()
        with contextlib.closing(os.fdopen(ours, "rb", buffering=0)) as terminal:
            while True:
                try:
                    part = terminal.read(4096)
                except OSError:  # EIO: so Linux says that the other side has closed
                    break
                if not part:
                    break
                sent += part
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0, sent.decode()
        return out.decode(), sent.decode()

    return run
