"""Which stored files have been read through and found right, for as long as they look as they did then.

A hit would otherwise read every byte of the model again. A line a file: digest, inode, size, and the times of its last
change and of its last status change, which no user can set. Source for the idea: git's index, "racy git".
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock

from llmopt.artifacts import disk, layout

_Mark = tuple[int, int, int, int]
_LINE = re.compile(rb"^([0-9a-f]{64}) (\d{1,20}) (\d{1,20}) (\d{1,20}) (\d{1,20})$", re.MULTILINE)
_SPOILT: _Mark = (0, 0, 0, 0)  # what no file looks like
_LINE_BYTES = 120  # about
_MOST_BYTES = 1 << 20  # of the log, before it is written anew
#: A second change within the same tick of the file system's clock would leave the same times. A time of whole seconds
#: is one of a file system that has no finer ones, the coarsest of which counts in twos.
_TICK_NS, _COARSE_TICK_NS = 10_000_000, 3_000_000_000


class Verified:
    """Shared by all processes on one store; a damaged, lost or read-only log costs only a second reading."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._lock = Lock()
        self._marks: dict[str, _Mark] = {}
        self._own: set[str] = set()  # read through by this very process
        self._inode, self._read_bytes = 0, 0  # of the log, as far as it was read

    def holds(self, sha256: str, found: os.stat_result, *, here: bool = False) -> bool:
        """Whether the file was right when it looked like this; `here`: only if this process has read it."""
        if here and sha256 not in self._own:
            return False
        mark = _mark(found)
        if self._marks.get(sha256) == mark:
            return True
        with self._lock:
            self._catch_up()
        return self._marks.get(sha256) == mark

    @staticmethod
    def settle(found: os.stat_result) -> bool:
        """Wait until a change from now on would show in the times of the file; false where that takes too long."""
        changed = found.st_ctime_ns
        tick = _TICK_NS if changed % 1_000_000_000 else _COARSE_TICK_NS
        age = time.time_ns() - changed
        if 0 <= age < tick == _TICK_NS:
            time.sleep((tick - age) / 1e9)
            return True
        return age >= tick

    def record(self, found: Mapping[str, os.stat_result]) -> None:
        """These files were read through and looked like this before and after."""
        self._own |= self._remember({sha256: _mark(status) for sha256, status in found.items() if self.settle(status)})

    def renew(self, found: Mapping[str, tuple[os.stat_result, os.stat_result]]) -> None:
        """These files looked like the first and were right; then links to them came or went, which changes one time."""
        self._remember(
            {
                sha256: _mark(after)
                for sha256, (before, after) in found.items()
                if before.st_ctime_ns != after.st_ctime_ns and relinked(before, after) and self.settle(after)
            }
        )

    def forget(self, sha256: str) -> None:
        """Read it again before this process uses it."""
        self._marks.pop(sha256, None)
        self._own.discard(sha256)

    def spoil(self, sha256s: Iterable[str]) -> None:
        """These are not right, whatever they look like: no process is to use them unread."""
        self._own -= self._remember(dict.fromkeys(sha256s, _SPOILT))

    def compact(self) -> None:
        """Write the log anew with what still holds. A line that another process adds meanwhile may be lost."""
        with self._lock, suppress(OSError):
            self._catch_up(whole=True)
            for sha256, mark in list(self._marks.items()):
                try:
                    holds = _mark((self._log.parent / layout.blob(sha256)).lstat()) == mark
                except OSError:
                    holds = False
                if not holds:
                    self.forget(sha256)
            with disk.temporary(self._log.parent / "tmp") as aside:
                (aside / "log").write_bytes(_lines(self._marks))
                (aside / "log").replace(self._log)

    def _remember(self, marks: Mapping[str, _Mark]) -> set[str]:
        with self._lock:
            self._marks |= marks
        if marks:
            with suppress(OSError):
                descriptor = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
                try:
                    os.write(descriptor, _lines(marks))
                finally:
                    os.close(descriptor)
        return set(marks)

    def _catch_up(self, *, whole: bool = False) -> None:
        """Read what others have added since, in whole lines; a line that is no mark is passed over."""
        with suppress(OSError), self._log.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if whole or status.st_ino != self._inode or status.st_size < self._read_bytes:  # written anew
                self._inode, self._read_bytes = status.st_ino, 0
            file.seek(self._read_bytes)
            data = file.read()
            data = data[: data.rfind(b"\n") + 1]
            self._read_bytes += len(data)
            for line in _LINE.finditer(data):
                inode, size, changed, altered = map(int, line.groups()[1:])
                self._marks[line[1].decode()] = (inode, size, changed, altered)

    def is_long(self) -> bool:
        """Whether most of the log has no meaning any more."""
        return self._read_bytes > max(_MOST_BYTES, 2 * _LINE_BYTES * len(self._marks))


def relinked(before: os.stat_result, after: os.stat_result) -> bool:
    """Whether only the number of links, and with it the time of the status, may have changed."""
    return _mark(before)[:3] == _mark(after)[:3]


def same(before: os.stat_result, after: os.stat_result) -> bool:
    return _mark(before) == _mark(after)


def _lines(marks: Mapping[str, _Mark]) -> bytes:
    return "".join(" ".join((sha256, *map(str, mark))) + "\n" for sha256, mark in marks.items()).encode()


def _mark(found: os.stat_result) -> _Mark:
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
