"""Artifacts as OCI image layouts with the media types of CNCF ModelPack: what registries and their tools can hold.

    oci-layout, index.json    what is there, by tag
    blobs/sha256/<hex>        the files of the artifact, its manifest as llmopt.json, and what describes them

Every file is a layer as it is, so its digest there is the one it has here, and the digest of the layer `llmopt.json` is
the artifact's id. Nothing in the OCI manifest is of a time, a place or a run: the same artifact, the same digest. What
is of a run, the attestations, are manifests of their own that refer to it as their subject.

Sources: OCI image-spec 1.1 (image-layout, manifest, descriptor, artifacts guidance); ModelPack model-spec (spec,
config, annotations). An attestation is laid out as BuildKit and ORAS do it: an in-toto Statement as the only layer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from llmopt.artifacts import disk
from llmopt.artifacts.export import check_out, new_folder
from llmopt.artifacts.licenses import of_manifest
from llmopt.artifacts.manifest import MANIFEST_NAME, FileEntry, Manifest, canonical_json
from llmopt.artifacts.outcome import Json
from llmopt.errors import CorruptError, LlmoptError, SettingsError

if TYPE_CHECKING:
    from llmopt.artifacts.store import Store

LAYOUT_FILE, LAYOUT_VERSION = "oci-layout", "1.0.0"
INDEX_FILE = "index.json"
IMAGE_INDEX = "application/vnd.oci.image.index.v1+json"
IMAGE_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
MODEL = "application/vnd.cncf.model.manifest.v1+json"
MODEL_CONFIG = "application/vnd.cncf.model.config.v1+json"
IN_TOTO = "application/vnd.in-toto+json"

TAG = "org.opencontainers.image.ref.name"
FILE_PATH = "org.cncf.model.filepath"
_UNTESTED = "org.cncf.model.file.mediatype.untested"
_TITLE = "org.opencontainers.image.title"  # by which ORAS names a file
_LICENSES = "org.opencontainers.image.licenses"
_PREDICATE_TYPE = "in-toto.io/predicate-type"

#: What registries are asked to take at least (OCI distribution-spec), and most take no more.
MAX_DOCUMENT_BYTES = 4 << 20
_MAX_MODEL_CONFIG_BYTES = 1 << 20  # of a model's config.json, to be read
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9!#$&^_.+-]+/[A-Za-z0-9!#$&^_.+-]+")
_HUB = re.compile(r"hf:([^@]+)@.+")

_DOCUMENTS = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "README")
_SUFFIXES = {
    "weight": ".safetensors .bin .gguf .onnx .data .onnx_data .engine .pt .pth .npz .npy",
    "weight.config": ".json .jinja .model .tiktoken .txt .xml .yaml .yml .toml .ini .cfg .properties .pbtxt .env",
    "doc": ".md .rst .html .svg .png .pdf",
    "code": ".py .sh .c .cpp .h .cu .js",
    "dataset": ".jsonl .parquet .csv .arrow",
}
_KINDS = {suffix: kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
_LARGE_BYTES = 16 << 20  # what is unknown and larger than this is taken for weights
_FORMATS = {
    ".engine": "tensorrt-llm",
    ".onnx": "onnx",
    ".xml": "openvino",
    ".gguf": "gguf",
    ".safetensors": "safetensors",
}
_PRECISIONS = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Descriptor:
    """A blob: what it is, its size and its digest (`sha256:` and 64 digits)."""

    media_type: str
    digest: str
    size: int
    artifact_type: str | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def hex(self) -> str:
        return self.digest.removeprefix("sha256:")

    def to_json(self) -> dict[str, Json]:
        found: dict[str, Json] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.artifact_type is not None:
            found["artifactType"] = self.artifact_type
        if self.annotations:
            found["annotations"] = dict(self.annotations)
        return found

    @classmethod
    def from_json(cls, value: object, where: str) -> Descriptor:
        """CorruptError for what is none; LlmoptError for a digest of another kind."""
        found = value if isinstance(value, dict) else {}
        media_type, digest, size = (found.get(key) for key in ("mediaType", "digest", "size"))
        artifact_type, annotations = found.get("artifactType"), found.get("annotations")
        annotations = {} if annotations is None else annotations
        if (
            not isinstance(media_type, str)
            or not _MEDIA_TYPE.fullmatch(media_type)
            or not isinstance(digest, str)
            or not isinstance(size, int)
            or isinstance(size, bool)
            or size < 0
            or not isinstance(artifact_type, str | None)
            or not isinstance(annotations, dict)
            or not all(isinstance(text, str) for text in annotations.values())
        ):
            raise CorruptError(f"{where} is not a descriptor", hint="copy or download the layout again")
        if digest.startswith(("sha512:", "blake3:")):
            raise LlmoptError(
                f"{where} has the digest `{digest[:14]}...`", hint="llmopt reads layouts with sha256 only"
            )
        if not _DIGEST.fullmatch(digest):
            raise CorruptError(f"{where} has no digest that can be one", hint="copy or download the layout again")
        return cls(
            media_type=media_type, digest=digest, size=size, artifact_type=artifact_type, annotations=annotations
        )


@dataclass(frozen=True, slots=True)
class Written:
    """A layout that has been written: the digest of its manifest, its tag, and how many attestations refer to it."""

    digest: str
    tag: str
    attestations: int


def export(store: Store, artifact: str, dest: Path, *, tag: str, attestations: bool = True) -> Written:
    """Write an artifact as a layout into the new folder `dest`, all of it or nothing.

    The files are copies (shared blocks, where the file system can): a link would let an edit reach into the store.
    """
    check_tag(tag)
    check_out(dest, anew=True)
    manifest = store.get(artifact)
    config, document = _documents(manifest, _model_config(store, manifest))
    model = _of(document, IMAGE_MANIFEST, artifact_type=MODEL)
    if model.size > MAX_DOCUMENT_BYTES:
        raise LlmoptError(
            f"`{artifact}` has too many files for one OCI manifest: {len(manifest.files)}",
            hint="export it without `--oci`",
        )
    small, referrers = [config, document], []
    for statement in store.attestations(manifest.id) if attestations else ():
        blobs = _attestation(statement, model)
        small += blobs
        referrers.append(_of(blobs[-1], IMAGE_MANIFEST, artifact_type=IN_TOTO))
    tagged = replace(model, annotations={TAG: tag})
    index = {
        "schemaVersion": 2,
        "mediaType": IMAGE_INDEX,
        "manifests": [
            described.to_json() for described in (tagged, *sorted(referrers, key=lambda found: found.digest))
        ],
    }
    with new_folder(dest, needs=manifest.size) as aside:
        folder = aside / "blobs" / "sha256"
        folder.mkdir(parents=True)
        _copy(store, manifest, aside, folder)
        for data in small:
            _write(folder / hashlib.sha256(data).hexdigest(), data)
        _write(aside / LAYOUT_FILE, canonical_json({"imageLayoutVersion": LAYOUT_VERSION}))
        _write(aside / INDEX_FILE, canonical_json(index))
        disk.sync_folders([folder / "a blob"], aside)
    return Written(model.digest, tag, len(referrers))


def check_tag(tag: str) -> None:
    if not _TAG.fullmatch(tag):
        raise SettingsError(
            f"`{tag}` cannot be a tag", hint="letters, digits, `.`, `_` and `-`, at most 128, no `.` or `-` first"
        )


def _copy(store: Store, manifest: Manifest, aside: Path, blobs: Path) -> None:
    """The files and llmopt.json, verified, each under its digest; files of the same bytes are one blob."""
    copied = aside / "artifact"
    try:
        store.export(manifest.id, copied)
    except LlmoptError as error:  # told of the folder that the user named, not of this one
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise
    for entry in manifest.files:
        (copied / entry.path).rename(blobs / entry.sha256)
    (copied / MANIFEST_NAME).rename(blobs / manifest.hex)
    disk.remove(copied)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    disk.sync_file(path)


def _documents(manifest: Manifest, model_config: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """The bytes of ModelPack's config and of the OCI manifest."""
    own = FileEntry(MANIFEST_NAME, len(manifest.to_bytes()), manifest.hex)
    layers = [_layer(entry) for entry in (*manifest.files, own)]
    licenses = [stated.license for stated in of_manifest(manifest)]
    config = canonical_json(
        {
            "descriptor": _about(manifest, model_config) | ({"licenses": licenses} if licenses else {}),
            "config": _technical(manifest, model_config),
            "modelfs": {"type": "layers", "diffIds": [layer.digest for layer in layers]},
        }
    )
    document: dict[str, Json] = {
        "schemaVersion": 2,
        "mediaType": IMAGE_MANIFEST,
        "artifactType": MODEL,
        "config": _of(config, MODEL_CONFIG).to_json(),
        "layers": [layer.to_json() for layer in layers],
    }
    if licenses:
        document["annotations"] = {_LICENSES: " AND ".join(licenses)}
    return config, canonical_json(document)


def _layer(entry: FileEntry) -> Descriptor:
    path = PurePosixPath(entry.path)
    kind = "doc" if path.name.startswith(_DOCUMENTS) else _KINDS.get(path.suffix.lower())
    annotations = {FILE_PATH: entry.path, _TITLE: entry.path}
    if kind is None:
        kind = "weight" if entry.size > _LARGE_BYTES else "weight.config"
        annotations[_UNTESTED] = "true"
    return Descriptor(
        media_type=f"application/vnd.cncf.model.{kind}.v1.raw",
        digest=f"sha256:{entry.sha256}",
        size=entry.size,
        annotations=annotations,
    )


def _attestation(statement: Mapping[str, Json], subject: Descriptor) -> list[bytes]:
    """The blobs of one: the statement, the empty config, and last the manifest that refers to the subject."""
    data, empty = canonical_json(statement), b"{}"
    predicate = statement.get("predicateType")
    layer = _of(data, IN_TOTO, annotations={_PREDICATE_TYPE: predicate} if isinstance(predicate, str) else {})
    document = {
        "schemaVersion": 2,
        "mediaType": IMAGE_MANIFEST,
        "artifactType": IN_TOTO,
        "config": _of(empty, EMPTY).to_json(),
        "layers": [layer.to_json()],
        "subject": Descriptor(media_type=subject.media_type, digest=subject.digest, size=subject.size).to_json(),
    }
    return [data, empty, canonical_json(document)]


def _about(manifest: Manifest, model_config: Mapping[str, Any]) -> dict[str, Json]:
    action = manifest.action
    made = "" if action is None else f", made by llmopt {action.op}"
    found: dict[str, Json] = {"description": f"{manifest.kind}, {manifest.status}{made}"}
    source = _HUB.fullmatch("" if action is None else action.inputs.get("model_source", ""))
    if source:
        found["name"] = source[1]
    if isinstance(family := model_config.get("model_type"), str):
        found["family"] = family
    return found


def _technical(manifest: Manifest, model_config: Mapping[str, Any]) -> dict[str, Json]:
    found: dict[str, Json] = {}
    suffixes = {PurePosixPath(entry.path).suffix for entry in manifest.files}
    if known := [name for suffix, name in _FORMATS.items() if suffix in suffixes]:
        found["format"] = known[0]
    architectures = model_config.get("architectures")
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        found["architecture"] = architectures[0]
    precision = model_config.get("dtype", model_config.get("torch_dtype"))
    if isinstance(precision, str) and precision in _PRECISIONS:
        found["precision"] = precision
    quantization = model_config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if manifest.action is not None and manifest.action.op.startswith("quantize."):
        method = manifest.action.op.removeprefix("quantize.")  # the file tells the format of the integers only
    if isinstance(method, str):
        found["quantization"] = method
    return found


def _model_config(store: Store, manifest: Manifest) -> Mapping[str, Any]:
    """config.json as far as it is small and JSON."""
    sizes = {entry.path: entry.size for entry in manifest.files}
    if sizes.get("config.json", _MAX_MODEL_CONFIG_BYTES) >= _MAX_MODEL_CONFIG_BYTES:
        return {}
    try:
        found = json.loads(store.read(manifest, "config.json") or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _of(
    data: bytes, media_type: str, *, artifact_type: str | None = None, annotations: Mapping[str, str] | None = None
) -> Descriptor:
    return Descriptor(
        media_type=media_type,
        digest=f"sha256:{hashlib.sha256(data).hexdigest()}",
        size=len(data),
        artifact_type=artifact_type,
        annotations=annotations or {},
    )
