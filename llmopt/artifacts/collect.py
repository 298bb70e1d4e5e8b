"""Removing what nobody needs: mark from names, from what is in use and from what is young, then sweep the rest.

An artifact that is kept keeps those that it was made from. The sweep goes the other way round than writers do: first
the action, then the manifest, then what only it had, so that a crash leaves nothing that can be found and is not whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmopt.artifacts import layout
from llmopt.artifacts.disk import byte_size
from llmopt.artifacts.manifest import Manifest
from llmopt.artifacts.outcome import Json, Progress, silent
from llmopt.errors import LlmoptError

if TYPE_CHECKING:
    from llmopt.artifacts.remote import Remote, Removal

_AT_ONCE = 16
_BATCH = 500
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


def collect(
    remote: Remote,
    *,
    older_than_s: float,
    dry_run: bool = False,
    progress: Progress = silent,
    last_used: Callable[[str], float] = lambda digest: 0.0,
    in_use: Callable[[str], bool] = lambda digest: False,
) -> Collected:
    """Remove what is not named, not in use, not an ancestor of what is, and older than that many seconds."""
    with remote.removing() as removal:
        listed = remote.listed()
        manifests = manifests_of(remote, listed)
        cutoff = removal.now_s - older_than_s
        roots = {artifact for artifact in remote.names().values() if artifact in listed}
        for artifact, found in listed.items():
            digest = layout.digest(artifact)
            if max(found.modified_s, last_used(digest)) >= cutoff or in_use(digest):
                roots.add(artifact)
        gone = sorted(set(manifests) - _with_ancestors(roots, manifests))
        collected = sweep(remote, removal, manifests, gone, dry_run=dry_run, progress=progress)
        collected.damaged = len(listed) - len(manifests)
        if not dry_run and remote.objects.remote:
            collected.uploads = _abort(remote, cutoff, removal.protected)
        return collected


def sweep(
    remote: Remote,
    removal: Removal,
    manifests: Mapping[str, Manifest],
    gone: Collection[str],
    *,
    dry_run: bool = False,
    progress: Progress = silent,
) -> Collected:
    """Remove these artifacts, and the blobs that no other has and nobody is about to need."""
    doomed = set(gone)
    needed = {entry.sha256 for id_, manifest in manifests.items() if id_ not in doomed for entry in manifest.files}
    needed |= removal.protected
    own = {entry.sha256 for artifact in gone for entry in manifests[artifact].files}
    # What some other manifest that cannot be read refers to is not known: then only strays are told by their age.
    cutoff = removal.now_s - STRAY_S
    blobs = [
        found
        for found in remote.objects.list(f"{layout.BLOBS}/")
        if (sha256 := found.key.rpartition("/")[2]) not in needed and (sha256 in own or found.modified_s < cutoff)
    ]
    if len(manifests) < len(remote.listed()):
        blobs = [found for found in blobs if found.key.rpartition("/")[2] in own]
    collected = Collected(
        artifacts=list(gone),
        blobs=len(blobs),
        bytes=sum(found.size for found in blobs),
        kept=len(manifests) - len(gone),
    )
    if dry_run:
        return collected
    for artifact in gone:
        removal.renew()
        manifest = manifests[artifact]
        if manifest.action is not None:
            remote.objects.delete([layout.action(manifest.action.key, manifest.hex)])
        remote.objects.delete([layout.manifest(manifest.hex)])
        beside = [found.key for found in remote.objects.list(f"{layout.attestation(manifest.hex)}/")]
        remote.objects.delete([*beside, layout.chunks(manifest.hex)])
    for start in range(0, len(blobs), _BATCH):
        removal.renew()
        remote.objects.delete([found.key for found in blobs[start : start + _BATCH]])
    progress(f"removed {len(gone)} artifacts and {len(blobs)} files, {byte_size(collected.bytes)}")
    return collected


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


def _abort(remote: Remote, before_s: float, needed: Collection[str]) -> int:
    from llmopt.artifacts.objects.multipart import abort_old
    from llmopt.artifacts.objects.s3 import S3Objects

    assert isinstance(remote.objects, S3Objects)
    return abort_old(remote.objects, f"{layout.BLOBS}/", before_s, except_for=needed)
