"""Removing artifacts from a store on this disk: what nobody needs, or of a cache what was used longest ago."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from llmopt.artifacts import disk, layout
from llmopt.artifacts.collect import Collected, collect, manifests_of, sweep
from llmopt.artifacts.manifest import Manifest
from llmopt.artifacts.objects.disk import DiskObjects
from llmopt.artifacts.outcome import Progress, silent
from llmopt.artifacts.remote import Remote

if TYPE_CHECKING:
    from llmopt.artifacts.store import Store


def collect_local(
    store: Store, *, older_than_s: float, dry_run: bool = False, progress: Progress = silent
) -> Collected:
    """As `collect`, for a store on this disk: its users are told by their locks, and nobody writes meanwhile."""
    if not store.root.is_dir():
        return Collected()
    with disk.writing("the store", store.root, option="--store"), store.leases.removing(), ExitStack() as held:

        def in_use(digest: str) -> bool:
            """If not, nobody can begin to use it until the end."""
            return not held.enter_context(store.leases.alone(digest))

        found = collect(
            Remote(DiskObjects(store.root)),
            older_than_s=older_than_s,
            dry_run=dry_run,
            progress=progress,
            last_used=store.leases.last_used,
            in_use=in_use,
        )
        if not dry_run:
            _clear(store, found.artifacts)
            _forget_begun(store, time.time() - older_than_s)
        return found


def evict(
    store: Store, limit_bytes: int, remote: Remote, progress: Progress = silent, *, keep: Collection[str] = ()
) -> Collected:
    """Remove what was used longest ago until the files take no more than the limit; only what the remote has."""
    size = _size(store)
    if size <= limit_bytes:
        return Collected()
    here = Remote(DiskObjects(store.root))
    with disk.writing("the store", store.root, option="--store"), store.leases.removing(), ExitStack() as held:
        with here.removing() as removal:
            manifests = manifests_of(here, here.listed())
            gone: list[str] = []
            left = size
            for artifact in sorted(manifests, key=lambda artifact: _used(store, artifact)):
                if left <= limit_bytes:
                    break
                digest = layout.digest(artifact)
                if digest in keep or not held.enter_context(store.leases.alone(digest)) or not remote.has(artifact):
                    continue
                gone.append(artifact)
                left = size - _freed(manifests, gone)
            found = sweep(here, removal, manifests, gone)
        _clear(store, found.artifacts)
    if gone:
        progress(f"the cache was full: {len(gone)} artifacts left it, {disk.byte_size(found.bytes)}")
    return found


def _used(store: Store, artifact: str) -> float:
    digest = layout.digest(artifact)
    with suppress(OSError):
        return max(store.leases.last_used(digest), (store.root / layout.manifest(digest)).stat().st_mtime)
    return 0.0


def _size(store: Store) -> int:
    """Bytes of all blobs."""
    return sum(found.size for found in DiskObjects(store.root).list(f"{layout.BLOBS}/"))


def _freed(manifests: dict[str, Manifest], gone: Iterable[str]) -> int:
    """Bytes of the blobs that only these have."""
    doomed = set(gone)
    needed = {entry.sha256 for id_, manifest in manifests.items() if id_ not in doomed for entry in manifest.files}
    own = {entry.sha256: entry.size for id_ in doomed for entry in manifests[id_].files}
    return sum(size for sha256, size in own.items() if sha256 not in needed)


def _clear(store: Store, artifacts: Iterable[str]) -> None:
    """What on a disk goes with an artifact: the folder of links, the lease, and folders that are empty now."""
    for artifact in artifacts:
        digest = layout.digest(artifact)
        tree = store.root / "trees" / digest
        with disk.temporary(store.root / "tmp") as aside, suppress(FileNotFoundError):
            tree.rename(aside / "tree")
        store.leases.forget(digest)
    for kind in (layout.ACTIONS, layout.ATTESTATIONS):
        with suppress(FileNotFoundError):
            for folder in (store.root / kind).iterdir():
                with suppress(OSError):
                    folder.rmdir()


def _forget_begun(store: Store, before_s: float) -> None:
    """What actions that ended early have left, unless a process is at work on it."""
    folder = store.root / "begun"
    with suppress(FileNotFoundError):
        for begun in [path for path in folder.iterdir() if layout.HEX.fullmatch(path.name)]:
            if os.lstat(begun).st_mtime < before_s:
                store.forget(begun.name)
