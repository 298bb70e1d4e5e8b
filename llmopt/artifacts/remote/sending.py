"""Files of a store as objects elsewhere: only those that are missing, compared with their digests before they go."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from llmopt.artifacts import chunks
from llmopt.artifacts.manifest import FileEntry
from llmopt.artifacts.objects import PART_BYTES, LostUploadError, Objects, Sender
from llmopt.artifacts.remote.meter import Meter
from llmopt.artifacts.threads import SMALL_AT_ONCE, do_all
from llmopt.errors import CorruptError, LlmoptError

if TYPE_CHECKING:
    from llmopt.artifacts.store import Store

#: From so many files on a listing is tried first, as long as it has no more than so many objects for each of them.
_MANY, _LISTED_FOR_ONE = 32, 50
_SMALL_BYTES = 1 << 20
_LARGE_AT_ONCE = 8
_TURNS = 3


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
        there: dict[FileEntry, bool] = {}
        do_all(SMALL_AT_ONCE, [partial(self._look, entry, there) for entry in self._perhaps_there(entries)])
        missing = [entry for entry in entries if not there.get(entry, False)]
        self.meter.expect(len(missing), sum(entry.size for entry in missing))
        small = [entry for entry in missing if entry.size <= _SMALL_BYTES]
        do_all(SMALL_AT_ONCE, [partial(self._send_whole, entry) for entry in small])
        large = [entry for entry in missing if entry.size > _SMALL_BYTES]
        for turn in range(_TURNS):
            try:
                self._send_large([entry for entry in large if not turn or not self._is_there(entry)])
                break
            except LostUploadError:  # another process has finished or removed it, with what this one had sent
                if turn == _TURNS - 1:
                    raise

    def _send_large(self, entries: Sequence[FileEntry]) -> None:
        begun: dict[FileEntry, Sender] = {}
        try:
            do_all(_LARGE_AT_ONCE, self._jobs(entries, begun))
        except Exception:
            for sender in list(begun.values()):
                with suppress(LlmoptError, OSError):
                    sender.give_up()
            raise

    def _perhaps_there(self, entries: Sequence[FileEntry]) -> Sequence[FileEntry]:
        """Those worth asking for one by one: of many, those that are listed, where that takes fewer requests."""
        if len(entries) < _MANY:
            return entries
        keys = {self.key(entry): entry for entry in entries}
        listed = self.objects.list(_folder(keys))
        found = [each.key for each in islice(listed, _LISTED_FOR_ONE * len(entries))]
        if next(listed, None) is not None:
            return entries
        return [keys[key] for key in found if key in keys]

    def _look(self, entry: FileEntry, there: dict[FileEntry, bool]) -> None:
        there[entry] = entry.sha256 not in self.replace and self._is_there(entry)

    def _is_there(self, entry: FileEntry) -> bool:
        found = self.objects.find(self.key(entry))
        return found is not None and found.size == entry.size

    def _send_whole(self, entry: FileEntry) -> None:
        """Two who send it at once send the same bytes."""
        try:
            data = self.store.blobs.path(entry.sha256).read_bytes()
        except OSError:
            raise self._damaged(entry) from None
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise self._damaged(entry)
        self.objects.write(self.key(entry), data)
        self.meter.add(len(data), files=1)

    def _jobs(self, entries: Sequence[FileEntry], begun: dict[FileEntry, Sender]) -> Iterator[Callable[[], None]]:
        """Of one file after the other, begun when its turn comes: in `begun` are those that are not finished."""
        for entry in entries:
            if entry.size <= PART_BYTES:
                yield partial(self._send_whole, entry)
                continue
            if not self._known(entry) and not self.store.blobs.has(entry):
                raise self._damaged(entry)
            begun[entry] = sender = self.objects.sender(self.key(entry), entry.size, entry.sha256)
            yield from self._parts(entry, sender, lambda entry=entry: begun.pop(entry))  # type: ignore[misc]

    def _parts(self, entry: FileEntry, sender: Sender, done: Callable[[], Any]) -> list[Callable[[], None]]:
        """A job for each part that is still to be sent; the last that is done finishes the file."""
        self.meter.skip(entry.size - sum(end - begin for _, begin, end in sender.parts))
        lock, left = threading.Lock(), [len(sender.parts)]

        def finish() -> None:
            sender.finish()
            done()
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

        # All may have been sent before, and nobody finished it.
        return [partial(send, *part) for part in sender.parts] or [finish]

    def _known(self, entry: FileEntry) -> tuple[str, ...]:
        """The digests of its chunks, if there is one for each."""
        found = self.chunks.get(entry.sha256, ())
        return found if len(found) == chunks.count(entry.size) else ()

    def _read(self, entry: FileEntry, begin: int, end: int) -> memoryview:
        try:
            with self.store.blobs.path(entry.sha256).open("rb", buffering=0) as file:
                data = memoryview(os.pread(file.fileno(), end - begin, begin))
        except OSError:
            raise self._damaged(entry) from None
        if len(data) != end - begin:
            raise self._damaged(entry)
        for number, digest in enumerate(self._known(entry)):
            at, after = chunks.span(entry.size, number)
            if begin <= at < end and chunks.of_bytes(data[at - begin : after - begin]) != digest:
                raise self._damaged(entry)
        return data

    def _damaged(self, entry: FileEntry) -> CorruptError:
        return CorruptError(
            f"`{self.store.blobs.path(entry.sha256)}` is not what was stored, and is not sent",
            hint="`llmopt store verify` tells what else is damaged; the command that made it makes it again",
        )


def _folder(keys: Collection[str]) -> str:
    """The one that all of these keys lie in, as a prefix."""
    first = min(keys, key=len).rpartition("/")[0]
    while first and not all(key.startswith(f"{first}/") for key in keys):
        first = first.rpartition("/")[0]
    return f"{first}/" if first else ""
