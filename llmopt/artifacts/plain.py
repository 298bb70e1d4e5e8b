"""An artifact, or a checkpoint, as plain files below a prefix of a bucket: what serving stacks and other tools read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.artifacts import disk
from llmopt.artifacts.digest import is_read
from llmopt.artifacts.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileEntry, Manifest, canonical_json
from llmopt.artifacts.meter import Meter, Moved
from llmopt.artifacts.objects import Found, Objects, open_objects
from llmopt.artifacts.outcome import Json, Progress, silent
from llmopt.artifacts.receiving import Wanted, receive
from llmopt.artifacts.sending import Outgoing
from llmopt.errors import CorruptError, LlmoptError, SettingsError

if TYPE_CHECKING:
    from llmopt.artifacts.store import Store

_NEW_PREFIX = "name a prefix that has nothing below it yet"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
#: What a checkpoint says of itself besides what stages read: its card, which states the licence.
_CARD = "README.md"


def check_out(url: str) -> Objects:
    """Refuse, before any work, a prefix that an artifact could not be written to."""
    objects = open_objects(url)
    first = next(objects.list(), None)
    if first is not None and _manifest(objects) is None and not _is_ours(objects):
        raise SettingsError(f"`{url}` is not empty: it holds `{first.key}`", hint=_NEW_PREFIX)
    return objects


def write(store: Store, artifact: str, url: str, progress: Progress = silent) -> Moved:
    """The artifact's files and, last of all, its manifest: whoever waits for that sees all of it.

    What is there already of this very artifact is not sent again.
    """
    manifest, objects = store.get(artifact), check_out(url)
    found = _manifest(objects)
    if found is not None and found.id != artifact:
        raise SettingsError(f"`{url}` holds another artifact, {found.id[:19]}", hint=_NEW_PREFIX)
    meter = Meter(progress, "push", f"writing to {objects.url}")
    if found is None:
        objects.write(_BEGUN, canonical_json({"artifact": artifact}))
    outgoing = Outgoing(
        store=store, objects=objects, key=lambda entry: entry.path, chunks=store.chunks(manifest), meter=meter
    )
    outgoing.send(manifest.files)
    objects.write(MANIFEST_NAME, manifest.to_bytes())
    objects.delete([_BEGUN])
    return meter.end()


def read(store: Store, url: str, progress: Progress = silent) -> str:
    """Bring what lies below the prefix into the store, as far as it is not there; the artifact's id.

    One that was exported is known by its manifest; of a checkpoint what stages read becomes a `model`, of the same id
    as a folder with the same files has. What was fetched before and has not changed since is not fetched again.
    """
    objects = open_objects(url)
    manifest = _manifest(objects)
    if manifest is not None:
        return _read_artifact(store, objects, manifest, progress)
    listed = [found for found in objects.list() if "/" not in found.key]
    wanted = [found for found in listed if is_read(found.key, "model")]
    if not any(found.key == "config.json" for found in wanted):
        raise _no_checkpoint(objects, listed)
    if not any(found.key.endswith(".safetensors") for found in wanted):
        pickled = next((found.key for found in listed if found.key.endswith(_PICKLES)), None)
        raise _no_weights(objects, pickled)
    known = _Known.read(store.root, objects, wanted)
    if known.artifact is not None and store.has(known.artifact):
        return known.artifact
    with store.stage(known.key) as folder:
        meter = Meter(progress, "pull", f"fetching {objects.url}")
        receive(objects, [Wanted(found.key, found.size, folder / found.key) for found in wanted], meter)
        meter.end()
        made = store.put(folder, kind="model").id
    known.remember(made)
    return made


def card(url: str) -> str | None:
    """The model card, which is no part of a checkpoint's digest."""
    data = open_objects(url).read(_CARD, most=1 << 20)
    return None if data is None else data.decode(errors="replace")


_BEGUN = ".llmopt-begun.json"


def _is_ours(objects: Objects) -> bool:
    """Whether writing was begun here and not finished."""
    return objects.find(_BEGUN) is not None


def _manifest(objects: Objects) -> Manifest | None:
    data = objects.read(MANIFEST_NAME, most=MAX_MANIFEST_BYTES)
    if data is None:
        return None
    try:
        return Manifest.from_bytes(data)
    except CorruptError as error:
        raise CorruptError(
            f"`{objects.url}/{MANIFEST_NAME}`: {error.message}",
            hint="write the artifact again; or delete the file to use the rest as it is",
        ) from error


def _read_artifact(store: Store, objects: Objects, manifest: Manifest, progress: Progress) -> str:
    missing: list[FileEntry] = list(
        {entry.sha256: entry for entry in manifest.files if not store.has_blob(entry)}.values()
    )
    if missing or not store.has(manifest.id):
        with store.stage(manifest.hex) as folder:
            meter = Meter(progress, "pull", f"fetching {objects.url}")
            wanted = [Wanted(entry.path, entry.size, folder / entry.sha256, entry.sha256) for entry in missing]
            receive(objects, wanted, meter)
            meter.end()
            store.adopt(manifest, {entry.sha256: folder / entry.sha256 for entry in missing}, {})
    return manifest.id


class _Known:
    """What was found below a prefix the last time, as the listing told it."""

    def __init__(self, file: Path, listing: Json, artifact: str | None) -> None:
        self._file, self._listing, self.artifact = file, listing, artifact
        self.key = file.stem

    @classmethod
    def read(cls, root: Path, objects: Objects, wanted: Sequence[Found]) -> _Known:
        import hashlib

        listing: Json = [[found.key, found.size, found.modified_s, found.tag] for found in wanted]
        place = f"{getattr(getattr(objects, 'access', None), 'endpoint', '')}\n{objects.url}"
        file = root / "sources" / f"{hashlib.sha256(place.encode()).hexdigest()}.json"
        with suppress(OSError, ValueError):
            found = json.loads(file.read_bytes())
            if isinstance(found, dict) and found.get("listing") == listing:
                return cls(file, listing, str(found.get("artifact")))
        return cls(file, listing, None)

    def remember(self, artifact: str) -> None:
        with suppress(OSError), disk.temporary(self._file.parents[1] / "tmp") as aside:
            data = canonical_json({"listing": self._listing, "artifact": artifact})
            disk.publish(data, self._file, aside=aside, root=self._file.parents[1])


def _no_checkpoint(objects: Objects, listed: Sequence[Found]) -> LlmoptError:
    what = "nothing lies" if not listed else "no `config.json` lies"
    return LlmoptError(f"{what} at `{objects.url}`", hint="give the prefix that has config.json directly below it")


def _no_weights(objects: Objects, pickled: str | None) -> LlmoptError:
    if pickled is None:
        return LlmoptError(f"no `*.safetensors` lies at `{objects.url}`", hint="is the upload complete?")
    return LlmoptError(
        f"`{objects.url}` has its weights as pickles only (`{pickled}`), which can run any code",
        hint="load it with transformers where you trust it, `model.save_pretrained(FOLDER)`, and give that folder",
    )
