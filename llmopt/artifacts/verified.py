"""Which stored files have been read through and found right, for as long as they look as they did then.

A hit would otherwise read every byte of the model again. A line a file: digest, inode, size, and the times of its last
change and of its last status change, which no user can set. Source for the idea: git's index, "racy git".
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_Mark = tuple[int, int, int, int]
_MOST_BYTES = 4 << 20  # of the log, before it is written anew
#: A change within the same tick of the kernel's clock would leave the same times.
_TICK_NS = 10_000_000


class Verified:
    """Shared by all processes on one store; a damaged, lost or read-only log costs only a second reading."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._marks: dict[str, _Mark] = {}
        self._own: set[str] = set()  # read through by this very process
        self._read_bytes = 0

    def holds(self, sha256: str, found: os.stat_result, *, here: bool = False) -> bool:
        """Whether the file was right when it looked like this; `here`: only if this process has read it."""
        if here and sha256 not in self._own:
            return False
        mark = _mark(found)
        if self._marks.get(sha256) == mark:
            return True
        self._catch_up()
        return self._marks.get(sha256) == mark

    def record(self, found: Mapping[str, os.stat_result]) -> None:
        """These files were read through and looked like this before and after."""
        if not found:
            return
        youngest = max(status.st_ctime_ns for status in found.values())
        if 0 <= (age := time.time_ns() - youngest) < _TICK_NS:
            time.sleep((_TICK_NS - age) / 1e9)
        lines = []
        for sha256, status in found.items():
            self._marks[sha256] = mark = _mark(status)
            self._own.add(sha256)
            if status.st_ctime_ns % 1_000_000_000:  # else the file system counts whole seconds: too coarse to trust
                lines.append(" ".join((sha256, *map(str, mark))) + "\n")
        with suppress(OSError):
            descriptor = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.write(descriptor, "".join(lines).encode())
            finally:
                os.close(descriptor)

    def renew(self, sha256: str, before: os.stat_result, after: os.stat_result) -> bool:
        """A file that was right was linked to, which changed its times; whether it still counts as right."""
        if self._marks.get(sha256) != _mark(before) or _mark(before)[:3] != _mark(after)[:3]:
            return False
        if before.st_ctime_ns != after.st_ctime_ns:
            own = sha256 in self._own
            self.record({sha256: after})
            if not own:
                self._own.discard(sha256)
        return True

    def forget(self, sha256: str) -> None:
        self._marks.pop(sha256, None)
        self._own.discard(sha256)

    def _catch_up(self) -> None:
        """Read what others have added since; a line that is no mark is passed over."""
        with suppress(OSError), self._log.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < self._read_bytes:  # written anew
                self._read_bytes = 0
            file.seek(self._read_bytes)
            data = file.read()
            self._read_bytes += len(data)
            for line in data.decode(errors="replace").splitlines():
                parts = line.split(" ")
                if len(parts) == 5 and all(part.isdigit() for part in parts[1:]):
                    inode, size, changed, status = map(int, parts[1:])
                    self._marks[parts[0]] = (inode, size, changed, status)
        if self._read_bytes > _MOST_BYTES:
            self._rewrite()

    def _rewrite(self) -> None:
        lines = [" ".join((sha256, *map(str, mark))) + "\n" for sha256, mark in self._marks.items()]
        fresh = self._log.with_name(f"{self._log.name}.{os.getpid()}")
        with suppress(OSError):
            fresh.write_text("".join(lines))
            self._read_bytes = fresh.stat().st_size
            fresh.replace(self._log)


def _mark(found: os.stat_result) -> _Mark:
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
