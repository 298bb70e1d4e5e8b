"""Runs a command and leaves none of its processes behind: `python -I -S supervise.py JSON`.

TensorRT-LLM starts its workers through MPI, in process groups of their own, so that ending the group of `trtllm-serve`
leaves them with the GPU's memory (ai-dynamo/dynamo#7122). This process is the one that orphans fall to
(PR_SET_CHILD_SUBREAPER): whatever the command started, however deep and in whichever group, ends with it. It also asks
to be told when its own parent dies (PR_SET_PDEATHSIG), so a killed llmopt leaves nothing either. Linux only.

SIGTERM, SIGINT or the parent's death: SIGTERM to the command's group, and after `grace_s`, or at once when asked again,
SIGKILL to all that is left. Its exit code is the command's, 128 + N where signal N ended that, 127 where it could not
be started. It imports nothing but the standard library: it runs in a bare interpreter.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_STOP = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_AWAITED = _STOP | {signal.SIGCHLD}
_KILLED = 128 + signal.SIGKILL


def supervise(command: list[str], *, parent: int, grace_s: float, cleanup: list[str]) -> int:
    """Run `command` to its end. `cleanup` is a command run after it unless it succeeded, for what lives elsewhere."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:  # it died before that call
        return _KILLED
    try:
        leader = _spawn(command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    code = _wait(leader, grace_s)
    _end_all()
    if code != 0 and cleanup:
        _clean(cleanup)
    return _KILLED if code is None else 128 - code if code < 0 else code


def _wait(leader: int, grace_s: float) -> int | None:
    """The leader's exit code, -N where signal N ended it; None if it outlived what it was given to end in."""
    deadline_s: float | None = None
    while (code := _reap(leader)) is None:
        left_s = 3600.0 if deadline_s is None else deadline_s - time.monotonic()
        told = signal.sigtimedwait(_AWAITED, max(0.0, left_s))
        if told is None and deadline_s is not None:
            return None
        if told is not None and told.si_signo in _STOP:
            if deadline_s is not None:
                return None
            deadline_s = time.monotonic() + grace_s
            _kill(-leader, signal.SIGTERM)
    return code


def _reap(leader: int) -> int | None:
    """Bury whoever has ended; the leader's exit code if it was among them."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if pid == 0:
            return None
        if pid == leader:
            return os.waitstatus_to_exitcode(status)


def _end_all() -> None:
    """Kill all descendants: children of a killed process become ours, and are killed in the next turn."""
    while True:
        for pid in _children():
            _kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parent = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) == os.getpid():
            found.append(int(folder.name))
    return found


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _clean(command: list[str]) -> None:
    try:
        os.waitpid(_spawn(command), 0)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)


def _spawn(command: list[str]) -> int:
    """Start it as the leader of a session of its own, with signals as a shell would give them to it."""
    return os.posix_spawnp(
        command[0],
        command,
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
        setsid=True,
        setsigmask=[],
        setsigdef=[*_AWAITED, signal.SIGPIPE],
    )


if __name__ == "__main__":
    sys.exit(supervise(**json.loads(sys.argv[1])))
