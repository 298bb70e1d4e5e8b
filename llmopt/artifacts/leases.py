"""Who uses an artifact of a store on disk: a locked file each, which the system lets go of with the process.

Writers share one lock, and what removes things has it alone: while it does, nothing is being published. It waits
behind a gate that it closes, so that writers, however many, do not keep it out.
"""

from __future__ import annotations

import fcntl
import os
import time
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmopt.artifacts import layout
from llmopt.artifacts.disk import is_open_as
from llmopt.errors import LlmoptError

_GATE, _WRITERS = ".gate", ".writers"
_PATIENCE_S = 60.0


class Leases:
    """Of one process; they end with it, or with this object."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, int] = {}
        self._published: set[str] = set()  # those held only since they were published here
        weakref.finalize(self, _close, self._held)

    def take(self, digest: str, *, published: bool = False) -> None:
        """Keep the artifact from being removed from now on. Where nothing can be written, nothing removes either."""
        if not published:
            self._published.discard(digest)
        elif digest not in self._held:
            self._published.add(digest)
        if digest in self._held:
            with suppress(OSError):
                os.utime(self._held[digest])
            return
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            while True:
                lease = os.open(self._folder / digest, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(lease, fcntl.LOCK_SH)
                if is_open_as(lease, self._folder / digest):
                    break
                os.close(lease)  # it was removed, with the artifact, while this waited
            self._held[digest] = lease
            os.utime(lease)

    def release_published(self, *, but: Collection[str]) -> None:
        """Let go of what this process has only published, but for these."""
        for digest in self._published.difference(but):
            self._published.discard(digest)
            if (lease := self._held.pop(digest, None)) is not None:
                os.close(lease)

    def last_used(self, digest: str) -> float:
        """Seconds since 1970; 0 for never."""
        try:
            return (self._folder / digest).stat().st_mtime
        except OSError:
            return 0.0

    def in_use(self, digest: str) -> bool:
        """Whether a process uses the artifact now."""
        try:
            lease = os.open(self._folder / digest, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        try:
            return not _alone(lease)
        finally:
            os.close(lease)

    @contextmanager
    def alone(self, digest: str) -> Iterator[bool]:
        """Whether no process uses the artifact, and for as long as this lasts none will begin to."""
        try:
            lease = self._opened(digest)
        except OSError:
            yield False
            return
        try:
            yield _alone(lease)
        finally:
            os.close(lease)

    def forget(self, digest: str) -> None:
        (self._folder / digest).unlink(missing_ok=True)

    def digests(self) -> list[str]:
        """Of all artifacts that somebody has used, whether they are there or not."""
        try:
            return [name for name in os.listdir(self._folder) if layout.HEX.fullmatch(name)]  # noqa: PTH208
        except OSError:
            return []

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """While this lasts, nothing is removed from the store. Not to be done twice by one process at a time."""
        gate, lock = self._opened_lock(_GATE), self._opened_lock(_WRITERS)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(gate, fcntl.LOCK_SH)
                fcntl.flock(lock, fcntl.LOCK_SH)
                fcntl.flock(gate, fcntl.LOCK_UN)
            yield
        finally:
            os.close(gate)
            os.close(lock)

    @contextmanager
    def removing(self) -> Iterator[None]:
        """While this lasts, nothing is published. LlmoptError when writers do not come to an end."""
        gate, lock, give_up = self._opened_lock(_GATE), self._opened_lock(_WRITERS), time.monotonic() + _PATIENCE_S
        try:
            _lock_until(gate, give_up)
            _lock_until(lock, give_up)
            yield
        finally:
            os.close(lock)
            os.close(gate)

    def _opened(self, digest: str) -> int:
        """Of an artifact that nobody has used yet, a file that says so."""
        path = self._folder / digest
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self._folder.mkdir(parents=True, exist_ok=True)
            lease = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.utime(lease, (0, 0))
            return lease

    def _opened_lock(self, name: str) -> int:
        self._folder.mkdir(parents=True, exist_ok=True)
        return os.open(self._folder / name, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _alone(lease: int) -> bool:
    try:
        fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _lock_until(lock: int, give_up_s: float) -> None:
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > give_up_s:
                raise LlmoptError(
                    "other processes have been publishing to the store, or removing from it, for a minute",
                    hint="run it again when they are done",
                ) from None
            time.sleep(0.02)
        except OSError as error:
            raise LlmoptError(
                f"nothing can be removed safely: the disk of the store has no locks ({error.strerror})",
                hint="move the store to a local disk",
            ) from error


def _close(held: dict[str, int]) -> None:
    for lease in held.values():
        with suppress(OSError):
            os.close(lease)
