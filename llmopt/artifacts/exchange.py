"""Takes into the store what was made elsewhere: an OCI layout, a folder that was exported, a plain checkpoint.

What holds our manifest becomes that very artifact or nothing. Of anything else the files that stages read become a
model without an action, whose id is the one that `describe` gives for the folder. Files are copied aside and verified
there; the store gets them last and at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.artifacts import disk
from llmopt.artifacts.digest import describe, is_read, read_manifest, seal
from llmopt.artifacts.manifest import MANIFEST_NAME, FileEntry, Manifest, canonical_json
from llmopt.artifacts.objects import is_s3
from llmopt.artifacts.oci import layers as oci_layers
from llmopt.artifacts.oci.layers import Part
from llmopt.artifacts.oci.layout import AGAIN, Image, Layout
from llmopt.artifacts.outcome import Json, Progress, silent
from llmopt.errors import CorruptError, LlmoptError, SettingsError

if TYPE_CHECKING:
    from llmopt.artifacts.store import Store

#: What others keep weights in: pickles, which can hold code, and formats that no stage reads.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".ggml", ".h5", ".msgpack", ".npz", ".onnx")


@dataclass(frozen=True, slots=True)
class Taken:
    """What is in the store now; the source's files that are not, since no stage reads them; attestations kept."""

    manifest: Manifest
    left_out: tuple[str, ...] = ()
    attestations: int = 0


def take(store: Store, source: str, *, digest: str | None = None, progress: Progress = silent) -> Taken:
    """Import `FOLDER`, `s3://bucket/prefix`, or of a layout `FOLDER:TAG`, or the manifest with a digest.

    CorruptError when bytes are missing or are not those of their digest; then nothing has been stored.
    """
    taken = _take(store, source, digest, progress)
    store.send(taken.manifest.id)
    return taken


def _take(store: Store, source: str, digest: str | None, progress: Progress) -> Taken:
    if is_s3(source):
        return _take_prefix(store, source, digest, progress)
    folder, tag = split(source)
    if tag is not None and digest is not None:
        raise SettingsError(f"the tag `{tag}` and `--digest` are both given", hint="give one of them")
    if Layout.is_layout(folder):
        layout = Layout(folder)
        return _take_image(store, layout, layout.model(tag=tag, digest=digest))
    if tag is not None or digest is not None:
        raise SettingsError(f"`{folder}` is no OCI layout", hint="a tag or a digest chooses among the manifests of one")
    return _take_folder(store, folder)


def split(source: str) -> tuple[Path, str | None]:
    """The folder that is there, and the tag behind it if one is given."""
    if Path(source).is_dir():
        return Path(source), None
    for place in [at for at, character in enumerate(source) if character == ":"]:
        if Path(source[:place]).is_dir() and source[:place]:
            return Path(source[:place]), source[place + 1 :]
    raise LlmoptError(f"no folder at `{source}`", hint="an OCI layout, an exported artifact or a checkpoint")


def _take_image(store: Store, layout: Layout, image: Image) -> Taken:
    layout.small(image.config)
    with store.stage() as aside, store.stage() as folder:
        parts = oci_layers.take(layout, image.layers, aside)
        manifest, taken = _described(parts)
        statements = [found for data in layout.attestations(image) if (found := _statement(data, manifest))]
        for part in taken:
            target = folder / part.entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            part.file.rename(target)
        stored = _put(store, folder, manifest)
    for statement in statements:
        store.attach(stored.id, statement)
    used = {part.entry.path for part in taken} | {MANIFEST_NAME}
    left_out = [part.entry.path for part in parts if part.entry.path not in used]
    return Taken(stored, tuple(sorted(left_out)), len(statements))


def _described(parts: list[Part]) -> tuple[Manifest, list[Part]]:
    """The manifest of the files that came out of an image, and those of them that it lists."""
    own = [part for part in parts if part.entry.path == MANIFEST_NAME]
    if len(own) != 1:
        oci_layers.check(parts)  # more than one is refused here too
        taken = [part for part in parts if is_read(part.entry.path, "model")]
        if not taken:
            raise LlmoptError("nothing that llmopt reads is in the layers", hint="config.json must be at the top")
        _check_weights([part.entry.path for part in taken], [part.entry.path for part in parts])
        return Manifest(kind="model", files=tuple(part.entry for part in taken)), taken
    taken = [part for part in parts if part is not own[0]]
    oci_layers.check(taken)
    manifest = read_manifest(own[0].file, hint=AGAIN)
    found, wanted = {part.entry for part in taken}, set(manifest.files)
    for entry in sorted(found ^ wanted, key=lambda entry: entry.path):
        what = "is not the one that is listed in" if entry in found else "is listed, and missing or another, in"
        raise CorruptError(f"the layers do not agree: `{entry.path}` {what} `{MANIFEST_NAME}`", hint=AGAIN)
    return manifest, taken


def _take_folder(store: Store, source: Path) -> Taken:
    files: dict[str, Path] = {}
    parts: dict[str, tuple[str, ...]] = {}
    with store.stage() as folder:

        def copied(path: Path, name: str) -> FileEntry:
            """Of the copy, so that what is stored is what was read, whatever becomes of the source meanwhile."""
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            disk.copy_file(path, target, sync=False)
            entry, chunks = seal(target, name)
            files[entry.sha256] = target
            if chunks:
                parts[entry.sha256] = chunks
            return entry

        manifest = describe(source, "model", entry=copied)  # one that was exported is compared with its manifest
        names = [file.name for file in source.iterdir() if not file.name.startswith(".")]
        listed = {entry.path for entry in manifest.files}
        if manifest.action is None and manifest.kind == "model":
            _check_weights(listed, names)
        store.adopt(manifest, files, parts)
    tops = {path.partition("/")[0] for path in listed} | {MANIFEST_NAME}
    return Taken(manifest, tuple(sorted(set(names) - tops)))


def _take_prefix(store: Store, url: str, digest: str | None, progress: Progress) -> Taken:
    from llmopt.artifacts.remote import plain

    if digest is not None:
        raise SettingsError(f"`{url}` is no OCI layout", hint="a digest chooses among the manifests of one")
    prefix = plain.Prefix.open(url)
    if prefix.manifest is None:
        names = [found.key for found in prefix.listed]
        _check_weights([name for name in names if is_read(name, "model")], names)
    manifest = store.here.get(plain.read(store, prefix, progress))
    listed = {entry.path for entry in manifest.files} | {MANIFEST_NAME}
    return Taken(manifest, tuple(sorted(found.key for found in prefix.listed if found.key not in listed)))


def _check_weights(taken: Iterable[str], paths: Iterable[str]) -> None:
    """Refuse a checkpoint whose weights are all in files that are not taken: without them it is none."""
    others = sorted(path for path in paths if path.endswith(_OTHER_WEIGHTS))
    if others and not any(path.endswith(".safetensors") for path in taken):
        raise LlmoptError(
            f"there are no weights in safetensors, and `{others[0]}` is not read",
            hint="save the model as safetensors: a pickle can hold code, and is never taken",
        )


def _put(store: Store, folder: Path, manifest: Manifest) -> Manifest:
    stored = store.put(
        folder,
        kind=manifest.kind,
        action=manifest.action,
        status=manifest.status,
        events=manifest.events,
        metrics=manifest.metrics,
    )
    if stored != manifest:
        raise CorruptError(f"`{manifest.id}` came out as `{stored.id}`", hint="check the disk of the store")
    return stored


def _statement(data: bytes, manifest: Manifest) -> dict[str, Json] | None:
    """An in-toto Statement about this artifact in the form that `attest` gives it; None for any other."""
    try:
        found = json.loads(data)
        canonical_json(found)  # what cannot be written is not kept
        subjects = [subject["digest"]["sha256"] for subject in found["subject"]]
        run = found["predicate"]["runDetails"]["metadata"]
        shaped = found["_type"] == "https://in-toto.io/Statement/v1" and isinstance(run, dict)
        about = found["predicateType"] == "https://slsa.dev/provenance/v1" and manifest.hex in subjects
    except (ValueError, RecursionError, KeyError, TypeError, LlmoptError):
        return None
    return found if shaped and about else None
