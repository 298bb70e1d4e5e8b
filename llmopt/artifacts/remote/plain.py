"""An artifact, or a checkpoint, as plain files below a prefix of a bucket: what serving stacks and other tools read."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.artifacts import disk, licenses
from llmopt.artifacts.digest import is_read
from llmopt.artifacts.licenses import Stated
from llmopt.artifacts.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    canonical_json,
    check_paths,
)
from llmopt.artifacts.objects import Found, Objects, open_objects
from llmopt.artifacts.outcome import Json, Progress, silent
from llmopt.artifacts.remote.meter import Meter, Moved
from llmopt.artifacts.remote.receiving import Wanted, receive
from llmopt.artifacts.remote.sending import Outgoing
from llmopt.artifacts.store import BEGUN
from llmopt.errors import CorruptError, LlmoptError, SettingsError

if TYPE_CHECKING:
    from llmopt.artifacts.store import Store

_NEW_PREFIX = "name a prefix that has nothing below it yet"
#: The manifest of what is being written, until it is there.
_BEGUN = ".llmopt-begun.json"
_SOURCES = "sources"
#: Of a card or a licence, which are read before anything else.
_NOTICE_BYTES = 1 << 20
#: An upload that was begun so long ago is nobody's any more.
_LEFT_S = 24 * 3600.0


# --- writing


def check_out(url: str, *, anew: bool = False) -> None:
    """Refuse, before any work, a prefix that an artifact could not be written to.

    One that holds an exported artifact passes, since the work may turn out to give that very artifact; not `anew`, when
    it never does.
    """
    objects = open_objects(url)
    first = next(objects.list(), None)
    if first is None:
        probe = f".llmopt-{os.urandom(6).hex()}"
        objects.write(probe, b"")
        objects.delete([probe])
    elif _manifest(objects, _BEGUN) is None and (anew or _manifest(objects) is None):
        raise _not_empty(url, first.key)


def write(store: Store, artifact: str, url: str, progress: Progress = silent) -> Moved:
    """The artifact's files and, last of all, its manifest: whoever waits for that sees all of it.

    What is there already of this very artifact is not sent again; of another one that was not finished it is removed.
    """
    store.fetch(artifact)
    manifest, objects = store.get(artifact), open_objects(url)
    there = {found.key: found.size for found in objects.list()}
    written = _manifest(objects) if MANIFEST_NAME in there else None
    begun = _manifest(objects, _BEGUN) if _BEGUN in there else None
    if written is not None and written.id != artifact:
        raise SettingsError(f"`{url}` holds another artifact, {written.id[:19]}", hint=_NEW_PREFIX)
    ours = {MANIFEST_NAME, _BEGUN} | {entry.path for known in (written, begun) if known for entry in known.files}
    if foreign := sorted(there.keys() - ours):
        raise _not_empty(url, foreign[0])
    if begun is not None:
        _abort_left(objects)
    meter = Meter(progress, "push", f"writing to {objects.url}")
    if written is None and (begun is None or begun.id != artifact):
        objects.write(_BEGUN, manifest.to_bytes())
        objects.delete([key for key in there if key != _BEGUN])
        there = {}
    missing = [entry for entry in manifest.files if there.get(entry.path) != entry.size]
    if missing:
        outgoing = Outgoing(
            store=store.here,
            objects=objects,
            key=lambda entry: entry.path,
            chunks=store.here.chunks(manifest),
            meter=meter,
        )
        outgoing.send(missing)
    if written is None:
        objects.write(MANIFEST_NAME, manifest.to_bytes())
    if written is None or begun is not None:
        objects.delete([_BEGUN])
    return meter.end()


def _abort_left(objects: Objects) -> None:
    """Remove what who was killed here had sent of large files: nobody goes on with it, and it would cost for ever."""
    from llmopt.artifacts.objects.multipart import abort_old
    from llmopt.artifacts.objects.s3 import S3Objects

    if isinstance(objects, S3Objects):
        abort_old(objects, "", time.time() - _LEFT_S)


# --- reading


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """What lies directly below a prefix, as it was listed, and the manifest of the artifact that was written there."""

    objects: Objects
    listed: Sequence[Found]
    manifest: Manifest | None

    @classmethod
    def open(cls, url: str) -> Prefix:
        """CorruptError for a manifest that cannot be used; LlmoptError where there is nothing, or half of it."""
        objects = open_objects(url)
        found = list(objects.list())
        listed = [each for each in found if "/" not in each.key]
        names = {found.key for found in listed}
        manifest = _manifest(objects) if MANIFEST_NAME in names else None
        if manifest is None and _BEGUN in names:
            raise LlmoptError(
                f"`{objects.url}` is not complete: it is being written, or that was cut off",
                hint="wait, or run the command that writes it again: it goes on where it stopped",
            )
        if not listed:
            below = next((each.key for each in found if each.key.endswith(("/config.json", f"/{MANIFEST_NAME}"))), None)
            meant = "" if below is None else f"did you mean `{objects.url}/{below.rpartition('/')[0]}`?"
            raise LlmoptError(f"nothing lies at `{objects.url}`", hint=meant or "check the bucket and the prefix")
        return cls(objects=objects, listed=listed, manifest=manifest)

    @property
    def url(self) -> str:
        return self.objects.url

    def licenses(self) -> tuple[Stated, ...]:
        """What a folder with the same files would state, from the smallest of them."""
        made = self.manifest is not None and self.manifest.action is not None
        if self.manifest is not None and (stated := licenses.of_manifest(self.manifest)):
            return stated
        starts = licenses.FILES + licenses.NOTICES
        notices = [found.key for found in self.listed if found.key.startswith(starts) or found.key == licenses.CARD]
        with self.small(notices) as folder:
            return licenses.of_folder(folder, card=not made)

    @contextmanager
    def small(self, names: Collection[str]) -> Iterator[Path]:
        """A folder, for a while, with those of these files that are there."""
        with tempfile.TemporaryDirectory(prefix="llmopt-") as temporary:
            folder = Path(temporary) / (self.url.rpartition("/")[2] or "model")
            folder.mkdir()
            for name in {found.key for found in self.listed}.intersection(names):
                data = self.objects.read(name, most=_NOTICE_BYTES)
                if data is not None:
                    (folder / name).write_bytes(data)
            yield folder


def read(store: Store, prefix: Prefix, progress: Progress = silent) -> str:
    """Bring what lies below a prefix to this disk, as far as it is not there; the artifact's id.

    One that was written there is known by its manifest; of a checkpoint what stages read becomes a `model`, of the same
    id as a folder with the same files has. What was fetched before and has not changed since is not fetched again.
    """
    if prefix.manifest is not None:
        _read_artifact(store, prefix.objects, prefix.manifest, progress)
        return prefix.manifest.id
    return _read_checkpoint(store, prefix, progress)


def read_file(store: Store, url: str, progress: Progress = silent) -> Path | None:
    """A single object on this disk, under its own name; None where there is none."""
    place, _, name = url.rstrip("/").rpartition("/")
    objects = open_objects(place)
    found = objects.find(name)
    if found is None or name.startswith("."):
        return None
    known = _Known.read(store.root, objects, [found])
    target = known.file.with_suffix("") / name
    if known.artifact is None or not target.is_file():
        with store.here.stage() as aside:
            meter = Meter(progress, "pull", f"fetching {url}")
            receive(objects, [Wanted(name, found.size, aside / name)], meter)
            meter.end()
            target.parent.mkdir(parents=True, exist_ok=True)
            (aside / name).replace(target)
        known.remember("file")
    return target


def sources(root: Path) -> set[str]:
    """The artifacts on this disk that were read from a prefix, where they can be had again."""
    found: set[str] = set()
    for file in (root / _SOURCES).glob("*.json"):
        with suppress(OSError, ValueError, AttributeError):
            found.add(str(json.loads(file.read_bytes()).get("artifact")))
    return found


def _read_artifact(store: Store, objects: Objects, manifest: Manifest, progress: Progress) -> None:
    here = store.here
    entries = {entry.sha256: entry for entry in manifest.files}
    missing: list[FileEntry] = [entry for entry in entries.values() if not here.blobs.has(entry)]
    if not missing and here.is_whole(manifest.id):
        return
    with here.stage(manifest.hex) as folder:
        meter = Meter(progress, "pull", f"fetching {objects.url}")
        wanted = [Wanted(entry.path, entry.size, folder / entry.sha256, entry.sha256) for entry in missing]
        parts = here.chunks(manifest) | receive(objects, wanted, meter)
        meter.end()
        here.adopt(manifest, {entry.sha256: folder / entry.sha256 for entry in missing}, parts)
    _Known.read(store.root, objects, []).remember(manifest.id)
    store.make_room(manifest.id)


def _read_checkpoint(store: Store, prefix: Prefix, progress: Progress) -> str:
    here, objects = store.here, prefix.objects
    wanted = [found for found in prefix.listed if is_read(found.key, "model")]
    names = [found.key for found in wanted]
    if "config.json" not in names:
        raise _no_checkpoint(prefix)
    if not any(name.endswith(".safetensors") for name in names):
        raise LlmoptError(f"no `*.safetensors` lies at `{prefix.url}`", hint="is the upload complete?")
    check_paths(names)
    known = _Known.read(store.root, objects, wanted)
    if known.artifact is not None and here.is_whole(known.artifact):
        return known.artifact
    with here.stage(known.key) as folder:
        fetched = _Fetched(folder, known.listing)
        meter = Meter(progress, "pull", f"fetching {prefix.url}")
        missing = [found for found in wanted if found.key not in fetched.digests]
        receive(
            objects, [Wanted(found.key, found.size, folder / found.key) for found in missing], meter, done=fetched.add
        )
        if _listing(found for found in _listed(objects) if is_read(found.key, "model")) != known.listing:
            raise LlmoptError(f"`{prefix.url}` was changed while it was read", hint="run the command again")
        meter.end()
        digests = dict(fetched.digests)
        manifest = here.put(folder, kind="model")
    for entry in manifest.files:
        if digests.get(entry.path) != entry.sha256:
            raise CorruptError(f"`{entry.path}` of `{prefix.url}` changed on this disk", hint="check the disk")
    known.remember(manifest.id)
    store.make_room(manifest.id)
    return manifest.id


class _Fetched:
    """What an earlier try has brought of a checkpoint into a folder, by file, unless it has changed since."""

    def __init__(self, folder: Path, listing: Json) -> None:
        self._file, self._lock = folder / BEGUN / "fetched", threading.Lock()
        self.digests: dict[str, str] = {}
        lines: list[Json] = []
        with suppress(OSError, ValueError):  # the last line may be cut off
            for line in self._file.read_text(encoding="utf-8").splitlines():
                lines.append(json.loads(line))
        if lines[:1] == [listing]:
            for entry in lines[1:]:
                if isinstance(entry, list) and (folder / str(entry[0])).is_file():
                    self.digests[str(entry[0])] = str(entry[1])
            return
        for path in folder.iterdir():
            disk.remove(path)
        self._file.parent.mkdir()
        self._note(listing)

    def add(self, file: Path, digest: str) -> None:
        with self._lock:
            self.digests[file.name] = digest
            self._note([file.name, digest])

    def _note(self, line: Json) -> None:
        with self._file.open("ab") as file:
            file.write(canonical_json(line) + b"\n")


class _Known:
    """What was found below a prefix the last time, as the listing told it."""

    def __init__(self, file: Path, listing: Json, artifact: str | None) -> None:
        self.file, self.listing, self.artifact = file, listing, artifact
        self.key = file.stem

    @classmethod
    def read(cls, root: Path, objects: Objects, wanted: Sequence[Found]) -> _Known:
        listing = _listing(wanted)
        place = f"{getattr(getattr(objects, 'access', None), 'endpoint', '')}\n{objects.url}"
        name = [found.key for found in wanted] if len(wanted) == 1 else []  # a file of its own
        file = root / _SOURCES / f"{hashlib.sha256(canonical_json([place, *name])).hexdigest()}.json"
        with suppress(OSError, ValueError):
            found = json.loads(file.read_bytes())
            if isinstance(found, dict) and found.get("listing") == listing:
                return cls(file, listing, str(found.get("artifact")))
        return cls(file, listing, None)

    def remember(self, artifact: str) -> None:
        root = self.file.parents[1]
        with suppress(OSError), disk.temporary(root / "tmp") as aside:
            data = canonical_json({"listing": self.listing, "artifact": artifact})
            disk.publish(data, self.file, aside=aside, root=root)


def _listing(wanted: Iterator[Found] | Sequence[Found]) -> Json:
    return [[found.key, found.size, found.modified_s, found.tag] for found in sorted(wanted, key=lambda each: each.key)]


def _listed(objects: Objects) -> list[Found]:
    return [found for found in objects.list() if "/" not in found.key]


def _manifest(objects: Objects, name: str = MANIFEST_NAME) -> Manifest | None:
    data = objects.read(name, most=MAX_MANIFEST_BYTES)
    if data is None:
        return None
    try:
        return Manifest.from_bytes(data)
    except CorruptError as error:
        raise CorruptError(
            f"`{objects.url}/{name}`: {error.message}",
            hint="write the artifact again; or delete the file to use the rest as it is",
        ) from error


def _not_empty(url: str, key: str) -> SettingsError:
    return SettingsError(f"`{url}` is not empty: it holds `{key}`", hint=_NEW_PREFIX)


def _no_checkpoint(prefix: Prefix) -> LlmoptError:
    if any(found.key == "engine.json" for found in prefix.listed):
        return LlmoptError(
            f"the engine at `{prefix.url}` has no `{MANIFEST_NAME}`, by which its files are checked",
            hint=f"write it there with `--out {prefix.url}`",
        )
    return LlmoptError(
        f"no `config.json` lies at `{prefix.url}`", hint="give the prefix that has config.json directly below it"
    )
