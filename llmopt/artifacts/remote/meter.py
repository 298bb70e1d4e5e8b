"""How far a transfer is: bytes, rate and time left, told every few seconds; on a terminal, twice a second."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from llmopt.artifacts.disk import byte_size
from llmopt.artifacts.outcome import Json, Progress

_WATCHED_S, _SAID_S = 0.5, 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Moved:
    """What a transfer came to: payload bytes and files that went over the wire, of those of the artifact."""

    files: int
    bytes: int
    seconds: float

    def to_json(self) -> dict[str, Json]:
        return {"files": self.files, "bytes": self.bytes, "seconds": self.seconds}


class Meter:
    """Any number of threads may count on one."""

    def __init__(self, progress: Progress, stage: str, what: str) -> None:
        self._progress, self._stage, self._what = progress, stage, what
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self._next_watch, self._next_line = self._start + _WATCHED_S, self._start + _SAID_S
        self._total = self._moved = self._skipped = self._files = self._done_files = self._of_files = 0

    def expect(self, files: int, size: int) -> None:
        with self._lock:
            self._of_files += files
            self._total += size

    def add(self, count: int, *, files: int = 0) -> None:
        """Bytes have been moved, and files are complete."""
        with self._lock:
            self._moved += count
            self._files += files
            self._done_files += files
            self._tell()

    def skip(self, count: int, *, files: int = 0) -> None:
        """These need not be moved: they are there."""
        with self._lock:
            self._skipped += count
            self._done_files += files
            self._tell()

    def again(self, what: str) -> None:
        self._progress(f"{self._what}: `{what}` came damaged, and is fetched again")

    def end(self) -> Moved:
        seconds = time.monotonic() - self._start
        if self._moved:
            rate = byte_size(int(self._moved / max(seconds, 1e-9)))
            self._progress(f"{self._what}: {self._files} files, {byte_size(self._moved)} in {seconds:.1f} s, {rate}/s")
        return Moved(files=self._files, bytes=self._moved, seconds=round(seconds, 3))

    def _tell(self) -> None:
        now = time.monotonic()
        if now < self._next_watch:
            return
        self._next_watch = now + _WATCHED_S
        said = now >= self._next_line
        if said:
            self._next_line = now + _SAID_S
        done, seconds = min(self._total, self._moved + self._skipped), now - self._start
        rate = self._moved / seconds
        left_s = (self._total - done) / rate if rate else None
        left = "" if left_s is None else f", {left_s:.0f} s left"
        self._progress(
            f"{self._what}: {byte_size(done)} of {byte_size(self._total)}, {self._done_files} of {self._of_files} "
            f"files, {byte_size(int(rate))}/s{left}",
            stage=self._stage,
            done=done,
            total=self._total,
            unit="bytes",
            bytes_per_s=round(rate),
            eta_s=None if left_s is None else round(left_s, 1),
            watched=not said,
        )
