"""Transfers at once: so many and no more, each begun when its turn comes; the first error ends all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from llmopt.artifacts.threads import apart, briefly, do_all


def test_does_all() -> None:
    done: list[int] = []
    do_all(4, [lambda number=number: done.append(number) for number in range(100)])  # type: ignore[misc]
    assert sorted(done) == list(range(100))


def test_does_none() -> None:
    do_all(4, [])


def test_takes_a_job_when_there_is_a_thread_for_it() -> None:
    taken, done, ahead = [0], [0], [0]

    def jobs() -> Iterator[Callable[[], None]]:
        for _ in range(200):
            taken[0] += 1
            ahead[0] = max(ahead[0], taken[0] - done[0])
            yield job

    def job() -> None:
        done[0] += 1

    do_all(8, jobs())
    assert done == [200]
    assert ahead[0] <= 9  # one that is being taken


def test_the_first_error_ends_those_that_have_not_begun() -> None:
    done: list[int] = []
    release = threading.Event()

    def fail() -> None:
        release.set()
        raise ValueError("first")

    def late() -> None:
        release.wait(10)
        done.append(1)

    with pytest.raises(ValueError, match="first"):
        do_all(2, [late, fail, *[lambda: done.append(2)] * 10])
    assert done == [1]


def test_an_error_in_finding_jobs_is_raised() -> None:
    def jobs() -> Iterator[Callable[[], None]]:
        yield lambda: None
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        do_all(2, jobs())


def test_apart_gives_the_result_or_the_error() -> None:
    assert apart(lambda: 3) == 3
    with pytest.raises(ValueError, match="it"):
        apart(lambda: int("it"))


def test_apart_is_a_thread_only_in_the_main_one() -> None:
    assert apart(threading.current_thread) is not threading.main_thread()
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(apart(threading.current_thread) is thread))
    thread.start()
    thread.join()
    assert seen == [True]


def test_briefly_does_not_wait_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmopt.artifacts import threads

    monkeypatch.setattr(threads, "_PATIENCE_S", 0.01)
    released = threading.Event()
    briefly(lambda: released.wait(10))
    released.set()
