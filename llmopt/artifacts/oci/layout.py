"""Reads an OCI image layout: which manifests it lists, and blobs that are what their digests say. Nothing is trusted.

Source: OCI image-spec 1.1, image-layout and manifest. Media types as in oci.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmopt.artifacts.manifest import MAX_MANIFEST_BYTES
from llmopt.artifacts.oci import (
    IMAGE_INDEX,
    IMAGE_MANIFEST,
    IN_TOTO,
    INDEX_FILE,
    LAYOUT_FILE,
    LAYOUT_VERSION,
    MAX_DOCUMENT_BYTES,
    MODEL,
    MODEL_CONFIG,
    TAG,
    Descriptor,
)
from llmopt.errors import CorruptError, LlmoptError, SettingsError, nearest

AGAIN = "copy or download the layout again"


@dataclass(frozen=True, slots=True)
class Image:
    """A manifest that the layout lists, as far as it matters here."""

    descriptor: Descriptor
    artifact_type: str | None
    config: Descriptor
    layers: tuple[Descriptor, ...]
    subject: str | None  # the digest of the manifest that this one is about


class Layout:
    """A folder for which `is_layout` holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def is_layout(folder: Path) -> bool:
        return (folder / LAYOUT_FILE).is_file()

    def model(self, *, tag: str | None = None, digest: str | None = None) -> Image:
        """The one model that is there, or the one of a tag or of a digest (which the index need not tag).

        SettingsError when that is none or several; CorruptError for what cannot be read.
        """
        listed = self._listed()
        if digest is not None:
            chosen = [found for found in listed if found.digest == digest]
        elif tag is not None:
            chosen = [found for found in listed if found.annotations.get(TAG) == tag]
        else:
            chosen = [found for found in listed if found.artifact_type != IN_TOTO]
        images = {found.digest: self.image(found) for found in chosen}
        if tag is None and digest is None:  # signatures and the like are about another manifest
            images = {key: image for key, image in images.items() if image.subject is None}
        if not images:
            raise self._nothing(listed, tag, digest)
        if len(images) > 1:
            raise SettingsError(f"`{self.folder}` holds {len(images)} manifests", hint=f"choose {_choices(listed)}")
        (image,) = images.values()
        if (
            MODEL not in (image.artifact_type, image.descriptor.artifact_type)
            and image.config.media_type != MODEL_CONFIG
        ):
            raise LlmoptError(
                f"`{image.descriptor.digest}` in `{self.folder}` is not a model: its config is a "
                f"`{image.config.media_type}`",
                hint=f"llmopt imports ModelPack's models, whose config is a `{MODEL_CONFIG}`",
            )
        return image

    def attestations(self, image: Image) -> Iterator[bytes]:
        """The in-toto Statements about an image that are there, checked as blobs only."""
        for described in self._listed():
            told = described.artifact_type == IN_TOTO
            if not told and (described.artifact_type or TAG in described.annotations):
                continue
            if described.media_type != IMAGE_MANIFEST or described.digest == image.descriptor.digest:
                continue
            about = self.image(described)
            if about.subject == image.descriptor.digest:
                for layer in about.layers:
                    if layer.media_type == IN_TOTO:
                        yield self.small(layer, most_bytes=MAX_MANIFEST_BYTES)

    def image(self, described: Descriptor) -> Image:
        """The manifest of a descriptor; CorruptError for none, LlmoptError for an index within the index."""
        if described.media_type == IMAGE_INDEX:
            raise LlmoptError(
                f"`{described.digest}` is an index of its own, of several platforms", hint="choose with `--digest`"
            )
        if described.media_type != IMAGE_MANIFEST:
            raise LlmoptError(
                f"`{described.digest}` is a `{described.media_type}`", hint=f"llmopt reads `{IMAGE_MANIFEST}`"
            )
        where = f"`{described.digest}`"
        found = _object(self.small(described), where)
        layers, subject, artifact_type = found.get("layers"), found.get("subject"), found.get("artifactType")
        if found.get("schemaVersion") != 2 or not isinstance(layers, list):
            raise CorruptError(f"{where} is not an OCI manifest", hint=AGAIN)
        return Image(
            described,
            artifact_type if isinstance(artifact_type, str) else None,
            Descriptor.from_json(found.get("config"), f"the config of {where}"),
            tuple(Descriptor.from_json(layer, f"layer {n} of {where}") for n, layer in enumerate(layers, 1)),
            None if subject is None else Descriptor.from_json(subject, f"the subject of {where}").digest,
        )

    def small(self, described: Descriptor, *, most_bytes: int = MAX_DOCUMENT_BYTES) -> bytes:
        """A blob that is a document; CorruptError when it is too large for one, or not what its digest says."""
        if described.size > most_bytes:
            raise CorruptError(
                f"`{described.digest}` has {described.size} bytes, too many for a `{described.media_type}`", hint=AGAIN
            )
        with self.blob(described) as blob:
            return blob.read()

    @contextmanager
    def blob(self, described: Descriptor) -> Iterator[Blob]:
        """To be read once. When the `with` ends without an error, all of it was what the descriptor says."""
        with reading(self.path(described)) as path:
            file = path.open("rb", buffering=0)
        with file:
            blob = Blob(file, described)
            yield blob
            blob.finish()

    def path(self, described: Descriptor) -> Path:
        """Where a blob lies, once it is known to be a file of the right size. Its bytes are not looked at."""
        with reading(self.folder / "blobs" / "sha256" / described.hex) as path:
            found = path.stat()  # of what a link leads to: only the bytes count
        if not stat.S_ISREG(found.st_mode):
            raise CorruptError(f"the blob `{described.digest}` is not a regular file", hint=AGAIN)
        if found.st_size != described.size:
            raise CorruptError(
                f"the blob `{described.digest}` has {found.st_size} bytes, not {described.size}", hint=AGAIN
            )
        return path

    def _listed(self) -> list[Descriptor]:
        version = _object(self._document(LAYOUT_FILE), f"`{LAYOUT_FILE}`").get("imageLayoutVersion")
        if version != LAYOUT_VERSION:
            raise LlmoptError(
                f"`{self.folder}` is an OCI layout of version `{version!a}`", hint=f"llmopt reads {LAYOUT_VERSION}"
            )
        manifests = _object(self._document(INDEX_FILE), f"`{INDEX_FILE}`").get("manifests")
        if not isinstance(manifests, list):
            raise CorruptError(f"`{self.folder / INDEX_FILE}` lists no manifests", hint=AGAIN)
        return [Descriptor.from_json(value, f"entry {n} of `{INDEX_FILE}`") for n, value in enumerate(manifests, 1)]

    def _document(self, name: str) -> bytes:
        with reading(self.folder / name) as path, path.open("rb") as file:
            data = file.read(MAX_DOCUMENT_BYTES + 1)
        if len(data) > MAX_DOCUMENT_BYTES:
            raise CorruptError(f"`{self.folder / name}` has more than {MAX_DOCUMENT_BYTES} bytes", hint=AGAIN)
        return data

    def _nothing(self, listed: list[Descriptor], tag: str | None, digest: str | None) -> LlmoptError:
        if digest is not None:
            return SettingsError(f"no manifest `{digest}` in `{self.folder}`", hint=f"there are {_choices(listed)}")
        if tag is not None:
            tags = [_tag(found) for found in listed if TAG in found.annotations]
            hint = nearest(tag, tags) if tags else f"there are {_choices(listed)}"
            return SettingsError(f"no tag `{tag}` in `{self.folder}`", hint=hint)
        return CorruptError(f"no model in the OCI layout `{self.folder}`", hint=AGAIN)


class Blob(io.RawIOBase):
    """A file read once from its beginning and hashed on the way; never more of it than its descriptor allows."""

    def __init__(self, file: io.FileIO, described: Descriptor) -> None:
        self._file, self._described = file, described
        self._left, self._hash = described.size, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        with reading(Path(str(self._file.name))):
            count = self._file.readinto(view[: min(len(view), self._left)]) or 0
        self._hash.update(view[:count])
        self._left -= count
        return count

    def finish(self) -> None:
        """Read what is left; CorruptError when the whole is not what the descriptor says."""
        rest = bytearray(1 << 20)
        while self.readinto(rest):
            pass
        if self._left or self._hash.hexdigest() != self._described.hex:
            raise CorruptError(f"the blob `{self._described.digest}` does not have the bytes of its digest", hint=AGAIN)


@contextmanager
def reading(path: Path) -> Iterator[Path]:
    """A file of the layout: that it is missing is a CorruptError, that it cannot be read an LlmoptError."""
    try:
        yield path
    except (FileNotFoundError, NotADirectoryError):
        raise CorruptError(f"`{path}` is missing", hint=AGAIN) from None
    except OSError as error:
        raise LlmoptError(f"`{path}` cannot be read: {error.strerror or error}") from error


def _object(data: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{where} is not JSON: {error}", hint=AGAIN) from error
    if not isinstance(found, dict):
        raise CorruptError(f"{where} is not a JSON object", hint=AGAIN)
    return found


def _tag(found: Descriptor) -> str:
    """For people: nothing that a terminal would obey."""
    return ascii(found.annotations[TAG])[1:-1]


def _choices(listed: list[Descriptor]) -> str:
    """How each can be named on the command line."""
    named = [f"`:{_tag(found)}`" for found in listed if TAG in found.annotations]
    others = [f"`--digest {found.digest}`" for found in listed if TAG not in found.annotations]
    return ", ".join([*dict.fromkeys(named + others)][:10]) or "none"
