"""Files of a store as objects elsewhere: only those that are missing, compared with their digests before they go."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmopt.artifacts import chunks
from llmopt.artifacts.manifest import FileEntry
from llmopt.artifacts.meter import Meter
from llmopt.artifacts.objects import PART_BYTES, Objects, Sender
from llmopt.artifacts.threads import LARGE_AT_ONCE, SMALL_AT_ONCE, do_all, pool
from llmopt.errors import CorruptError, LlmoptError

if TYPE_CHECKING:
    from llmopt.artifacts.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class Outgoing:
    """From where to where. `key` names the object of a file, `chunks` holds the chunk digests of the large ones by
    their sha256, `replace` names files (by sha256) that are there and damaged, and `renew` is called now and then."""

    store: Store
    objects: Objects
    key: Callable[[FileEntry], str]
    chunks: dict[str, tuple[str, ...]]
    meter: Meter
    renew: Callable[[], None] = lambda: None
    replace: Collection[str] = ()

    def send(self, entries: Sequence[FileEntry]) -> None:
        """All of them that are not there."""
        small = [entry for entry in entries if entry.size <= PART_BYTES]
        large = [entry for entry in entries if entry.size > PART_BYTES]
        with pool(SMALL_AT_ONCE) as threads:
            there = dict(zip(large, threads.map(self._is_there, large), strict=True))
            missing = [entry for entry in large if not there[entry]]
            self.meter.expect(len(small) + len(missing), sum(entry.size for entry in (*small, *missing)))
            do_all(threads, [lambda entry=entry: self._send_small(entry) for entry in small])  # type: ignore[misc]
        with pool(LARGE_AT_ONCE) as threads:
            begun = threads.map(lambda entry: self.objects.sender(self.key(entry), entry.size, entry.sha256), missing)
            senders = list(zip(missing, begun, strict=True))
            try:
                do_all(threads, [job for entry, sender in senders for job in self._jobs(entry, sender)])
            except BaseException:
                threads.shutdown(wait=True, cancel_futures=True)
                for _, sender in senders:
                    with suppress(LlmoptError, OSError):
                        sender.give_up()
                raise

    def _is_there(self, entry: FileEntry) -> bool:
        if entry.sha256 in self.replace:
            return False
        found = self.objects.find(self.key(entry))
        return found is not None and found.size == entry.size

    def _send_small(self, entry: FileEntry) -> None:
        try:
            data = self.store.blob(entry.sha256).read_bytes()
        except OSError:
            raise self._damaged(entry) from None
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise self._damaged(entry)
        if entry.sha256 in self.replace or not self.objects.create(self.key(entry), data):
            if self._is_there(entry):
                self.meter.skip(len(data), files=1)
                return
            self.objects.write(self.key(entry), data)
        self.meter.add(len(data), files=1)

    def _jobs(self, entry: FileEntry, sender: Sender) -> list[Callable[[], None]]:
        """One for each part that is still to be sent; the last that is done finishes the file."""
        self.meter.skip(entry.size - sum(end - begin for _, begin, end in sender.parts))
        if entry.sha256 not in self.chunks and not self.store.has_blob(entry):
            raise self._damaged(entry)
        lock, left = threading.Lock(), [len(sender.parts)]

        def finish() -> None:
            sender.finish()
            self.meter.add(0, files=1)

        def send(number: int, begin: int, end: int) -> None:
            sender.send(number, self._read(entry, begin, end))
            self.meter.add(end - begin)
            self.renew()
            with lock:
                left[0] -= 1
                last = not left[0]
            if last:
                finish()

        if not sender.parts:  # all were sent before, and nobody finished it
            return [finish]
        return [lambda part=part: send(*part) for part in sender.parts]  # type: ignore[misc]

    def _read(self, entry: FileEntry, begin: int, end: int) -> memoryview:
        try:
            with self.store.blob(entry.sha256).open("rb", buffering=0) as file:
                data = memoryview(os.pread(file.fileno(), end - begin, begin))
        except OSError:
            raise self._damaged(entry) from None
        if len(data) != end - begin:
            raise self._damaged(entry)
        for number, digest in enumerate(self.chunks.get(entry.sha256, ())):
            at, after = chunks.span(entry.size, number)
            if begin <= at < end and chunks.of_bytes(data[at - begin : after - begin]) != digest:
                raise self._damaged(entry)
        return data

    def _damaged(self, entry: FileEntry) -> CorruptError:
        return CorruptError(
            f"`{self.store.blob(entry.sha256)}` is not what was stored, and is not sent",
            hint="`llmopt store verify` tells what else is damaged; the command that made it makes it again",
        )
