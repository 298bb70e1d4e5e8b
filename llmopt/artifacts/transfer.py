"""Artifacts between a store on disk and one elsewhere: only what is missing, several at once, going on after a cut.

Sent is what has been compared with its digest here; received is what has been compared with it there: chunk by chunk
as it comes, so that a bad one is fetched again at once, and as a whole by its sha256, without which nothing is kept.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmopt.artifacts import chunks, layout
from llmopt.artifacts.disk import sync_file
from llmopt.artifacts.manifest import FileEntry, Manifest, canonical_json
from llmopt.artifacts.meter import Meter
from llmopt.artifacts.objects import PART_BYTES, GoneError, Objects, Sender
from llmopt.artifacts.outcome import Json, Progress, silent
from llmopt.artifacts.store import action_result
from llmopt.errors import CorruptError, LlmoptError

if TYPE_CHECKING:
    from llmopt.artifacts.remote import Lease, Remote
    from llmopt.artifacts.store import Store

_SMALL_AT_ONCE, _LARGE_AT_ONCE = 24, 8
_READS = 3  # of a chunk that comes wrong


@dataclass(frozen=True, kw_only=True, slots=True)
class Moved:
    """What a transfer came to: payload bytes and files that went over the wire, of those of the artifact."""

    files: int
    bytes: int
    seconds: float

    def to_json(self) -> dict[str, Json]:
        return {"files": self.files, "bytes": self.bytes, "seconds": self.seconds}


# -- push


def push(
    store: Store, artifact: str, remote: Remote, progress: Progress = silent, *, replace: Collection[str] = ()
) -> Moved:
    """Send an artifact with what is known about it. Nobody sees it before all of it is there.

    `replace` names blobs (by sha256) that are there and damaged.
    """
    manifest = store.get(artifact)
    entries = list({entry.sha256: entry for entry in manifest.files}.values())
    with remote.writing([entry.sha256 for entry in entries]) as lease:
        meter = Meter(progress, "push", f"pushing to {remote.url}")
        if replace or not remote.has(artifact):
            _send_blobs(store, manifest, entries, remote, meter, lease, replace)
            parts = store.chunks(manifest)
            if parts:
                remote.add(layout.chunks(manifest.hex), chunks.to_bytes(parts))
            remote.add(layout.manifest(manifest.hex), manifest.to_bytes())
        for statement in map(canonical_json, store.statements(artifact)):
            remote.add(layout.attestation(manifest.hex, hashlib.sha256(statement).hexdigest()), statement)
        if manifest.action is not None:
            remote.add(layout.action(manifest.action.key, manifest.hex), action_result(manifest))
        return meter.end()


def _send_blobs(
    store: Store,
    manifest: Manifest,
    entries: Sequence[FileEntry],
    remote: Remote,
    meter: Meter,
    lease: Lease,
    replace: Collection[str],
) -> None:
    small = [entry for entry in entries if entry.size <= PART_BYTES]
    large = [entry for entry in entries if entry.size > PART_BYTES]
    with _threads(_SMALL_AT_ONCE) as threads:
        problems = dict(zip(large, threads.map(remote.blob_problem, large), strict=True))
        missing = [entry for entry in large if problems[entry] is not None or entry.sha256 in replace]
        meter.expect(len(small) + len(missing), sum(entry.size for entry in (*small, *missing)))
        _all(threads, [lambda entry=entry: _send_small(store, entry, remote, meter, replace) for entry in small])  # type: ignore[misc]
    known = store.chunks(manifest)
    with _threads(_LARGE_AT_ONCE) as threads:
        begun = threads.map(lambda e: remote.objects.sender(layout.blob(e.sha256), e.size, e.sha256), missing)
        senders = list(zip(missing, begun, strict=True))
        try:
            jobs: list[Callable[[], None]] = []
            for entry, sender in senders:
                meter.skip(entry.size - sum(end - begin for _, begin, end in sender.parts))
                parts = known.get(entry.sha256)
                if parts is None and not store.has_blob(entry):
                    raise _damaged(store, entry)
                jobs += _part_jobs(store, entry, parts, sender, meter, lease)
            _all(threads, jobs)
        except BaseException:
            for _, sender in senders:
                with suppress(LlmoptError, OSError):
                    sender.give_up()
            raise


def _send_small(store: Store, entry: FileEntry, remote: Remote, meter: Meter, replace: Collection[str]) -> None:
    try:
        data = store.blob(entry.sha256).read_bytes()
    except OSError:
        raise _damaged(store, entry) from None
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise _damaged(store, entry)
    if entry.sha256 in replace or not remote.objects.create(layout.blob(entry.sha256), data):
        if entry.sha256 not in replace and remote.blob_problem(entry) is None:
            meter.skip(len(data), files=1)
            return
        remote.objects.write(layout.blob(entry.sha256), data)
    meter.add(len(data), files=1)


def _part_jobs(
    store: Store, entry: FileEntry, parts: tuple[str, ...] | None, sender: Sender, meter: Meter, lease: Lease
) -> list[Callable[[], None]]:
    """One for each part that is still to be sent; the last that is done finishes the file."""
    lock, done = threading.Lock(), [0]

    def send(number: int, begin: int, end: int) -> None:
        data = _read_part(store, entry, parts, begin, end)
        sender.send(number, data)
        meter.add(end - begin)
        lease.renew()
        with lock:
            done[0] += 1
            last = done[0] == len(sender.parts)
        if last:
            sender.finish()
            meter.add(0, files=1)

    if not sender.parts:  # all were sent before, and nobody finished it

        def finish() -> None:
            sender.finish()
            meter.add(0, files=1)

        return [finish]
    return [lambda part=part: send(*part) for part in sender.parts]  # type: ignore[misc]


def _read_part(store: Store, entry: FileEntry, parts: tuple[str, ...] | None, begin: int, end: int) -> memoryview:
    try:
        with store.blob(entry.sha256).open("rb", buffering=0) as file:
            data = memoryview(os.pread(file.fileno(), end - begin, begin))
    except OSError:
        raise _damaged(store, entry) from None
    if len(data) != end - begin:
        raise _damaged(store, entry)
    for number, digest in enumerate(parts or ()):
        at, after = chunks.span(entry.size, number)
        if begin <= at < end and chunks.of_bytes(data[at - begin : after - begin]) != digest:
            raise _damaged(store, entry)
    return data


def _damaged(store: Store, entry: FileEntry) -> CorruptError:
    return CorruptError(
        f"`{store.blob(entry.sha256)}` is not what was stored, and is not sent",
        hint="`llmopt store verify` tells what else is damaged; the command that made it makes it again",
    )


# -- pull


@dataclass(frozen=True, slots=True)
class Wanted:
    """An object to be had as the file `target`. Without a `sha256` it is taken as it comes."""

    key: str
    size: int
    target: Path
    sha256: str | None = None
    chunks: tuple[str, ...] = ()


def pull(store: Store, artifact: str, remote: Remote, progress: Progress = silent) -> Moved:
    """Bring an artifact into the store with what is known about it; LlmoptError when it is not there."""
    manifest = remote.get(artifact)
    if manifest is None:
        raise LlmoptError(f"no artifact `{artifact}` in the store `{remote.url}`", hint="`llmopt store ls --store URL`")
    entries = {entry.sha256: entry for entry in manifest.files}
    meter = Meter(progress, "pull", f"pulling from {remote.url}")
    missing = [entry for entry in entries.values() if not store.has_blob(entry)]
    parts = chunks.from_bytes(remote.chunks(manifest)) if any(e.size > chunks.CHUNK_BYTES for e in missing) else {}
    with store.stage(manifest.hex) as folder:
        wanted = [
            Wanted(layout.blob(e.sha256), e.size, folder / e.sha256, e.sha256, parts.get(e.sha256, ())) for e in missing
        ]
        receive(remote.objects, wanted, meter)
        here = store.chunks(manifest) | {sha: parts[sha] for sha in entries if sha in parts}
        store.adopt(manifest, {each.sha256: each.target for each in wanted if each.sha256}, here)
    for statement in remote.statements(artifact):
        with suppress(CorruptError):  # one that is about something else tells nothing
            store.attach(artifact, statement)
    return meter.end()


def receive(objects: Objects, wanted: Sequence[Wanted], meter: Meter) -> dict[Path, str]:
    """Each object as its file, read-only and synced; their sha256. What is in the files already and right is kept.

    Raises CorruptError for what is not of its digest, GoneError for what is not there; good chunks stay for next time.
    """
    meter.expect(len(wanted), sum(each.size for each in wanted))
    digests: dict[Path, str] = {}
    small = [each for each in wanted if each.size <= chunks.CHUNK_BYTES]
    with _threads(_SMALL_AT_ONCE) as threads:
        _all(threads, [lambda each=each: digests.update(_receive_small(objects, each, meter)) for each in small])  # type: ignore[misc]
    with _threads(_LARGE_AT_ONCE) as threads:
        files = [_Incoming(objects, each, meter, digests) for each in wanted if each.size > chunks.CHUNK_BYTES]
        try:
            _all(threads, [lambda file=file, n=n: file.chunk(n) for file in files for n in range(file.count)])  # type: ignore[misc]
        finally:
            threads.shutdown(wait=True, cancel_futures=True)
            for file in files:
                file.close()
    return digests


def _receive_small(objects: Objects, wanted: Wanted, meter: Meter) -> dict[Path, str]:
    for turn in range(_READS):
        data = objects.read_range(wanted.key, 0, wanted.size) if wanted.size else memoryview(b"")
        if not wanted.size and objects.find(wanted.key) is None:
            raise GoneError(f"`{objects.url}/{wanted.key}` is missing")
        digest = hashlib.sha256(data).hexdigest()
        if len(data) == wanted.size and wanted.sha256 in (None, digest):
            break
        meter.again(wanted.key)
        if turn == _READS - 1:
            raise _spoiled(objects, wanted)
    wanted.target.parent.mkdir(parents=True, exist_ok=True)
    wanted.target.unlink(missing_ok=True)
    wanted.target.write_bytes(data)
    wanted.target.chmod(0o444)
    sync_file(wanted.target)
    meter.add(wanted.size, files=1)
    return {wanted.target: digest}


class _Incoming:
    """A large file that comes in chunks, in any order; its sha256 is made in their order."""

    def __init__(self, objects: Objects, wanted: Wanted, meter: Meter, digests: dict[Path, str]) -> None:
        self._objects, self._wanted, self._meter, self._digests = objects, wanted, meter, digests
        self.count = chunks.count(wanted.size)
        self._known = wanted.chunks if len(wanted.chunks) == self.count else ()
        self._digest = hashlib.sha256()
        self._turn, self._next, self._failed = threading.Condition(), 0, False
        wanted.target.parent.mkdir(parents=True, exist_ok=True)
        resumed = bool(self._known) and wanted.target.exists()
        if not resumed:
            wanted.target.unlink(missing_ok=True)
        self._file = os.open(wanted.target, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.truncate(self._file, wanted.size)
        self._resumed = resumed

    def chunk(self, number: int) -> None:
        """Have it, keep it, and wait for one's turn to add it to the digest."""
        try:
            begin, end = chunks.span(self._wanted.size, number)
            data = self._here(number, begin, end)
            if data is None:
                data = self._fetched(number, begin, end)
                os.pwrite(self._file, data, begin)
                self._meter.add(end - begin)
            else:
                self._meter.skip(end - begin)
            with self._turn:
                self._turn.wait_for(lambda: self._next == number or self._failed)
                if self._failed:
                    return
            self._digest.update(data)
            if number + 1 == self.count:
                self._finish()
            with self._turn:
                self._next += 1
                self._turn.notify_all()
        except BaseException:
            with self._turn:
                self._failed = True
                self._turn.notify_all()
            raise

    def _here(self, number: int, begin: int, end: int) -> memoryview | None:
        """What an earlier try has brought of it, if it is right."""
        if not self._resumed:
            return None
        data = memoryview(os.pread(self._file, end - begin, begin))
        return data if chunks.of_bytes(data) == self._known[number] else None

    def _fetched(self, number: int, begin: int, end: int) -> memoryview:
        """A chunk that is wrong is fetched again. If it stays so, the digest of the whole has the last word."""
        for turn in range(_READS):
            data = self._objects.read_range(self._wanted.key, begin, end)
            right = len(data) == end - begin
            if right and (not self._known or chunks.of_bytes(data) == self._known[number]):
                return data
            if turn < _READS - 1:
                self._meter.again(self._wanted.key)
        if not right:
            raise _spoiled(self._objects, self._wanted)
        return data

    def _finish(self) -> None:
        digest = self._digest.hexdigest()
        if self._wanted.sha256 not in (None, digest):
            raise _spoiled(self._objects, self._wanted)
        os.fchmod(self._file, 0o444)
        os.fsync(self._file)
        self._digests[self._wanted.target] = digest
        self._meter.add(0, files=1)

    def close(self) -> None:
        os.close(self._file)


def _spoiled(objects: Objects, wanted: Wanted) -> CorruptError:
    return CorruptError(
        f"`{objects.url}/{wanted.key}` is damaged: its bytes are not those of its digest",
        hint="`llmopt store verify --repair-from STORE` repairs it from a store that has it",
    )


# -- within


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """What has not begun when this is left early is not begun any more."""
    threads = ThreadPoolExecutor(count, thread_name_prefix="llmopt-transfer")
    try:
        yield threads
    except BaseException:
        threads.shutdown(wait=True, cancel_futures=True)
        raise
    threads.shutdown(wait=True)


def _all(threads: ThreadPoolExecutor, jobs: Iterable[Callable[[], Any]]) -> None:
    """Do all; the first error ends those that have not begun."""
    futures: list[Future[Any]] = [threads.submit(job) for job in jobs]
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in futures:
        if future in done and (error := future.exception()) is not None:
            raise error
