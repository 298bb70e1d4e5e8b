"""Ctrl-C (or a SIGTERM that is heeded) as something that a loop can wait for: an exception would lose some work."""

from __future__ import annotations

import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_AGAIN_S = 1.0


@contextmanager
def ctrl_c() -> Iterator[socket.socket]:
    """A socket on which something comes at Ctrl-C; `came` asks it. Who insists a second later gets KeyboardInterrupt.

    At once, twice is once: programs that stop others often signal a process and its group. Nothing comes where the
    process does not heed Ctrl-C, and in threads beside the main one, which gets it.
    """
    ours, theirs = socket.socketpair()
    first_s = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first_s
        now = time.monotonic()
        if first_s and now - first_s > _AGAIN_S:
            raise KeyboardInterrupt
        if not first_s:
            first_s = now
            theirs.send(b"c")

    with ours, theirs:
        before = _heeded() if threading.current_thread() is threading.main_thread() else {}
        for number in before:
            signal.signal(number, note)
        try:
            yield ours
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _heeded() -> dict[signal.Signals, Any]:
    """What would end this process in order, with its handlers: Ctrl-C unless it is ignored, SIGTERM where one is set,
    which is how a CI job is cancelled."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if before[signal.SIGINT] in (signal.SIG_IGN, None):
        del before[signal.SIGINT]
    if not callable(before[signal.SIGTERM]):
        del before[signal.SIGTERM]
    return before


def came(stop: socket.socket) -> bool:
    return bool(select.select([stop], [], [], 0)[0])
