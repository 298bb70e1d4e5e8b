"""Objects as files on this disk: several at once, going on after a cut, kept only when they are what they should be.

What comes is checked chunk by chunk, so that a bad one is fetched again at once, and as a whole by its sha256.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmopt.artifacts import chunks
from llmopt.artifacts.disk import PIECE_BYTES, begin_sync, write_at
from llmopt.artifacts.objects import GoneError, Objects
from llmopt.artifacts.remote.meter import Meter
from llmopt.artifacts.threads import SMALL_AT_ONCE, do_all
from llmopt.errors import CorruptError

Parts = dict[str, tuple[str, ...]]  # by the sha256 of a large file, the digests of its chunks

Done = Callable[[Path, str], None]

_SMALL_BYTES = 1 << 20
_LARGE_AT_ONCE = 6  # on two cores 3 to 8 are the same; a network wants several
_READS = 3  # of a chunk that comes wrong


@dataclass(frozen=True, slots=True)
class Wanted:
    """An object to be had as the file `target`. Without a `sha256` it is taken as it comes."""

    key: str
    size: int
    target: Path
    sha256: str | None = None
    chunks: tuple[str, ...] = ()


def receive(objects: Objects, wanted: Sequence[Wanted], meter: Meter, done: Done = lambda *_: None) -> Parts:
    """Each object as its file, read-only and synced. What is in the files already and right is kept.

    `done` is called with each file and its sha256, in any thread, once it is complete.
    Raises CorruptError for what is not of its digest, GoneError for what is not there; good chunks stay for next time.
    """
    meter.expect(len(wanted), sum(each.size for each in wanted))
    found: Parts = {}
    small = [each for each in wanted if each.size <= _SMALL_BYTES]
    come: dict[Path, str] = {}
    try:
        do_all(SMALL_AT_ONCE, [partial(_fetch_whole, objects, each, meter, come) for each in small])
    finally:  # when all are written, the disk has fewer waits in syncing them
        do_all(SMALL_AT_ONCE, [partial(_keep, target, digest, done) for target, digest in come.items()])
    begun: set[_Incoming] = set()
    try:
        large = [each for each in wanted if each.size > _SMALL_BYTES]
        do_all(_LARGE_AT_ONCE, _jobs(objects, large, meter, done, found, begun))
    finally:
        for file in list(begun):
            file.close()
    return found


def _jobs(
    objects: Objects, wanted: Sequence[Wanted], meter: Meter, done: Done, found: Parts, begun: set[_Incoming]
) -> Iterator[Callable[[], None]]:
    """Chunks of files of which none is being fetched come first: their digest is made of each piece as it comes."""
    left, files = deque(wanted), list[_Incoming]()
    while True:
        files = [file for file in files if file.handed < file.count]
        file = min(files, key=lambda file: file.busy, default=None)
        if left and (file is None or file.busy) and len(files) < _LARGE_AT_ONCE:
            each = left.popleft()
            if each.size <= chunks.CHUNK_BYTES:
                yield partial(_receive_whole, objects, each, meter, done)
                continue
            file = _Incoming(objects, each, meter, done, found, begun)
            files.append(file)
        if file is None:
            return
        yield file.hand_out()


def _receive_whole(objects: Objects, wanted: Wanted, meter: Meter, done: Done) -> None:
    come: dict[Path, str] = {}
    _fetch_whole(objects, wanted, meter, come)
    for target, digest in come.items():
        _keep(target, digest, done)


def _fetch_whole(objects: Objects, wanted: Wanted, meter: Meter, come: dict[Path, str]) -> None:
    """In `come` is then its digest."""
    if _is_here(wanted):
        meter.skip(wanted.size, files=1)
        come[wanted.target] = wanted.sha256 or ""
        return
    for turn in range(_READS):
        data = objects.read_range(wanted.key, 0, wanted.size) if wanted.size else memoryview(b"")
        if not wanted.size and objects.find(wanted.key) is None:
            raise GoneError(f"`{objects.url}/{wanted.key}` is missing")
        digest = hashlib.sha256(data).hexdigest()
        if len(data) == wanted.size and wanted.sha256 in (None, digest):
            break
        if turn == _READS - 1:
            raise _spoiled(objects, wanted)
        meter.again(wanted.key)
    wanted.target.parent.mkdir(parents=True, exist_ok=True)
    wanted.target.unlink(missing_ok=True)
    wanted.target.write_bytes(data)
    meter.add(wanted.size, files=1)
    come[wanted.target] = digest


def _keep(target: Path, digest: str, done: Done) -> None:
    with target.open("rb", buffering=0) as file:
        os.fchmod(file.fileno(), 0o444)
        os.fsync(file.fileno())
    done(target, digest)


def _is_here(wanted: Wanted) -> bool:
    """Whether an earlier try has brought it."""
    with suppress(OSError):
        if wanted.sha256 is not None and wanted.target.stat().st_size == wanted.size:
            return hashlib.sha256(wanted.target.read_bytes()).hexdigest() == wanted.sha256
    return False


class _Incoming:
    """A large file that comes in chunks, in any order; its sha256 is made in their order."""

    def __init__(
        self, objects: Objects, wanted: Wanted, meter: Meter, done: Done, found: Parts, begun: set[_Incoming]
    ) -> None:
        self._objects, self._wanted, self._meter, self._done = objects, wanted, meter, done
        self._found, self._begun = found, begun
        self.count = chunks.count(wanted.size)
        self._known = wanted.chunks if len(wanted.chunks) == self.count else ()
        self._digest, self._parts = hashlib.sha256(), list[str]()
        self._turn, self._next, self._failed = threading.Condition(), 0, False
        self.handed, self.busy = 0, 0  # chunks that were given to a thread, and those of them not done
        self._one = threading.Lock()  # the system lets one at a time write to a file, and the others spin
        wanted.target.parent.mkdir(parents=True, exist_ok=True)
        self._resumed = bool(self._known) and wanted.target.exists()
        if self._resumed:
            wanted.target.chmod(0o644)  # it may have been finished
        else:
            wanted.target.unlink(missing_ok=True)
        self._file = os.open(wanted.target, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        begun.add(self)
        os.truncate(self._file, wanted.size)

    def hand_out(self) -> Callable[[], None]:
        """The next chunk as a job."""
        self.handed += 1
        self.busy += 1
        return partial(self._chunk, self.handed - 1)

    def _chunk(self, number: int) -> None:
        """Have it, keep it, and wait for one's turn to add it to the digest."""
        begin, end = chunks.span(self._wanted.size, number)
        try:
            with self._opened() as file:
                if file is None:
                    return
                whole = None
                if (digest := self._here(file, number, begin, end)) is not None:
                    self._meter.skip(end - begin)
                else:
                    digest, whole = self._fetch(file, number, begin, end)
                    self._meter.add(end - begin)
                with self._turn:
                    self._turn.wait_for(lambda: self._next == number or self._failed)
                    if self._failed:
                        return
                if whole is None:
                    for piece in _pieces(file, begin, end):
                        self._digest.update(piece)
                else:
                    self._digest = whole
            self._parts.append(digest)
            if number + 1 == self.count:
                self._finish()
            with self._turn:
                self._next += 1
                self.busy -= 1
                self._turn.notify_all()
        except BaseException:
            with self._turn:
                self._failed = True
                self._turn.notify_all()
            raise

    @contextmanager
    def _opened(self) -> Iterator[int | None]:
        """A copy of the file's number, which may be another's after it was closed; None when it is closed already."""
        with self._turn:
            file = os.dup(self._file) if self in self._begun else None
        try:
            yield file
        finally:
            if file is not None:
                os.close(file)

    def _here(self, file: int, number: int, begin: int, end: int) -> str | None:
        """The digest of what an earlier try has brought of it, if it is right."""
        if not self._resumed:
            return None
        digest = chunks.chunk_digest()
        for piece in _pieces(file, begin, end):
            digest.update(piece)
        return digest.hexdigest() if digest.hexdigest() == self._known[number] else None

    def _fetch(self, file: int, number: int, begin: int, end: int) -> tuple[str, Any]:
        """Its digest and, if all before it are in that of the whole, that with it.

        A chunk that is wrong is fetched again; if it stays so, the whole has the last word.
        """
        for turn in range(_READS):
            part, whole, at = chunks.chunk_digest(), None, begin
            with self._turn:
                if self._next == number:
                    whole = self._digest.copy()
            for piece in self._objects.stream(self._wanted.key, begin, end):
                part.update(piece)
                if whole is not None:
                    whole.update(piece)
                with self._one:
                    write_at(file, piece, at)
                at += len(piece)
            begin_sync(file)
            digest = part.hexdigest()
            if at == end and (not self._known or digest == self._known[number]):
                break
            if turn < _READS - 1:
                self._meter.again(self._wanted.key)
        if at != end:
            raise _spoiled(self._objects, self._wanted)
        return digest, whole

    def _finish(self) -> None:
        digest = self._digest.hexdigest()
        if self._wanted.sha256 not in (None, digest):
            raise _spoiled(self._objects, self._wanted)
        os.fchmod(self._file, 0o444)
        os.fsync(self._file)
        self._done(self._wanted.target, digest)
        self._found[digest] = tuple(self._parts)
        self.close()
        self._meter.add(0, files=1)

    def close(self) -> None:
        """A thread that is left behind, waiting for a server, finds that it has failed."""
        with self._turn:
            self._failed = True
            self._turn.notify_all()
            if self in self._begun:
                self._begun.remove(self)
                os.close(self._file)


def _pieces(file: int, begin: int, end: int) -> Iterator[bytes]:
    while begin < end and (data := os.pread(file, min(PIECE_BYTES, end - begin), begin)):
        yield data
        begin += len(data)


def _spoiled(objects: Objects, wanted: Wanted) -> CorruptError:
    return CorruptError(
        f"`{objects.url}/{wanted.key}` is damaged: its bytes are not those of its digest",
        hint="`llmopt store verify --repair-from STORE` repairs it from a store that has it",
    )
