"""Takes the files out of a model's layers. No name that a layer holds is used on the disk before all were checked.

A `.raw` layer is one file under the path of its annotation; `.tar`, `.tar+gzip` and `.tar+zstd` are archives. Only
plain files come out: links, devices and sparse files are errors, and so is an archive that unpacks to far more than
a model would. Source: ModelPack model-spec, spec.md.
"""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from llmopt.artifacts import disk
from llmopt.artifacts.digest import same_bytes
from llmopt.artifacts.manifest import FileEntry, check_paths
from llmopt.artifacts.oci import FILE_PATH, Descriptor
from llmopt.artifacts.oci.layout import AGAIN, Blob, Layout
from llmopt.errors import CorruptError, LlmoptError

_MODEL_LAYER = "application/vnd.cncf.model."
_MAX_FILES = 100_000
#: An archive may unpack to this many times its size; weights shrink by half at best, and JSON by some twenty times.
_MAX_RATIO = 100
_SLACK_BYTES = 1 << 20
_NO_MODEL = "this is no model"


@dataclass(frozen=True, slots=True)
class Part:
    """A file that was taken out: where it lies now, and what the layer says it is (the path is not checked)."""

    file: Path
    entry: FileEntry


def take(layout: Layout, layers: Iterable[Descriptor], into: Path) -> list[Part]:
    """The files of all layers, in order, each under a number in the folder `into`; every layer is verified."""
    parts: list[Part] = []
    for layer in layers:
        kind = layer.media_type.rpartition(".")[2] if layer.media_type.startswith(_MODEL_LAYER) else None
        if kind == "raw":
            parts.append(_raw(layout, layer, into / str(len(parts))))
        elif kind in ("tar", "tar+gzip", "tar+zstd"):
            with layout.blob(layer) as blob:
                _untar(layer, kind, blob, into, parts)
        else:
            raise LlmoptError(
                f"the layer `{layer.digest}` is a `{layer.media_type}`",
                hint="llmopt reads ModelPack's layers: `.raw`, `.tar`, `.tar+gzip` and `.tar+zstd`",
            )
        if len(parts) > _MAX_FILES:
            raise CorruptError(f"there are more than {_MAX_FILES} files in the layers", hint=_NO_MODEL)
    return parts


def _raw(layout: Layout, layer: Descriptor, target: Path) -> Part:
    path = layer.annotations.get(FILE_PATH)
    if not path:
        raise CorruptError(f"the layer `{layer.digest}` has no `{FILE_PATH}`", hint="make the layout again")
    part = Part(target, FileEntry(path, layer.size, layer.hex))
    disk.copy_file(layout.path(layer), target)  # without moving any bytes, where the file system can share them
    if not same_bytes(target, part.entry):
        raise CorruptError(f"the blob `{layer.digest}` does not have the bytes of its digest", hint=AGAIN)
    return part


def _untar(layer: Descriptor, kind: str, blob: Blob, into: Path, parts: list[Part]) -> None:
    most_bytes = layer.size if kind == "tar" else layer.size * _MAX_RATIO + _SLACK_BYTES
    try:
        with tarfile.open(fileobj=cast(Any, _Limited(_unpacked(kind, blob), most_bytes, layer)), mode="r|") as archive:
            for count, member in enumerate(archive, 1):
                if count > _MAX_FILES:
                    raise CorruptError(f"there are more than {_MAX_FILES} files in `{layer.digest}`", hint=_NO_MODEL)
                if _is_file(member, layer):
                    parts.append(_member(archive, member, into / str(len(parts))))
    except (tarfile.TarError, EOFError, zlib.error, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the archive
            raise
        blob.finish()  # that the bytes are not those of the digest says more
        raise CorruptError(f"the layer `{layer.digest}` is no {kind}: {error}", hint="make the layout again") from error


def _is_file(member: tarfile.TarInfo, layer: Descriptor) -> bool:
    """Whether it is to be taken out; not the folder entries, since files make the folders they need."""
    name = _plain(member.name)
    if member.isdir():
        if name not in ("", "."):
            _check([name])
        return False
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse() or member.size < 0:
        raise CorruptError(
            f"`{ascii(name)[1:-1]}` in the layer `{layer.digest}` is not a plain file", hint="pack files, not links"
        )
    return True


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> Part:
    reader, digest, left = archive.extractfile(member), hashlib.sha256(), member.size
    if reader is None:
        raise tarfile.ReadError("a file without content")
    with reader, target.open("xb") as writer:
        while chunk := reader.read(min(left, 1 << 20)):
            digest.update(chunk)
            writer.write(chunk)
            left -= len(chunk)
    if left:
        raise tarfile.ReadError("unexpected end of data")
    return Part(target, FileEntry(_plain(member.name), member.size, digest.hexdigest()))


def _plain(name: str) -> str:
    """`tar -C FOLDER .` begins every name with `./`."""
    return name.removeprefix("./")


def check(parts: Iterable[Part]) -> None:
    """CorruptError when a path could leave the artifact's folder, or two could be one file on some file system."""
    _check(part.entry.path for part in parts)


def _check(paths: Iterable[str]) -> None:
    try:
        check_paths(paths)
    except LlmoptError as error:
        raise CorruptError(f"a layer cannot be unpacked: {error.message}", hint=error.hint) from error


class _Limited:
    """A stream that may not give more than it was allowed."""

    def __init__(self, stream: Any, most_bytes: int, layer: Descriptor) -> None:
        self._stream, self._left, self._layer = stream, most_bytes, layer

    def read(self, size: int) -> bytes:
        data: bytes = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise CorruptError(
                f"the layer `{self._layer.digest}` unpacks to more than {_MAX_RATIO} times its size", hint=_NO_MODEL
            )
        return data


def _unpacked(kind: str, blob: Blob) -> Any:
    if kind == "tar+gzip":
        return gzip.GzipFile(fileobj=blob)
    if kind == "tar+zstd":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(blob, mode="r"), "zstd")
    return blob
