"""Named bytes somewhere else: in a folder or on S3. What a remote store is built on, and a prefix with a checkpoint.

Keys are relative paths with `/`. Every method may be called from several threads. What fails for good, after the
retries that make sense, is an LlmoptError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llmopt.errors import LlmoptError, SettingsError

if TYPE_CHECKING:
    from llmopt.artifacts.objects.s3 import S3Objects

#: Above this a file goes in parts of this size, or of a multiple where there would be too many parts.
PART_BYTES = 16 << 20
MOST_PARTS = 10_000


@dataclass(frozen=True, slots=True)
class Found:
    """An object in a listing. `tag` tells versions apart and nothing else: it is no digest that can be trusted."""

    key: str
    size: int
    modified_s: float  # since 1970, by the clock of whoever keeps it
    tag: str | None = None


class GoneError(LlmoptError):
    """There is no such object (any more)."""


class LostUploadError(LlmoptError):
    """What was sent of a large file is not there any more: it has to be begun anew."""


class Sender(Protocol):
    """A large file on its way, in parts that may be sent in any order and at the same time."""

    parts: Sequence[tuple[int, int, int]]  # number, begin and end (bytes) of those that are still to be sent

    def send(self, number: int, data: bytes | memoryview) -> None: ...

    def finish(self) -> None:
        """Make the object of its parts. Until here nobody sees it."""

    def give_up(self) -> None:
        """It cannot be finished now; what was sent may be used by the next try."""


class Objects(Protocol):
    """Of one place, whose address is `url`."""

    url: str
    remote: bool  # across a network, where a request costs time

    def read(self, key: str, *, most: int) -> bytes | None:
        """All of a small object, up to one byte more than `most`; None if there is none."""

    def read_tagged(self, key: str, *, most: int) -> tuple[bytes, str | None] | None:
        """With what `swap` wants to know."""

    def read_range(self, key: str, begin: int, end: int) -> memoryview:
        """Those bytes; fewer when the object is shorter. GoneError when there is none."""

    def stream(self, key: str, begin: int, end: int) -> Iterator[memoryview]:
        """The same, in pieces so small that who reads one and then writes it finds it in the processor's cache."""

    def find(self, key: str) -> Found | None: ...

    def write(self, key: str, data: bytes | memoryview) -> None:
        """In place of whatever is there."""

    def swap(self, key: str, data: bytes, tag: str | None) -> bool:
        """In place of the version `tag` (None: of nothing), and of no other; whether that was so.

        Where the place cannot compare, the last writer wins (`swaps` is false).
        """

    @property
    def swaps(self) -> bool: ...

    def sender(self, key: str, size: int, digest: str) -> Sender: ...

    def list(self, prefix: str = "") -> Iterator[Found]:
        """All whose key begins with `prefix`, in the order of their keys."""

    def delete(self, keys: Sequence[str]) -> None:
        """Those that are there."""

    def now(self) -> float:
        """The time there, in seconds since 1970."""


def open_objects(url: str) -> Objects:
    """The folder (a path or `file://`) or the `s3://bucket/prefix` that a user named. Nothing is asked yet."""
    if is_s3(url):
        return open_s3(url)
    from llmopt.artifacts.objects.disk import DiskObjects

    return DiskObjects(folder_of(url))


def open_s3(url: str) -> S3Objects:
    from llmopt.artifacts.objects.s3 import S3Objects

    return S3Objects.open(url)


def is_s3(url: str) -> bool:
    """SettingsError for what was meant to be, and would be taken for a folder."""
    if url[:4].lower() == "s3:/" and not url.startswith("s3://"):
        raise SettingsError(f"`{url}` is no address on S3", hint="write it as `s3://BUCKET/PREFIX`")
    return url.startswith("s3://")


def folder_of(url: str) -> Path:
    """The folder that a path or a `file://` URL names."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return Path(url).expanduser()
    if scheme == "file" and rest.startswith("/"):
        from urllib.parse import unquote

        return Path(unquote(rest))
    raise SettingsError(
        f"`{url}` cannot be used: a store is a folder, `file:///FOLDER` or `s3://BUCKET/PREFIX`",
        hint="check the address",
    )


def parts_of(size: int) -> list[tuple[int, int, int]]:
    """Number (from 1), begin and end of each part of a file: at most MOST_PARTS, of whole PART_BYTES but the last."""
    step = PART_BYTES * max(1, -(-size // (PART_BYTES * MOST_PARTS)))
    return [(n + 1, n * step, min(size, (n + 1) * step)) for n in range(max(1, -(-size // step)))]
