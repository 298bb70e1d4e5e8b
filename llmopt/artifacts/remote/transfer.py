"""Whole artifacts between a store on this disk and one elsewhere: the files, then what is known about them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.artifacts import chunks, layout
from llmopt.artifacts.export import new_folder
from llmopt.artifacts.manifest import Manifest, canonical_json
from llmopt.artifacts.outcome import Progress, silent
from llmopt.artifacts.records import action_result
from llmopt.artifacts.remote.meter import Meter, Moved
from llmopt.artifacts.remote.receiving import Wanted, receive
from llmopt.artifacts.remote.sending import Outgoing
from llmopt.errors import CorruptError, LlmoptError

if TYPE_CHECKING:
    from llmopt.artifacts.remote import Remote
    from llmopt.artifacts.store import Store


def push(
    store: Store, artifact: str, remote: Remote, progress: Progress = silent, *, replace: Collection[str] = ()
) -> Moved:
    """Send an artifact with what is known about it. Nobody sees it before all of it is there.

    `replace` names blobs (by sha256) that are there and damaged.
    """
    manifest = store.get(artifact)
    entries = list({entry.sha256: entry for entry in manifest.files}.values())
    inputs = () if manifest.action is None else manifest.action.inputs.values()
    with remote.writing([entry.sha256 for entry in entries], [artifact, *inputs], progress) as lease:
        meter = Meter(progress, "push", f"pushing to {remote.url}")
        if replace or not remote.holds(manifest):
            parts = store.chunks(manifest)
            outgoing = Outgoing(
                store=store,
                objects=remote.objects,
                key=lambda entry: layout.blob(entry.sha256),
                chunks=parts,
                meter=meter,
                renew=lease.renew,
                replace=replace,
            )
            outgoing.send(entries)
            if parts:
                remote.add(layout.chunks(manifest.hex), chunks.to_bytes(parts))
            lease.check()  # all that was there when this asked is there still
            remote.add(layout.manifest(manifest.hex), manifest.to_bytes())
        for statement in map(canonical_json, store.statements(artifact)):
            remote.add(layout.attestation(manifest.hex, hashlib.sha256(statement).hexdigest()), statement)
        if manifest.action is not None:
            remote.add(layout.action(manifest.action.key, manifest.hex), action_result(manifest))
        return meter.end()


def pull(store: Store, artifact: str, remote: Remote, progress: Progress = silent) -> Moved:
    """Bring an artifact into the store with what is known about it; LlmoptError when it is not there."""
    manifest = remote.get(artifact)
    if manifest is None:
        raise LlmoptError(f"no artifact `{artifact}` in the store `{remote.url}`", hint="`llmopt store ls --store URL`")
    meter = Meter(progress, "pull", f"pulling from {remote.url}")
    try:
        _take(store, manifest, remote, meter)
    except CorruptError:  # what was here may just have been removed, with an artifact that nobody needed
        _take(store, manifest, remote, meter)
    for statement in remote.statements(artifact):
        with suppress(CorruptError):  # one that is about something else tells nothing
            store.attach(artifact, statement)
    return meter.end()


def _take(store: Store, manifest: Manifest, remote: Remote, meter: Meter) -> None:
    """Fetch the files that are not here, and have them as the artifact."""
    entries = {entry.sha256: entry for entry in manifest.files}
    missing = [entry for entry in entries.values() if not store.blobs.has(entry)]
    parts = store.chunks(manifest)
    if any(entry.size > chunks.CHUNK_BYTES and entry.sha256 not in parts for entry in entries.values()):
        parts |= {sha: found for sha, found in chunks.from_bytes(remote.chunks(manifest)).items() if sha in entries}
    with store.stage(manifest.hex) as folder:
        wanted = [
            Wanted(layout.blob(e.sha256), e.size, folder / e.sha256, e.sha256, parts.get(e.sha256, ())) for e in missing
        ]
        parts |= receive(remote.objects, wanted, meter)
        for entry in entries.values():
            if entry.size > chunks.CHUNK_BYTES and entry.sha256 not in parts:
                here = folder / entry.sha256
                parts[entry.sha256] = chunks.of_file(here if here.exists() else store.blobs.path(entry.sha256))
        store.here.adopt(manifest, {each.target.name: each.target for each in wanted}, parts)


def pull_part(artifact: str, remote: Remote, dest: Path, include: Sequence[str], progress: Progress = silent) -> Moved:
    """Copy the files of an artifact that a pattern fits (`*.json`) into a new folder, which is no artifact then."""
    manifest = remote.get(artifact)
    if manifest is None:
        raise LlmoptError(f"no artifact `{artifact}` in the store `{remote.url}`", hint="`llmopt store ls --store URL`")
    entries = [entry for entry in manifest.files if any(fnmatch(entry.path, pattern) for pattern in include)]
    if not entries:
        listed = ", ".join(f"`{entry.path}`" for entry in manifest.files[:5])
        raise LlmoptError(f"no file of `{artifact[:19]}` is like that", hint=f"it has {listed}")
    parts = chunks.from_bytes(remote.chunks(manifest))
    meter = Meter(progress, "pull", f"pulling from {remote.url}")
    with new_folder(dest, needs=sum(entry.size for entry in entries)) as aside:
        wanted = [
            Wanted(layout.blob(e.sha256), e.size, aside / e.path, e.sha256, parts.get(e.sha256, ())) for e in entries
        ]
        receive(remote.objects, wanted, meter)
    return meter.end()
