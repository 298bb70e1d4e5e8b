"""Digests of the chunks of large files: what a transfer checks as it comes, and goes on from after a cut.

They are no identity: that is the sha256 of the whole file, which is always checked too. So a digest that is quick
(XXH3, 128 bits) will do. They lie beside the manifest: `{"schema": ..., "chunk_bytes": ..., "files": {sha256: [...]},
"check": the digest of "files"}`. Damaged, they are as good as none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.artifacts.manifest import canonical_json
from llmopt.errors import LlmoptError

if TYPE_CHECKING:
    from xxhash import xxh3_128

CHUNK_BYTES = 16 << 20
_SCHEMA = "llmopt.chunks/1"


def chunk_digest() -> xxh3_128:
    """A digest to be updated."""
    from xxhash import xxh3_128

    return xxh3_128()


def of_bytes(data: bytes | memoryview) -> str:
    from xxhash import xxh3_128_hexdigest

    return xxh3_128_hexdigest(data)


def of_file(path: Path) -> tuple[str, ...]:
    """Of each chunk."""
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        spans = (span(size, number) for number in range(count(size)))
        return tuple(of_bytes(os.pread(file.fileno(), end - begin, begin)) for begin, end in spans)


def count(size: int) -> int:
    """How many chunks a file of this size has."""
    return max(1, -(-size // CHUNK_BYTES))


def span(size: int, number: int) -> tuple[int, int]:
    """Where the chunk begins and ends, in bytes."""
    return number * CHUNK_BYTES, min(size, (number + 1) * CHUNK_BYTES)


def to_bytes(files: Mapping[str, tuple[str, ...]]) -> bytes:
    listed = {key: list(value) for key, value in files.items()}
    check = of_bytes(canonical_json(listed))
    return canonical_json({"schema": _SCHEMA, "chunk_bytes": CHUNK_BYTES, "files": listed, "check": check})


def are_whole(data: bytes) -> bool:
    """Whether this is a list as it was written, or `{}`."""
    return data == b"{}" or _files(data) is not None


def from_bytes(data: bytes | None) -> dict[str, tuple[str, ...]]:
    """By the sha256 of the file; empty where there are none, or none that this version can use, or damaged ones."""
    return {key: tuple(value) for key, value in (_files(data or b"") or {}).items()}


def _files(data: bytes) -> dict[str, list[str]] | None:
    try:
        found = json.loads(data)
        files = found["files"]
        whole = found["check"] == of_bytes(canonical_json(files))
        return files if whole and found["schema"] == _SCHEMA and found["chunk_bytes"] == CHUNK_BYTES else None
    except (ValueError, KeyError, TypeError, RecursionError, LlmoptError):
        return None
