"""Serves an engine for the time of a measurement, and leaves no process behind whatever happens.

The server is stopped when the block ends, by an error or Ctrl-C too. Should bench itself be killed, the kernel kills
the server: it asks for that (PR_SET_PDEATHSIG) before it becomes the server's program. Where there is no such call
(not Linux), a bench that is killed can leave its server running.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llmopt.errors import LlmoptError, MeasurementInvalidError

START_TIMEOUT_S = 900.0  # a large engine is compiled for its device at its first start
_STOP_TIMEOUT_S = 10.0
_LAST_LINES = 12
_READY = re.compile(r"ready (https?://\S+)")

# Runs in a bare interpreter that then becomes the server. Not a `preexec_fn`: Python code between fork and exec can
# deadlock when the parent has threads, and torch and the tokenizers have. The parent may have died before the call.
_DIE_WITH_PARENT = """
import os, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]}: {error}")
"""


def serve_command(engine: Path) -> list[str]:
    """The command line that serves `engine` on a free port and says `ready http://HOST:PORT` on stdout."""
    return [sys.executable, "-m", "llmopt", "serve", str(engine), "--host", "127.0.0.1", "--port", "0"]


@dataclass(frozen=True, slots=True)
class Server:
    """A running server. `log` has what it writes to stderr (and to stdout, but for the ready line)."""

    name: str
    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def check_alive(self, patience_s: float) -> None:
        """Raises MeasurementInvalidError with the log's last lines if the server dies within `patience_s`.

        A dying process closes its sockets before its end can be seen, so wait a little where requests were cut.
        """
        with suppress(subprocess.TimeoutExpired):
            code = self.process.wait(patience_s)
            raise MeasurementInvalidError(
                f"the server of `{self.name}` died under load ({_how(code)})", hint=last_lines(self.log)
            )


@contextmanager
def serving(
    name: str,
    engine: Path,
    log: Path,
    command: Callable[[Path], Sequence[str]] = serve_command,
    *,
    start_timeout_s: float = START_TIMEOUT_S,
) -> Iterator[Server]:
    """Start the server of `engine`, wait until it is ready, stop it at the end. Its output is appended to `log`.

    Raises LlmoptError with the log's last lines if it does not come up. Call it from a thread that outlives the block:
    the kernel takes the end of the calling thread for the death of the parent.
    """
    with log.open("ab") as log_file:
        process = _start(name, command(engine), log_file)
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read_lines, args=(process, lines, log), daemon=True)
        try:
            reader.start()
            url = _wait_until_ready(name, process, lines, log, start_timeout_s)
            yield Server(name, url, log, process)
        finally:
            _stop(process)
            reader.join(_STOP_TIMEOUT_S)


def last_lines(log: Path) -> str:
    """The end of a server's log, for a hint."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    if not lines:
        return f"its log `{log.name}` is empty"
    return f"the last lines of its log `{log.name}`:\n" + "\n".join(f"  {line[:500]}" for line in lines[-_LAST_LINES:])


def _start(name: str, command: Sequence[str], log_file: IO[bytes]) -> subprocess.Popen[bytes]:
    bare = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())]
    try:
        return subprocess.Popen(
            [*bare, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log_file,
            start_new_session=True,  # Ctrl-C at the terminal is for bench, which then stops the server
        )
    except OSError as error:
        raise LlmoptError(f"the server of `{name}` cannot be started: {error}") from None


def _read_lines(process: subprocess.Popen[bytes], lines: queue.Queue[str | None], log: Path) -> None:
    """Read the server's stdout to its end: the ready line goes to `lines`, all else to the log; None is the end."""
    assert process.stdout is not None
    ready = False
    with process.stdout:
        for line in process.stdout:
            match = None if ready else _READY.fullmatch(line.decode(errors="replace").strip())
            if match:
                ready = True
                lines.put(match[1])
            else:
                with suppress(OSError), log.open("ab") as file:
                    file.write(line)
    lines.put(None)


def _wait_until_ready(
    name: str, process: subprocess.Popen[bytes], lines: queue.Queue[str | None], log: Path, timeout_s: float
) -> str:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        try:
            url = lines.get(timeout=0.2)
        except queue.Empty:
            if process.poll() is None:
                continue
            url = None  # it has ended, and something that it started holds its stdout
        if url is not None:
            return url
        with suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        raise LlmoptError(f"the server of `{name}` did not start ({_how(process.returncode)})", hint=last_lines(log))
    raise LlmoptError(f"the server of `{name}` was not ready within {timeout_s:g} s", hint=last_lines(log))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end, then kill what is left of its group."""
    try:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_TIMEOUT_S)
    finally:  # also where a second Ctrl-C ends the waiting
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return "it closed its stdout" if code is None else f"exit code {code}"
