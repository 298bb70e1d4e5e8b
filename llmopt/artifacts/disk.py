"""Writing so that a crash leaves all of it or nothing: aside, synced, renamed into place, the folder synced."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from llmopt.artifacts.threads import SMALL_AT_ONCE, do_all
from llmopt.errors import LlmoptError

_FULL = (errno.ENOSPC, errno.EDQUOT)
LOCK = ".lock"
_MANY = 16  # folders to sync
#: Of what is read, hashed and written in turn: a small part of the cache that a core has for itself.
PIECE_BYTES = 256 << 10
_SYNC_FILE_RANGE_WRITE = 2  # of Linux
#: The lock, in a store, of who compares and then writes.
SWAP = "leases/.swap"
#: What a file system says that cannot link, or cannot link this file once more.
_NO_LINK = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def temporary(parent: Path, prefix: str = "") -> Iterator[Path]:
    """An empty folder in `parent`, removed on any exit; those of processes that were killed are removed first.

    The folder is alive as long as its lock file beside it is locked, and the system drops a lock with its process.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _remove_dead(parent, prefix)
    folder, lock = _lock_new(parent, prefix)
    try:
        folder.mkdir()
        yield folder
    finally:
        _discard(folder, lock)


@contextmanager
def lasting(folder: Path) -> Iterator[Path | None]:
    """A folder for this process alone that outlives an early end, to be had again; None while another one has it.

    It is removed when the `with` ends without an error.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = _lock_path(folder)
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not _lock(lock, unsupported=True):
            os.close(lock)
            yield None
            return
        if is_open_as(lock, path):
            break
        os.close(lock)
    try:
        folder.mkdir(exist_ok=True)
        yield folder
    except BaseException:
        os.close(lock)
        raise
    _discard(folder, lock)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; on a disk without locks, several."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _lock_new(parent: Path, prefix: str) -> tuple[Path, int]:
    while True:
        folder = parent / f"{prefix}{os.getpid()}-{os.urandom(6).hex()}"
        path = _lock_path(folder)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        # Another process may take the new file for a dead one's before it is locked, and remove it: then start again.
        # Where the file system has no locks, none is ever taken for dead.
        if _lock(lock, unsupported=True) and is_open_as(lock, path):
            return folder, lock
        os.close(lock)


def _remove_dead(parent: Path, prefix: str) -> None:
    ours = re.compile(rf"{re.escape(prefix)}\d+-[0-9a-f]{{12}}{re.escape(LOCK)}")
    for path in [file for file in parent.iterdir() if ours.fullmatch(file.name)]:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        if _lock(lock, unsupported=False) and is_open_as(lock, path):
            _discard(path.with_name(path.name.removesuffix(LOCK)), lock)
        else:
            os.close(lock)


def _lock(lock: int, *, unsupported: bool) -> bool:
    """Lock an open file unless another process has; `unsupported` is the answer of a disk that cannot lock."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return unsupported
    return True


def is_open_as(descriptor: int, path: Path) -> bool:
    """Whether the open file still lies at the path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _discard(folder: Path, lock: int) -> None:
    """The lock file goes last: while it is there, someone else can finish what was begun here."""
    remove(folder)
    _lock_path(folder).unlink(missing_ok=True)
    os.close(lock)


def _lock_path(folder: Path) -> Path:
    return folder.with_name(folder.name + LOCK)


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it; nothing when it is not there."""
    try:
        path.unlink()
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):  # a folder: Linux says the first, POSIX the second
        import shutil

        shutil.rmtree(path, ignore_errors=True)


def data_home() -> Path:
    """Where what a user keeps lies, by the XDG base directory specification."""
    return _home("XDG_DATA_HOME", ".local/share")


def cache_home() -> Path:
    """Where what can be had again lies."""
    return _home("XDG_CACHE_HOME", ".cache")


def _home(variable: str, default: str) -> Path:
    given = Path(os.environ.get(variable, ""))
    return (given if given.is_absolute() else Path.home() / default) / "llmopt"


def sync_folders(paths: Iterable[Path], root: Path) -> None:
    """Make the names in the folders of `paths`, up to `root`, outlive a loss of power."""
    within = {path.parent for path in paths if path.parent.is_relative_to(root)}
    folders = within | {parent for path in within for parent in path.parents if parent.is_relative_to(root)}
    if len(folders) < _MANY:
        for folder in sorted(folders, reverse=True):
            _sync_folder(folder)
    else:  # the disk makes one wait of several
        do_all(SMALL_AT_ONCE, [partial(_sync_folder, folder) for folder in folders])


def begin_sync(descriptor: int) -> None:
    """Have the system write what it has of a file and nobody wait for it, so that a later fsync has little to do."""
    import ctypes

    with suppress(AttributeError):  # Linux has it
        # The errors that matter are those of the fsync.
        ctypes.CDLL(None).sync_file_range(descriptor, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems do not sync folders
            raise
    finally:
        os.close(descriptor)


def publish(data: bytes, target: Path, *, aside: Path, root: Path) -> None:
    """Put a small read-only file in place of whatever is at `target`, at once and lastingly."""
    temporary_file = aside / f"{os.urandom(6).hex()}.new"
    with temporary_file.open("xb") as file:
        file.write(data)
        file.flush()
        os.fchmod(file.fileno(), 0o444)
        now = time.time_ns()  # the kernel's own stamps are only as fine as its tick
        os.utime(file.fileno(), ns=(now, now))
        os.fsync(file.fileno())
    while True:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary_file.replace(target)
            break
        except FileNotFoundError:  # somebody has tidied the folder away, since it was empty
            if not temporary_file.exists():
                raise
    sync_folders([target], root)


def sync_file(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        os.fsync(file.fileno())


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """All of it: on a disk that is nearly full, the system may write a part and say no word.

    In pieces: for large ones Linux looks for large pages, which may cost it more than all the rest.
    """
    left = memoryview(data)
    while left:
        written = os.pwrite(descriptor, left[:PIECE_BYTES], offset)
        left, offset = left[written:], offset + written


def copy_file(source: Path, target: Path, *, sync: bool = True) -> None:
    """A new file, synced; without moving any bytes where the file system can share them."""
    with source.open("rb", buffering=0) as reader, target.open("xb") as writer:
        with suppress(OSError):
            while os.copy_file_range(reader.fileno(), writer.fileno(), 1 << 30):
                pass
        while chunk := reader.read(1 << 20):  # what the kernel did not or could not copy
            writer.write(chunk)
        writer.flush()
        if sync:
            os.fsync(writer.fileno())


def link_or_copy(source: Path, target: Path) -> None:
    """A copy is not synced."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        copy_file(source, target, sync=False)


@contextmanager
def writing(what: str, folder: Path, *, option: str, needs: int = 0) -> Iterator[None]:
    """Turn an OSError into what a user can act on; `option` is the flag that names another folder."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise full(what, folder, option=option, needs=needs) from error
        raise LlmoptError(
            f"{what} `{folder}` cannot be written: {error.strerror or error}", hint=f"name another with `{option}`"
        ) from error


def full(what: str, folder: Path, *, option: str, needs: int = 0) -> LlmoptError:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    usage = os.statvfs(there)
    wanted = f", {byte_size(needs)} needed" if needs else ""
    return LlmoptError(
        f"too little space on the disk of {what} `{folder}`: {byte_size(usage.f_bavail * usage.f_frsize)} free{wanted}",
        hint=f"free some space, or name a folder on another disk with `{option}`",
    )


def is_full(error: BaseException) -> bool:
    """Whether a disk was full, also as told by libraries that raise an error of their own."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return os.strerror(errno.ENOSPC) in str(error)


def byte_size(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
