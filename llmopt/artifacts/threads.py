"""Several transfers at once, of which the first that fails ends all; and waiting that Ctrl-C ends.

Only the main thread is told of Ctrl-C, and only between steps of Python: it is never to be inside a library that waits
for a server. Threads are daemons, so that one that hangs does not keep the process.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Iterable, Sized
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

SMALL_AT_ONCE = 24
_PATIENCE_S = 1.0  # with what is under way when a user has enough of it
_left: set[threading.Thread] = set()


def do_all(count: int, jobs: Iterable[Callable[[], Any]]) -> None:
    """Do all, `count` at once; each is taken from the iterable, by one thread at a time, when there is a thread for it.

    The first error ends it: what has begun is waited for, unless it is Ctrl-C.
    """
    remaining, taking, stopped = iter(jobs), threading.Lock(), threading.Event()
    ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def take() -> Callable[[], Any] | None:
        with taking:
            return None if stopped.is_set() else next(remaining, None)

    def work() -> None:
        try:
            while (job := take()) is not None:
                job()
        except BaseException as error:
            stopped.set()
            ended.put(error)
        else:
            ended.put(None)

    count = min(count, len(jobs)) if isinstance(jobs, Sized) else count
    threads = [threading.Thread(target=work, daemon=True, name="llmopt-transfer") for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
        errors = [ended.get() for _ in threads]
    except BaseException:
        stopped.set()
        _leave(*threads)
        raise
    if error := next((error for error in errors if error is not None), None):
        raise error


def apart(work: Callable[[], T], *, patience_s: float | None = None) -> T:
    """The result of the work, for which the main thread waits so that Ctrl-C gets through.

    TimeoutError where that takes longer than `patience_s`; the work is left behind.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    thread, answer = _begun(work)
    try:
        done, value = answer.get(timeout=patience_s)
    except Empty:
        _leave(thread)
        raise TimeoutError from None
    except BaseException:
        _leave(thread)
        raise
    if not done:
        raise value
    result: T = value
    return result


def briefly(work: Callable[[], Any]) -> None:
    """Do it if it takes no longer than a moment; that it fails is no matter."""
    thread, answer = _begun(work)
    with suppress(Empty):
        answer.get(timeout=_PATIENCE_S)
        return
    _leave(thread)


def _begun(work: Callable[[], Any]) -> tuple[threading.Thread, SimpleQueue[tuple[bool, Any]]]:
    answer: SimpleQueue[tuple[bool, Any]] = SimpleQueue()

    def run() -> None:
        try:
            answer.put((True, work()))
        except BaseException as error:
            answer.put((False, error))

    thread = threading.Thread(target=run, daemon=True, name="llmopt-transfer")
    thread.start()
    return thread, answer


def _leave(*threads: threading.Thread) -> None:
    """A library that comes back while Python is being taken down would crash, so the end waits a moment for it."""
    if not _left:
        atexit.register(_wait_for_left)
    _left.update(thread for thread in threads if thread.is_alive())


def _wait_for_left() -> None:
    deadline = time.monotonic() + _PATIENCE_S
    with suppress(KeyboardInterrupt):  # who presses Ctrl-C again does not want to wait
        for thread in _left:
            thread.join(max(0.0, deadline - time.monotonic()))
