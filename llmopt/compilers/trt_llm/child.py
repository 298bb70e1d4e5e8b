"""A command as a child that cannot outlive us: its output in a log, followed while it runs; why it failed, in words."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from llmopt.artifacts.outcome import Progress
from llmopt.compilers.trt_llm import supervise

_GRACE_S = 10.0  # from being asked to end to being killed
_MARGIN_S = 30.0  # for the supervisor itself, and `docker rm`
_POLL_S = 0.2
_TAIL_BYTES = 65536
_LAST_LINES = 20

#: Which memory was not enough, by what is written then: of the GPU, by TensorRT, CUDA and PyTorch; of the machine. The
#: last is how a worker that the system killed looks to its parent. Sources: logs in NVIDIA/TensorRT-LLM#346,
#: NVIDIA/TensorRT#840 and pytorch/TensorRT#2675, PyTorch's own messages, Python's concurrent.futures.
_OUT_OF_MEMORY: Mapping[str, re.Pattern[str]] = {
    "ran out of GPU memory": re.compile(
        r"Error Code 2: OutOfMemory|Requested amount of GPU memory|CUDA out of memory|cuda\.OutOfMemoryError"
        r"|torch\.OutOfMemoryError|CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation|Error in allocate: 2"
        r"|insufficient memory.*could not find any implementation",
        re.IGNORECASE | re.DOTALL,
    ),
    "ran out of memory": re.compile(
        r"^MemoryError|std::bad_alloc|Cannot allocate memory|DefaultCPUAllocator: .*memory", re.MULTILINE
    ),
    "was killed, as by a system that ran out of memory": re.compile(
        r"BrokenProcessPool|terminated abruptly|^Killed$", re.MULTILINE
    ),
}


@contextmanager
def running(
    command: Sequence[str],
    log: Path,
    progress: Progress,
    *,
    folder: Path,
    environment: Mapping[str, str],
    cleanup: Sequence[str] = (),
) -> Iterator[Child]:
    """Start `command` in `folder`; when the block ends, however it does, no process of it is left.

    Its output is appended to `log`. Call it from a thread that outlives the block: the kernel takes the end of the
    calling thread for the death of the parent.
    """
    how = {"command": [*command], "parent": os.getpid(), "grace_s": _GRACE_S, "cleanup": [*cleanup]}
    with log.open("ab") as file:
        seen = file.tell()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", supervise.__file__, json.dumps(how)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, **environment},
            start_new_session=True,  # Ctrl-C at the terminal is for us, who then end it
        )
    child = Child(process, log, progress, seen)
    try:
        yield child
    finally:
        child.stop()


class Child:
    """A command under supervision."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, progress: Progress, seen: int) -> None:
        self._process = process
        self._log = log
        self._progress = progress
        self._seen = seen  # bytes of the log that were passed on

    def poll(self, timeout_s: float = _POLL_S) -> int | None:
        """Its exit code once it has ended, 128 + N by signal N; None if it has not within the time.

        What it wrote meanwhile goes to `progress`, line by line.
        """
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        self._pass_on(ended=self._process.returncode is not None)
        return self._process.returncode

    def stop(self) -> None:
        """Blocks until all of it has ended; a second Ctrl-C ends the grace."""
        try:
            self._end(_GRACE_S + _MARGIN_S)
        except KeyboardInterrupt:
            self._end(_MARGIN_S)
            raise

    def _end(self, patience_s: float) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:  # a process that hangs in the driver cannot be killed by anyone
            self._process.kill()
            self._process.wait()

    def _pass_on(self, *, ended: bool) -> None:
        with self._log.open("rb") as file:
            file.seek(self._seen)
            data = file.read()
        whole = len(data) if ended else data.rfind(b"\n") + 1
        self._seen += whole
        for line in data[:whole].decode(errors="replace").split("\n"):
            words = line.rpartition("\r")[2].strip()  # of a progress bar, its last state
            if words:
                self._progress(words[:500])


def how(code: int) -> str:
    """An exit code in words."""
    if code > 128:
        with suppress(ValueError):
            return f"killed by {signal.Signals(code - 128).name}"
    return f"exit code {code}"


def out_of_memory(log: Path, code: int) -> str | None:
    """That a command which failed wanted more memory than there was, and which; None where nothing says so."""
    text = _tail(log)
    for words, pattern in _OUT_OF_MEMORY.items():
        if pattern.search(text):
            return words
    return [*_OUT_OF_MEMORY][-1] if code == 128 + signal.SIGKILL else None


def last_lines(log: Path) -> str:
    """Where the log is and how it ends, for a hint."""
    lines = [line.rpartition("\r")[2] for line in _tail(log).splitlines() if line.strip()]
    if not lines:
        return f"its log `{log}` is empty"
    return f"the last lines of its log `{log}`:\n" + "\n".join(f"  {line[:500]}" for line in lines[-_LAST_LINES:])


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        return file.read().decode(errors="replace")
