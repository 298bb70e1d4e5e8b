"""Reading artifacts of any store again: all of them, or a sample; and putting right what another store has whole."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from llmopt.artifacts import chunks, layout
from llmopt.artifacts.manifest import MAX_MANIFEST_BYTES, FileEntry, Manifest
from llmopt.artifacts.objects import Objects
from llmopt.artifacts.outcome import Progress, silent
from llmopt.artifacts.records import action_result
from llmopt.errors import LlmoptError

if TYPE_CHECKING:
    from llmopt.artifacts.remote import Remote

_AT_ONCE = 8


def problems(
    remote: Remote, artifact: str, *, share: float = 1.0, seed: int | None = None, progress: Progress = silent
) -> dict[str, str]:
    """What is wrong with the files of an artifact, by their sha256; of its manifest, under its own digest; of what is
    said about it, under the keys of these objects.

    With a `share` below 1, each chunk of a large file and each small file is read with that probability, and at least
    one of them; what is missing or of another size is found all the same.
    """
    digest = layout.digest(artifact)
    try:
        manifest = remote.get(artifact)
    except LlmoptError as error:
        return {digest: error.message}
    if manifest is None:
        return {digest: f"the manifest of `{artifact}` is missing"}
    entries = list({entry.sha256: entry for entry in manifest.files}.values())
    parts = chunks.from_bytes(remote.chunks(manifest))
    chance = random.Random(seed)
    picks = {entry: _pick(entry, parts.get(entry.sha256, ()), share, chance) for entry in entries}
    if not any(picks.values()):
        entry = chance.choice(entries)
        count = chunks.count(entry.size)
        picks[entry] = [chance.randrange(count)] if len(parts.get(entry.sha256, ())) == count else list(range(count))
    size = sum(span[1] - span[0] for entry in entries for span in _spans(entry, picks[entry]))
    progress(f"verifying {artifact[:19]}: {len(entries)} files, {size} bytes to read", stage="verify")

    def check(entry: FileEntry) -> str | None:
        seen = remote.blob_problem(entry)
        return seen or _read(remote.objects, entry, parts.get(entry.sha256, ()), picks[entry])

    with ThreadPoolExecutor(_AT_ONCE) as threads:
        found = zip(entries, threads.map(check, entries), strict=True)
        return {entry.sha256: problem for entry, problem in found if problem is not None} | _beside(remote, manifest)


def by_path(manifest: Manifest, found: dict[str, str]) -> Iterator[str]:
    """The same in the words of `Store.verify`."""
    for entry in manifest.files:
        if entry.sha256 in found:
            yield f"`{entry.path}` {found[entry.sha256]}"
    yield from (f"`{key}` {problem}" for key, problem in found.items() if "/" in key)


def _beside(remote: Remote, manifest: Manifest) -> dict[str, str]:
    """What is damaged of what is known about an artifact. None of it is used then."""

    def read(key: str) -> bytes | None:
        return remote.objects.read(key, most=MAX_MANIFEST_BYTES)

    damaged = []
    if not chunks.are_whole(remote.chunks(manifest) or b"{}"):
        damaged.append(layout.chunks(manifest.hex))
    for found in remote.objects.list(f"{layout.attestation(manifest.hex)}/"):
        digest = layout.hex_of(found.key)
        if digest is not None and hashlib.sha256(read(found.key) or b"").hexdigest() != digest:
            damaged.append(found.key)
    if manifest.action is not None:
        key = layout.action(manifest.action.key, manifest.hex)
        if read(key) not in (None, action_result(manifest)):
            damaged.append(key)
    return dict.fromkeys(damaged, "is damaged")


def _pick(entry: FileEntry, parts: Sequence[str], share: float, chance: random.Random) -> list[int]:
    """The chunks to be read; of a file whose chunks have no digests, all or none."""
    count = chunks.count(entry.size)
    if share >= 1:
        return list(range(count))
    if len(parts) != count:
        return list(range(count)) if chance.random() < share else []
    return [number for number in range(count) if chance.random() < share]


def _spans(entry: FileEntry, picked: Sequence[int]) -> Iterator[tuple[int, int]]:
    return (chunks.span(entry.size, number) for number in picked)


def _read(objects: Objects, entry: FileEntry, parts: Sequence[str], picked: Sequence[int]) -> str | None:
    """All of the file against its sha256, or chunks of it against theirs."""
    whole = hashlib.sha256() if len(picked) == chunks.count(entry.size) else None
    try:
        for number in picked:
            begin, end = chunks.span(entry.size, number)
            digest = whole or chunks.chunk_digest()
            for piece in objects.stream(layout.blob(entry.sha256), begin, end):
                digest.update(piece)
            if whole is None and digest.hexdigest() != parts[number]:
                return f"has changed bytes between {begin} and {end}"
    except LlmoptError as error:
        return f"cannot be read: {error.message}"
    return "has changed bytes" if whole is not None and whole.hexdigest() != entry.sha256 else None
