"""The files of a store on this disk by their sha256, and which of them are known to be right and need not be read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from llmopt.artifacts import disk, layout, verified
from llmopt.artifacts.digest import in_parallel, sha256_file
from llmopt.artifacts.manifest import FileEntry, Manifest
from llmopt.artifacts.verified import Verified
from llmopt.errors import CorruptError

REPAIR = "run the command that made it again: it replaces what is damaged"


class Blobs:
    def __init__(self, root: Path, *, verify_full: bool = False) -> None:
        """`verify_full`: what is used is read through once in this process, whatever was known of it before."""
        self._root, self._verify_full = root, verify_full
        self._verified = Verified(root / "verified")
        self._fresh: dict[str, os.stat_result] = {}  # read through by this process and not written down yet

    def path(self, sha256: str) -> Path:
        """Where a file lies, if it is there. What is read from it has to be checked."""
        return self._root / layout.blob(sha256)

    def has(self, entry: FileEntry) -> bool:
        """Whether the file is there and right."""
        if self.problem(entry) is not None:
            return False
        self.record([entry])
        return True

    def problem(self, entry: FileEntry, *, here: bool = False) -> str | None:
        """What is wrong with a stored file, by reading all of it unless it is known and looks the same.

        `here`: what only another process knows does not count.
        """
        blob = self.path(entry.sha256)
        try:
            found = blob.lstat()
            if not stat.S_ISREG(found.st_mode):
                return "is not a regular file"
            if found.st_size != entry.size:
                return f"has {found.st_size} bytes, not {entry.size}"
            fresh = self._fresh.get(entry.sha256)
            if fresh is not None and verified.same(fresh, found):
                return None
            if self._verified.holds(entry.sha256, found, here=here or self._verify_full):
                return None
            settled = self._verified.settle(found)
            if sha256_file(blob) != entry.sha256:
                self._verified.spoil([entry.sha256])
                return "has changed bytes"
        except (FileNotFoundError, NotADirectoryError):
            return "is missing"
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        if settled:
            self._fresh[entry.sha256] = found
        return None

    def problems(self, entries: Sequence[FileEntry], *, here: bool = False) -> list[tuple[FileEntry, str]]:
        """What is wrong with stored files, and that the others are right is known from now on."""
        unread = [entry for entry in entries if not self._is_known(entry, here=here)]
        problems = in_parallel(lambda entry: self.problem(entry, here=here), unread)
        self.record(entries)
        return [(entry, problem) for entry, problem in zip(unread, problems, strict=True) if problem is not None]

    def check(self, manifest: Manifest) -> None:
        """CorruptError unless all of its files are here and right."""
        for entry, problem in self.problems(manifest.files):
            raise CorruptError(f"the artifact `{manifest.id}` is corrupt: `{entry.path}` {problem}", hint=REPAIR)

    def add(self, file: Path, entry: FileEntry) -> None:
        """Move a private, sealed file in, unless its bytes are there already."""
        blob = self.path(entry.sha256)
        if self.problem(entry, here=True) is None:
            file.unlink()
            return
        blob.parent.mkdir(parents=True, exist_ok=True)
        if blob.is_dir() and not blob.is_symlink():
            disk.remove(blob)
        file.replace(blob)
        self._fresh[entry.sha256] = blob.lstat()

    def unlink(self, staged: Path, entry: FileEntry) -> None:
        """Remove what may be a link to a blob, whose times that changes."""
        blob = self.path(entry.sha256)
        before = blob.lstat()
        staged.unlink()
        if (fresh := self._fresh.get(entry.sha256)) is not None and verified.same(fresh, before):
            self._fresh[entry.sha256] = blob.lstat()

    def record(self, entries: Iterable[FileEntry]) -> None:
        """Remember that those of these files that were just read through are right."""
        found = {entry.sha256: self._fresh.pop(entry.sha256) for entry in entries if entry.sha256 in self._fresh}
        self._verified.record(found)
        if self._verified.is_long():
            self._verified.compact()

    @contextmanager
    def relinking(self, sha256s: Iterable[str]) -> Iterator[None]:
        """What is known of these files stays known, though links to them come or go, which changes their times."""
        before: dict[str, os.stat_result] = {}
        for sha256 in sha256s:
            with suppress(OSError):
                if self._verified.holds(sha256, status := self.path(sha256).lstat()):
                    before[sha256] = status
        yield
        after: dict[str, tuple[os.stat_result, os.stat_result]] = {}
        for sha256, status in before.items():
            with suppress(OSError):
                after[sha256] = status, self.path(sha256).lstat()
        self._verified.renew(after)

    def distrust(self, sha256s: Iterable[str]) -> None:
        """These files have been found damaged, though they may look as they did: they are read before they are used."""
        self._verified.spoil(sha256s)

    def forget(self, entries: Iterable[FileEntry]) -> None:
        """Read these again before this process uses them."""
        for entry in entries:
            self._verified.forget(entry.sha256)

    def compact(self) -> None:
        """Of what was read through, keep in mind what is still there."""
        self._verified.compact()

    def _is_known(self, entry: FileEntry, *, here: bool) -> bool:
        """Whether the file has been read through and looks the same, which needs no threads."""
        try:
            found = self.path(entry.sha256).lstat()
        except OSError:
            return False
        here = here or self._verify_full
        return (
            stat.S_ISREG(found.st_mode)
            and found.st_size == entry.size
            and self._verified.holds(entry.sha256, found, here=here)
        )
