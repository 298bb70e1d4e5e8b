"""Digests of files, and of the folders and texts that users bring as inputs."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from llmopt.artifacts import disk, licenses
from llmopt.artifacts.chunks import CHUNK_BYTES, chunk_digest
from llmopt.artifacts.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileEntry, Manifest, parents
from llmopt.artifacts.threads import do_all
from llmopt.errors import CorruptError, LlmoptError

#: What stages read of a folder: weights, configuration, tokenizer and templates; licences go with every derivative.
_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken")
_ENGINE_SUFFIXES = (".xml", ".bin")  # of a model they would be pickles, which no stage reads
_LICENCES = licenses.FILES + licenses.NOTICES
#: A text is its bytes: renaming it changes no result, so its name is not in its digest.
_TEXT_NAME = "text"
_READ_BYTES = 1 << 20

T = TypeVar("T")


def sha256_file(path: Path) -> str:
    """In hex."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(path: Path, name: str) -> tuple[FileEntry, tuple[str, ...]]:
    """The entry `name` of a file that from now on is read-only, and synced to the disk; with its chunk digests."""
    with path.open("rb", buffering=0) as file:
        os.fchmod(file.fileno(), 0o444)
        size = os.fstat(file.fileno()).st_size
        if size > CHUNK_BYTES:
            disk.begin_sync(file.fileno())
        digest, chunks = read_through(file)
        os.fsync(file.fileno())
        return FileEntry(name, size, digest), chunks


def read_through(file: BinaryIO) -> tuple[str, tuple[str, ...]]:
    """The sha256 of what is left in a file, and the digests of its chunks where it is longer than one chunk."""
    whole, part, chunks, left = hashlib.sha256(), chunk_digest(), [], CHUNK_BYTES
    buffer = memoryview(bytearray(_READ_BYTES))
    while count := file.readinto(buffer[: min(left, _READ_BYTES)]):  # type: ignore[attr-defined]
        whole.update(buffer[:count])
        part.update(buffer[:count])
        left -= count
        if not left:
            chunks.append(part.hexdigest())
            part, left = chunk_digest(), CHUNK_BYTES
    if left < CHUNK_BYTES:
        chunks.append(part.hexdigest())
    return whole.hexdigest(), tuple(chunks) if len(chunks) > 1 else ()


def _entry(path: Path, name: str) -> FileEntry:
    return FileEntry(name, path.stat().st_size, sha256_file(path))


def describe(
    path: Path, kind: str, *, only: Iterable[str] | None = None, entry: Callable[[Path, str], FileEntry] = _entry
) -> Manifest:
    """The manifest of an input: a folder's files that stages read (its top level; links are followed), or one file.

    Nothing is copied. A folder that holds an exported artifact is checked against its manifest, which then is the
    answer; CorruptError when it does not agree. LlmoptError when there is nothing to describe. `only` names the files
    of a folder that count, at any depth, whatever else is there. `entry` reads a file, for who copies it meanwhile.
    """
    try:
        if only is not None:
            return Manifest(kind=kind, files=tuple(entry(path / name, name) for name in only))
        if path.is_dir():
            return _describe_folder(path, kind, entry)
        if path.is_file():
            return Manifest(kind=kind, files=(entry(path, _TEXT_NAME),))
    except OSError as error:
        if disk.is_full(error):  # that of the copy
            raise
        raise LlmoptError(f"`{error.filename or path}` cannot be read: {error.strerror}") from error
    raise LlmoptError(f"no file or folder at `{path}`", hint="check the path")


def describe_all(folder: Path, kind: str) -> Manifest:
    """The manifest of all that is in a folder and in those below it, but for hidden files and Python's own caches."""
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts)
    )
    try:
        return Manifest(kind=kind, files=tuple(_entry(path, path.relative_to(folder).as_posix()) for path in paths))
    except OSError as error:
        raise LlmoptError(f"`{error.filename or folder}` cannot be read: {error.strerror}") from error


def faults(
    folder: Path, files: Iterable[FileEntry], same: Callable[[Path, FileEntry], bool]
) -> tuple[list[str], list[FileEntry]]:
    """What keeps `folder` from holding exactly `files`: odd paths, and files missing or not `same`.

    A link never belongs there, be it to a file or to a folder, nor is it taken for `folder` itself.
    """
    if folder.is_symlink():
        return [], list(files)
    wanted = {entry.path: entry for entry in files}
    folders = {parent for path in wanted for parent in parents(path)}
    odd: list[str] = []
    good: set[str] = set()
    for path, mode in _walk(folder, folders):
        entry = wanted.get(path)
        if entry is not None and stat.S_ISREG(mode):
            if same(folder / path, entry):
                good.add(path)
        elif path not in folders or not stat.S_ISDIR(mode):
            odd.append(path)
    return odd, [entry for path, entry in wanted.items() if path not in good]


def at_once() -> int:
    """Files that are read or hashed at the same time: one waits for the disk while others compute, up to what disks
    give."""
    return min(4, (os.cpu_count() or 1) + 1)


def in_parallel(work: Callable[..., T], *arguments: Iterable[Any]) -> list[T]:
    """As `map`, several at a time: one waits for the disk while another computes."""
    calls = list(zip(*arguments, strict=True))
    results: dict[int, T] = {}

    def call(number: int) -> None:
        results[number] = work(*calls[number])

    do_all(at_once(), [partial(call, number) for number in range(len(calls))])
    return [results[number] for number in range(len(calls))]


def same_bytes(path: Path, entry: FileEntry) -> bool:
    """Whether the file has the size and the digest of the entry; one that cannot be read has not."""
    try:
        return path.stat().st_size == entry.size and sha256_file(path) == entry.sha256
    except OSError:
        return False


def _walk(folder: Path, inside: set[str], under: str = "") -> Iterable[tuple[str, int]]:
    """Every path and its mode (of links themselves), going down only into the folders `inside`."""
    try:
        found = sorted(os.scandir(folder / under), key=lambda item: item.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    for item in found:
        path = under + item.name
        try:
            mode = item.stat(follow_symlinks=False).st_mode
        except FileNotFoundError:  # someone else has just removed it
            continue
        yield path, mode
        if path in inside and stat.S_ISDIR(mode):
            yield from _walk(folder, inside, f"{path}/")


def _describe_folder(folder: Path, kind: str, entry: Callable[[Path, str], FileEntry]) -> Manifest:
    names = sorted(file.name for file in folder.iterdir() if is_read(file.name, kind))
    if (folder / MANIFEST_NAME).exists():
        return _check_export(folder, names, entry)
    paths = [path for name in names if not (path := folder / name).is_dir()]
    for path in paths:
        if not path.exists():
            raise LlmoptError(
                f"`{path}` is a link to a file that is gone", hint="download the model again, or remove the link"
            )
        if not path.is_file():
            raise LlmoptError(f"`{path}` is not a regular file", hint="remove it from the folder")
    if not paths:
        raise LlmoptError(
            f"nothing that llmopt reads is in `{folder}`", hint="give the folder that holds config.json itself"
        )
    return Manifest(kind=kind, files=tuple(in_parallel(entry, paths, [path.name for path in paths])))


def is_read(name: str, kind: str) -> bool:
    """Whether stages read a file of this name, at the top of the folder of an input."""
    if name.startswith(".") or "/" in name or name == MANIFEST_NAME:
        return False
    suffixes = _SUFFIXES + (_ENGINE_SUFFIXES if kind == "engine" else ())
    return name.endswith(suffixes) or name.startswith(_LICENCES)


def _check_export(folder: Path, names: list[str], read: Callable[[Path, str], FileEntry]) -> Manifest:
    """The manifest in a folder that `Store.export` or `Store.path` made, once its files are known to be as it says."""
    hint = f"export it again; or delete its `{MANIFEST_NAME}` to use the folder as it is, under a new digest"
    manifest = read_manifest(folder / MANIFEST_NAME, hint=hint)
    listed = {entry.path for entry in manifest.files}
    for entry in manifest.files:
        if not (folder / entry.path).is_file():
            raise CorruptError(f"`{folder / entry.path}` is missing, which `{MANIFEST_NAME}` lists", hint=hint)
    for name in names:
        if name not in listed:
            raise CorruptError(f"`{folder / name}` is not in `{MANIFEST_NAME}`", hint=hint)

    def is_right(entry: FileEntry) -> bool:
        path = folder / entry.path
        return path.stat().st_size == entry.size and read(path, entry.path) == entry

    for entry, right in zip(manifest.files, in_parallel(is_right, manifest.files), strict=True):
        if not right:
            raise CorruptError(f"`{folder / entry.path}` is not the file that `{MANIFEST_NAME}` lists", hint=hint)
    return manifest


def read_manifest(path: Path, *, hint: str) -> Manifest:
    """The manifest in a file outside the store; CorruptError with the hint if it is none."""
    try:
        with path.open("rb") as file:
            return Manifest.from_bytes(file.read(MAX_MANIFEST_BYTES + 1))
    except CorruptError as error:
        raise CorruptError(f"`{path}`: {error.message}", hint=hint) from error
