"""Objects that are files in a folder: of a disk that several machines share, or of another disk."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from llmopt.artifacts import disk
from llmopt.artifacts.objects import Found, GoneError, parts_of
from llmopt.errors import LlmoptError

_ASIDE = "tmp"


class DiskObjects:
    """See `Objects`. A file appears whole or not at all; a lock makes comparing and swapping one step."""

    remote = False
    swaps = True

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.url = str(self.root)

    def read(self, key: str, *, most: int) -> bytes | None:
        found = self.read_tagged(key, most=most)
        return None if found is None else found[0]

    def read_tagged(self, key: str, *, most: int) -> tuple[bytes, str | None] | None:
        with self._reading():
            try:
                with (self.root / key).open("rb") as file:
                    data = file.read(most + 1)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None
            return data, hashlib.sha256(data).hexdigest()

    def read_range(self, key: str, begin: int, end: int) -> memoryview:
        return memoryview(b"".join(self.stream(key, begin, end)))

    def stream(self, key: str, begin: int, end: int) -> Iterator[memoryview]:
        with self._reading():
            try:
                with (self.root / key).open("rb", buffering=0) as file:
                    while begin < end and (data := os.pread(file.fileno(), min(disk.PIECE_BYTES, end - begin), begin)):
                        yield memoryview(data)
                        begin += len(data)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise GoneError(f"`{self.root / key}` is missing") from None

    def find(self, key: str) -> Found | None:
        with self._reading():
            try:
                status = (self.root / key).stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return Found(key, status.st_size, status.st_mtime) if stat.S_ISREG(status.st_mode) else None

    def write(self, key: str, data: bytes | memoryview) -> None:
        with self._writing(), disk.temporary(self.root / _ASIDE) as aside:
            disk.publish(bytes(data), self.root / key, aside=aside, root=self.root)
            os.utime(self.root / key)  # by the clock of the disk's own machine, where that is another

    def swap(self, key: str, data: bytes, tag: str | None) -> bool:
        with self._writing(), disk.temporary(self.root / _ASIDE) as aside, disk.locked(self.root / disk.SWAP):
            found = self.read_tagged(key, most=len(data) + (1 << 20))
            if (None if found is None else found[1]) != tag:
                return False
            disk.publish(data, self.root / key, aside=aside, root=self.root)
        return True

    def sender(self, key: str, size: int, digest: str) -> _Sender:
        return _Sender(self, key, size)

    def list(self, prefix: str = "") -> Iterator[Found]:
        return self._walk(prefix[: prefix.rfind("/") + 1], prefix)

    def _walk(self, folder: str, prefix: str) -> Iterator[Found]:
        """Folder by folder, as far as it is asked to. No link to a folder is followed."""
        try:
            with os.scandir(self.root / folder) as scan:
                entries = {f"{folder}{e.name}" + "/" * e.is_dir(follow_symlinks=False): e for e in scan}
        except (FileNotFoundError, NotADirectoryError):
            return
        for key in sorted(key for key in entries if key.startswith(prefix) and key != f"{_ASIDE}/"):
            if key.endswith("/"):
                yield from self._walk(key, prefix)
            elif entries[key].is_file():
                with suppress(FileNotFoundError):
                    status = entries[key].stat()
                    yield Found(key, status.st_size, status.st_mtime)

    def delete(self, keys: Sequence[str]) -> None:
        with self._writing():
            for key in keys:
                with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                    (self.root / key).unlink()

    def now(self) -> float:
        return time.time()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LlmoptError(
                f"`{error.filename or self.root}` cannot be read: {error.strerror or error}", hint="check the disk"
            ) from error

    def _writing(self) -> AbstractContextManager[None]:
        return disk.writing("the folder", self.root, option="another URL")


class _Sender:
    def __init__(self, objects: DiskObjects, key: str, size: int) -> None:
        self._objects, self._key = objects, key
        self.parts: Sequence[tuple[int, int, int]] = parts_of(size)
        self._starts = {number: begin for number, begin, _ in self.parts}
        self._held = ExitStack()
        with objects._writing(), ExitStack() as held:
            self._file = held.enter_context(disk.temporary(objects.root / _ASIDE)) / "file"
            self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o444)
            held.callback(os.close, self._descriptor)
            self._held = held.pop_all()

    def send(self, number: int, data: bytes | memoryview) -> None:
        with self._objects._writing():
            disk.write_at(self._descriptor, data, self._starts[number])

    def finish(self) -> None:
        target = self._objects.root / self._key
        with self._objects._writing(), self._held:
            os.fsync(self._descriptor)
            target.parent.mkdir(parents=True, exist_ok=True)
            self._file.replace(target)
            disk.sync_folders([target], self._objects.root)

    def give_up(self) -> None:
        self._held.close()
