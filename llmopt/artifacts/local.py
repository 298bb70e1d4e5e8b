"""Removing artifacts from a store on this disk: what nobody needs, or of a cache what was used longest ago."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING

from llmopt.artifacts import disk, layout
from llmopt.artifacts.manifest import Manifest
from llmopt.artifacts.objects.disk import DiskObjects
from llmopt.artifacts.outcome import Progress, silent
from llmopt.artifacts.remote import Remote
from llmopt.artifacts.remote.collect import Collected, collect, manifests_of, sweep
from llmopt.errors import LlmoptError

if TYPE_CHECKING:
    from llmopt.artifacts.store import Store

#: In a cache: at most so many bytes are in its blobs. Counted anew when it is a day old, or says that it is full.
_SIZE = "size"
_COUNT_S = 24 * 3600.0


def collect_local(
    store: Store, *, older_than_s: float, dry_run: bool = False, progress: Progress = silent
) -> Collected:
    """As `collect`, for a store on this disk: its users are told by their locks, and nobody writes meanwhile.

    Others may write to it as to a remote one, so their leases count too.
    """
    if not store.root.is_dir():
        return Collected()
    here, users = Remote(DiskObjects(store.root), known=True), _Users(store)
    with disk.writing("the store", store.root, option="--store"), store.leases.removing():
        found = collect(here, older_than_s=older_than_s, dry_run=dry_run, progress=progress, users=users, alone=True)
        if not dry_run:
            users.tidy()
            _forget_begun(store, time.time() - older_than_s)
        return found


def evict(
    store: Store,
    limit_bytes: int,
    remote: Remote,
    progress: Progress = silent,
    *,
    keep: Collection[str] = (),
    elsewhere: Callable[[], Collection[str]] = tuple,
) -> Collected:
    """Remove what was used longest ago until the files take no more than the limit; only what the remote has, or what
    is `elsewhere`.

    Artifacts with the digests `keep` stay. To be called whenever they have come: they are taken to have been added.
    What stands in the way is told, and no error: nobody asked for this.
    """
    found = Collected()
    try:
        with disk.writing("the cache", store.root, option="--store"):
            known = _at_most(store, sum(_bytes_of(store, digest) for digest in keep))
            if (known is None or known > limit_bytes) and (size := _count(store)) > limit_bytes:
                found = _evict(store, size - limit_bytes, remote, keep, elsewhere())
                _count(store)
    except LlmoptError as error:
        progress(f"the cache is larger than it should be: {error.message}")
    if found.artifacts:
        progress(f"the cache was full: {len(found.artifacts)} artifacts left it, {disk.byte_size(found.bytes)}")
    return found


def _evict(
    store: Store, bytes_over: int, remote: Remote, keep: Collection[str], elsewhere: Collection[str]
) -> Collected:
    store.leases.release_published(but=keep)
    here, users = Remote(DiskObjects(store.root), known=True), _Users(store)
    gone = set(_to_evict(store, here, bytes_over, remote, keep, elsewhere))
    if not gone:
        return Collected()
    with store.leases.removing(), here.removing(alone=True) as removal:
        listed = here.listed()
        manifests = manifests_of(here, listed)
        gone = {id_ for id_ in gone & set(manifests) if not users.in_use(layout.digest(id_))} - removal.artifacts
        found = sweep(here, removal, listed, manifests, sorted(gone), users=users)
        users.tidy()
    return found


def _to_evict(
    store: Store, here: Remote, bytes_over: int, remote: Remote, keep: Collection[str], elsewhere: Collection[str]
) -> Iterator[str]:
    """Those to remove, the longest unused first. Nothing is locked yet, since the remote may take its time."""
    manifests = manifests_of(here, here.listed())
    having = Counter(sha256 for manifest in manifests.values() for sha256 in _sizes(manifest))
    for artifact in sorted(manifests, key=lambda artifact: _used(store, artifact)):
        if bytes_over <= 0:
            return
        digest = layout.digest(artifact)
        if digest in keep or store.leases.in_use(digest) or not (artifact in elsewhere or remote.has(artifact)):
            continue
        for sha256, size in _sizes(manifests[artifact]).items():
            having[sha256] -= 1
            bytes_over -= 0 if having[sha256] else size
        yield artifact


class _Users:
    """See `collect.Users`: of a store on this disk."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def last_used(self, digest: str) -> float:
        return self._store.leases.last_used(digest)

    def in_use(self, digest: str) -> bool:
        return self._store.leases.in_use(digest)

    def alone(self, digest: str) -> AbstractContextManager[bool]:
        return self._store.leases.alone(digest)

    def removed(self, manifests: Collection[Manifest]) -> None:
        """What on a disk goes with an artifact: the folder of links, and the lease."""
        if not manifests:
            return
        root = self._store.root
        disk.sync_folders([root / layout.manifest(manifest.hex) for manifest in manifests], root)
        with self._store.blobs.relinking({entry.sha256 for manifest in manifests for entry in manifest.files}):
            for manifest in manifests:
                self._forget(manifest.hex)

    def tidy(self) -> None:
        """What was left by those who were killed, and folders that are empty now."""
        root = self._store.root
        trees: set[str] = set()
        with suppress(FileNotFoundError):
            trees = {path.name for path in (root / "trees").iterdir() if layout.HEX.fullmatch(path.name)}
        for digest in trees.union(self._store.leases.digests()):
            if not (root / layout.manifest(digest)).exists():
                with self.alone(digest) as unused:
                    if unused:
                        self._forget(digest)
        for kind in (layout.ACTIONS, layout.ATTESTATIONS):
            with suppress(FileNotFoundError):
                for folder in (root / kind).iterdir():
                    with suppress(OSError):
                        folder.rmdir()
        self._store.blobs.compact()

    def _forget(self, digest: str) -> None:
        tree = self._store.root / "trees" / digest
        if os.path.lexists(tree):
            with disk.temporary(self._store.root / "tmp") as aside, suppress(FileNotFoundError):
                tree.rename(aside / "tree")
        self._store.leases.forget(digest)


def _used(store: Store, artifact: str) -> float:
    digest = layout.digest(artifact)
    with suppress(OSError):
        return max(store.leases.last_used(digest), (store.root / layout.manifest(digest)).stat().st_mtime)
    return 0.0


def _sizes(manifest: Manifest) -> dict[str, int]:
    """Bytes of each of its blobs."""
    return {entry.sha256: entry.size for entry in manifest.files}


def _bytes_of(store: Store, digest: str) -> int:
    artifact = f"sha256:{digest}"
    return sum(_sizes(store.get(artifact)).values()) if store.has(artifact) else 0


def _at_most(store: Store, added: int) -> int | None:
    """How much is in the blobs, or more, since some of what came may have been there; None if it has to be counted."""
    file = store.root / _SIZE
    with disk.locked(file):
        try:
            size, at_s = map(int, file.read_text().split())
        except (OSError, ValueError):
            return None
        if not 0 <= time.time() - at_s < _COUNT_S:
            return None
        file.write_text(f"{size + added} {at_s}\n")
        return size + added


def _count(store: Store) -> int:
    """The bytes of all blobs, to be remembered."""
    file = store.root / _SIZE
    with disk.locked(file):
        size = sum(found.size for found in DiskObjects(store.root).list(f"{layout.BLOBS}/"))
        file.write_text(f"{size} {int(time.time())}\n")
        return size


def _forget_begun(store: Store, before_s: float) -> None:
    """What actions that ended early have left, unless a process is at work on it."""
    folder = store.root / "begun"
    with suppress(FileNotFoundError):
        for begun in list(folder.iterdir()):
            key = begun.name.removesuffix(disk.LOCK)
            if layout.HEX.fullmatch(key):
                with suppress(FileNotFoundError):
                    if os.lstat(begun).st_mtime < before_s:
                        store.forget(key)
