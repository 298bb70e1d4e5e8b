"""Several transfers at once, of which the first that fails ends all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

SMALL_AT_ONCE, LARGE_AT_ONCE = 24, 8


@contextmanager
def pool(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads; what has not begun when this is left early is not begun any more."""
    threads = ThreadPoolExecutor(count, thread_name_prefix="llmopt-transfer")
    try:
        yield threads
    except BaseException:
        threads.shutdown(wait=True, cancel_futures=True)
        raise
    threads.shutdown(wait=True)


def do_all(threads: ThreadPoolExecutor, jobs: Iterable[Callable[[], Any]]) -> None:
    """Do all; the first error ends those that have not begun."""
    futures: list[Future[Any]] = [threads.submit(job) for job in jobs]
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in futures:
        if future in done and (error := future.exception()) is not None:
            raise error
