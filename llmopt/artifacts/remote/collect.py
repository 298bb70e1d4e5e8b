"""Removing what nobody needs: mark from names, from what is in use and from what is young, then sweep the rest.

An artifact that is kept keeps those that it was made from. The sweep goes the other way round than writers do: first
the action, then the manifest, then what only it had, so that a crash leaves nothing that can be found and is not whole.
What a crash of a writer or of a sweep left, which nothing refers to, goes when it is a day old.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

from llmopt.artifacts import layout
from llmopt.artifacts.disk import byte_size
from llmopt.artifacts.manifest import Manifest
from llmopt.artifacts.outcome import Json, Progress, silent
from llmopt.errors import LlmoptError

if TYPE_CHECKING:
    from llmopt.artifacts.objects import Found
    from llmopt.artifacts.remote import Remote, Removal

T = TypeVar("T")

_AT_ONCE = 16
_BATCH = 500
#: Of artifacts, each of which may be held by a lock.
_LOCKED_BATCH = 200
#: What no artifact refers to is kept for so long: whoever is sending it may not say so.
STRAY_S = 24 * 3600.0


@dataclass(kw_only=True, slots=True)
class Collected:
    """What was removed, or would be; `kept` counts artifacts."""

    artifacts: list[str] = field(default_factory=list)
    blobs: int = 0
    bytes: int = 0
    uploads: int = 0
    kept: int = 0
    damaged: int = 0  # artifacts whose manifest cannot be read: they are left alone

    def to_json(self) -> dict[str, Json]:
        return {
            "artifacts": list(self.artifacts),
            "blobs": self.blobs,
            "bytes": self.bytes,
            "uploads": self.uploads,
            "kept": self.kept,
            "damaged": self.damaged,
        }


class Users(Protocol):
    """Who uses the artifacts of a place, by their digests, as far as that is known there."""

    def last_used(self, digest: str) -> float:
        """Seconds since 1970; 0 for never."""

    def in_use(self, digest: str) -> bool: ...

    def alone(self, digest: str) -> AbstractContextManager[bool]:
        """Whether nobody uses it, and as long as this lasts nobody will begin to."""

    def removed(self, manifests: Collection[Manifest]) -> None:
        """Their manifests are gone."""


class _Unknown:
    def last_used(self, digest: str) -> float:
        return 0.0

    def in_use(self, digest: str) -> bool:
        return False

    def alone(self, digest: str) -> AbstractContextManager[bool]:
        return nullcontext(True)

    def removed(self, manifests: Collection[Manifest]) -> None:
        pass


def collect(
    remote: Remote,
    *,
    older_than_s: float,
    dry_run: bool = False,
    progress: Progress = silent,
    users: Users | None = None,
    alone: bool = False,
) -> Collected:
    """Remove what is not named, not in use, not an ancestor of what is, and older than that many seconds.

    `alone`: see `Remote.removing`.
    LlmoptError when a name stands for nothing: what it stood for could be anything here.
    """
    users = users or _Unknown()
    with remote.removing(alone=alone) as removal:
        listed = remote.listed()
        for problem in remote.broken_names(listed).values():
            raise LlmoptError(
                f"nothing is removed, since {problem}", hint="give the name again: `llmopt store name ARTIFACT NAME`"
            )
        manifests = manifests_of(remote, listed)
        cutoff = removal.now_s - older_than_s
        roots = set(remote.names().values()) | removal.artifacts
        for artifact, found in listed.items():
            digest = layout.digest(artifact)
            if max(found.modified_s, users.last_used(digest)) > cutoff or users.in_use(digest):
                roots.add(artifact)
        gone = sorted(set(manifests) - _with_ancestors(roots, manifests))
        collected = sweep(remote, removal, listed, manifests, gone, users=users, dry_run=dry_run, progress=progress)
        if not dry_run and remote.objects.remote:
            collected.uploads = _abort(remote, removal)
        return collected


def sweep(
    remote: Remote,
    removal: Removal,
    listed: Collection[str],
    manifests: Mapping[str, Manifest],
    gone: Collection[str],
    *,
    users: Users,
    dry_run: bool = False,
    progress: Progress = silent,
) -> Collected:
    """Remove these artifacts, and what no other has and nobody is about to need.

    `listed` are all that are there, `manifests` those that can be read. One that has just been taken into use stays.
    """
    removed = set(gone) if dry_run else set(_remove_artifacts(remote, removal, manifests, gone, users))
    doomed, known = {layout.digest(artifact) for artifact in removed}, {layout.digest(artifact) for artifact in listed}
    needed = {entry.sha256 for id_, manifest in manifests.items() if id_ not in removed for entry in manifest.files}
    own = {entry.sha256 for artifact in removed for entry in manifests[artifact].files}
    cutoff = removal.now_s - STRAY_S
    # What a manifest refers to that cannot be read is not known: then no stray is told from it.
    all_known = len(manifests) == len(known)
    blobs = [
        found
        for sha256, found in _blobs(remote)
        if sha256 not in needed
        and sha256 not in removal.blobs
        and (sha256 in own or (all_known and found.modified_s <= cutoff))
    ]
    collected = Collected(
        artifacts=sorted(removed),
        blobs=len(blobs),
        bytes=sum(found.size for found in blobs),
        kept=len(manifests) - len(removed),
        damaged=len(known) - len(manifests),
    )
    if dry_run:
        return collected
    beside = [
        found
        for digest, found in _beside(remote)
        if digest in doomed or (digest not in known and found.modified_s <= cutoff)
    ]
    for batch in _batches([*beside, *blobs], _BATCH):
        removal.check()
        remote.objects.delete([found.key for found in batch])
    progress(f"removed {len(removed)} artifacts and {len(blobs)} files, {byte_size(collected.bytes)}")
    return collected


def _remove_artifacts(
    remote: Remote, removal: Removal, manifests: Mapping[str, Manifest], gone: Collection[str], users: Users
) -> Iterator[str]:
    """Their actions, then their manifests."""
    for batch in _batches(list(gone), _LOCKED_BATCH):
        with ExitStack() as held:
            free = [artifact for artifact in batch if held.enter_context(users.alone(layout.digest(artifact)))]
            chosen = [manifests[artifact] for artifact in free]
            removal.check()
            remote.objects.delete([layout.action(m.action.key, m.hex) for m in chosen if m.action is not None])
            removal.check()
            remote.objects.delete([layout.manifest(manifest.hex) for manifest in chosen])
            users.removed(chosen)
            yield from free


def _blobs(remote: Remote) -> Iterator[tuple[str, Found]]:
    for found in remote.objects.list(f"{layout.BLOBS}/"):
        sha256 = found.key.rpartition("/")[2]
        if layout.HEX.fullmatch(sha256) and found.key == layout.blob(sha256):
            yield sha256, found


def _beside(remote: Remote) -> Iterator[tuple[str, Found]]:
    """What is said of artifacts, with their digests."""
    for folder in (layout.ACTIONS, layout.ATTESTATIONS, layout.CHUNKS):
        for found in remote.objects.list(f"{folder}/"):
            about = found.key.rpartition("/")[0] if folder == layout.ATTESTATIONS else found.key
            digest = about.rpartition("/")[2] if folder == layout.ATTESTATIONS else layout.hex_of(about)
            if digest is not None and layout.HEX.fullmatch(digest) and layout.hex_of(found.key):
                yield digest, found


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def manifests_of(remote: Remote, ids: Iterable[str]) -> dict[str, Manifest]:
    """Those that can be read."""

    def get(artifact: str) -> Manifest | None:
        try:
            return remote.get(artifact)
        except LlmoptError:
            return None

    wanted = list(ids)
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        found = zip(wanted, threads.map(get, wanted), strict=True)
        return {artifact: manifest for artifact, manifest in found if manifest is not None}


def _with_ancestors(roots: Iterable[str], manifests: Mapping[str, Manifest]) -> set[str]:
    kept: set[str] = set()
    waiting = list(roots)
    while waiting:
        artifact = waiting.pop()
        if artifact in kept:
            continue
        kept.add(artifact)
        manifest = manifests.get(artifact)
        if manifest is not None and manifest.action is not None:
            waiting += [id_ for id_ in manifest.action.inputs.values() if id_ in manifests]
    return kept


def _abort(remote: Remote, removal: Removal) -> int:
    from llmopt.artifacts.objects.multipart import abort_old
    from llmopt.artifacts.objects.s3 import S3Objects

    assert isinstance(remote.objects, S3Objects)
    return abort_old(remote.objects, f"{layout.BLOBS}/", removal.now_s - STRAY_S, except_for=removal.blobs)
