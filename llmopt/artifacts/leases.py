"""Who uses an artifact of a store on disk: a locked file each, which the system lets go of with the process.

Writers share one lock, and what removes things has it alone: while it does, nothing is being published.
"""

from __future__ import annotations

import fcntl
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmopt.artifacts.disk import is_open_as
from llmopt.errors import LlmoptError

_WRITERS = ".writers"
_PATIENCE_S = 60.0


class Leases:
    """Of one process; they end with it, or with this object."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, int] = {}
        weakref.finalize(self, _close, self._held)

    def take(self, digest: str) -> None:
        """Keep the artifact from being removed from now on. Where nothing can be written, nothing removes either."""
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

    def last_used(self, digest: str) -> float:
        """Seconds since 1970; 0 for never."""
        try:
            return (self._folder / digest).stat().st_mtime
        except OSError:
            return 0.0

    @contextmanager
    def alone(self, digest: str) -> Iterator[bool]:
        """Whether no other process uses the artifact, and for as long as this lasts none will begin to."""
        try:
            lease = os.open(self._folder / digest, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            yield False
            return
        try:
            try:
                fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            yield True
        finally:
            os.close(lease)

    def forget(self, digest: str) -> None:
        (self._folder / digest).unlink(missing_ok=True)

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """While this lasts, nothing is removed from the store."""
        lock = self._writers_lock()
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_SH)
            yield
        finally:
            os.close(lock)

    @contextmanager
    def removing(self) -> Iterator[None]:
        """While this lasts, nothing is published. LlmoptError when writers do not come to an end."""
        lock, give_up = self._writers_lock(), time.monotonic() + _PATIENCE_S
        try:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > give_up:
                        raise LlmoptError(
                            "other processes have been publishing to the store for a minute",
                            hint="run it again when they are done",
                        ) from None
                    time.sleep(0.02)
                except OSError as error:
                    raise LlmoptError(
                        f"nothing can be removed safely: the disk of the store has no locks ({error.strerror})",
                        hint="move the store to a local disk",
                    ) from error
            yield
        finally:
            os.close(lock)

    def _writers_lock(self) -> int:
        self._folder.mkdir(parents=True, exist_ok=True)
        return os.open(self._folder / _WRITERS, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _close(held: dict[str, int]) -> None:
    for lease in held.values():
        with suppress(OSError):
            os.close(lease)
