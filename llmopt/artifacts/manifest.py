"""What an artifact is: its files by digest and the action that made it, in canonical JSON whose sha256 is its name."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, TypeVar

from llmopt.artifacts.outcome import Json
from llmopt.errors import CorruptError, LlmoptError

SCHEMA = "llmopt.artifact/1"
#: The manifest's own name in a folder that holds an artifact; no file of an artifact may have it.
MANIFEST_NAME = "llmopt.json"
#: Far above any real manifest (some 150 bytes a file), far below what would hurt to parse.
MAX_MANIFEST_BYTES = 16 << 20

_MAX_NAME_BYTES = 255  # of one part of a path: the limit of ext4, XFS, APFS and NTFS
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WORD = re.compile(r"[a-z][a-z0-9._-]*")
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\]|^[A-Za-z]:|^/")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: where it lies in the artifact (parts joined by `/`), its bytes and their digest in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Action:
    """All that decides a result: the same key, the same artifact.

    `inputs` names artifacts by id, and says of each from where it was fetched, if it was, and its licence, if one is
    stated: `model_source` and `model_license` beside `model`. `code` is the digest of our sources that do the work;
    `deps` holds the versions of the libraries that change bits; `target` is the machine it is made for. No times,
    hosts, folders or users.
    """

    op: str
    op_version: int
    inputs: Mapping[str, str]
    settings: Mapping[str, Json]
    code: str
    deps: Mapping[str, str]
    target: Mapping[str, str]

    @cached_property
    def key(self) -> str:
        """The sha256, in hex, of the canonical JSON of every field."""
        return hashlib.sha256(canonical_json(self._fields())).hexdigest()

    def to_json(self) -> dict[str, Json]:
        return self._fields() | {"key": self.key}

    @classmethod
    def from_json(cls, value: Json) -> Action:
        """Strict; raises CorruptError, also when the key is not that of the fields."""
        found = _typed(value, dict, "action")
        texts = {name: _texts(found.get(name), f"action.{name}") for name in ("inputs", "deps", "target")}
        action = cls(
            op=_word(found.get("op"), "action.op"),
            op_version=_typed(found.get("op_version"), int, "action.op_version"),
            settings=_typed(found.get("settings"), dict, "action.settings"),
            code=_typed(found.get("code"), str, "action.code"),
            **texts,
        )
        if found.keys() != {"key", *(f.name for f in fields(cls))} or found["key"] != action.key:
            raise CorruptError("an action's key is not that of its fields")
        return action

    def _fields(self) -> dict[str, Json]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """An artifact without its bytes. Files come sorted by path, whatever order they were given in.

    Raises LlmoptError when a path could leave the artifact's folder, or two could be one file on some file system.
    """

    kind: str
    files: tuple[FileEntry, ...]
    action: Action | None = None
    status: str = "complete"
    events: tuple[str, ...] = ()
    metrics: Mapping[str, Json] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", tuple(sorted(self.files, key=lambda entry: entry.path)))
        check_paths([entry.path for entry in self.files])

    @cached_property
    def hex(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def id(self) -> str:
        return f"sha256:{self.hex}"

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files)

    def to_bytes(self) -> bytes:
        return self._bytes

    @cached_property
    def _bytes(self) -> bytes:
        files: list[Json] = [{"path": f.path, "size": f.size, "sha256": f.sha256} for f in self.files]
        found: dict[str, Json] = {
            "schema": SCHEMA,
            "kind": self.kind,
            "files": files,
            "action": None if self.action is None else self.action.to_json(),
            "status": self.status,
            "events": list(self.events),
            "metrics": dict(self.metrics),
        }
        return canonical_json(found)

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Only what `to_bytes` can have written is taken: an unknown or repeated key, or a space, is a CorruptError.

        A manifest of a later schema is an LlmoptError.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise CorruptError("not a manifest: larger than any that llmopt writes")
        try:
            found = _typed(json.loads(data), dict, "the manifest")
        except (ValueError, RecursionError) as error:
            raise CorruptError(f"not a manifest: {error}") from error
        _check_schema(found.get("schema"))
        try:
            manifest = cls._from_json(found)
            canonical = manifest.to_bytes() == data
        except LlmoptError as error:
            raise CorruptError(f"not a manifest: {error.message}") from error
        if not canonical:
            raise CorruptError("not a manifest: not in its canonical form")
        return manifest

    @classmethod
    def _from_json(cls, found: dict[str, Any]) -> Manifest:
        action = found.get("action")
        return cls(
            kind=_word(found.get("kind"), "kind"),
            files=tuple(_file(value) for value in _typed(found.get("files"), list, "files")),
            action=None if action is None else Action.from_json(action),
            status=_word(found.get("status"), "status"),
            events=tuple(_typed(event, str, "events") for event in _typed(found.get("events"), list, "events")),
            metrics=_typed(found.get("metrics"), dict, "metrics"),
        )


def canonical_json(value: object) -> bytes:
    """The one JSON text of a value: keys sorted by code point, no spaces, UTF-8, 1 and 1.0 apart.

    Raises LlmoptError for what JSON cannot hold: NaN, infinity, a key that is not text, text that is not Unicode.
    """
    _check_json(value, "")
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise LlmoptError(f"`{error.object!a}` is not valid Unicode text") from error


def _check_json(value: object, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise LlmoptError(f"`{where or 'a value'}` is {value}, which cannot be recorded")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise LlmoptError(f"`{where or 'a value'}` has the key `{key!r}`, which is not text")
            _check_json(item, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for item in value:
            _check_json(item, where)


def check_paths(paths: Iterable[str]) -> None:
    """Raise LlmoptError for the first path that is not plain and relative, and for two that some disk takes for one."""
    seen: dict[str, str] = {}
    for path in paths:
        if not _is_plain(path):
            raise LlmoptError(f"`{ascii(path)[1:-1]}` is not a plain relative path", hint="rename the file")
        folded = _fold(path)
        if folded == MANIFEST_NAME:
            raise LlmoptError(f"`{path}` is the name of the manifest itself", hint="rename the file")
        if folded in seen:
            raise LlmoptError(
                f"`{seen[folded]}` and `{path}` are the same file where case does not count", hint="rename one of them"
            )
        seen[folded] = path
    for path in seen.values():
        for parent in parents(path):
            if _fold(parent) in seen:
                raise LlmoptError(f"`{parent}` is a file and a folder at once", hint="rename one of them")


def parents(path: str) -> list[str]:
    """The folders above a file, within its artifact: `a/b/c` has `a` and `a/b`."""
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]


def _is_plain(path: str) -> bool:
    try:
        parts = path.encode().split(b"/")
    except UnicodeEncodeError:
        return False
    odd = any(part in (b"", b".", b"..") or len(part) > _MAX_NAME_BYTES for part in parts)
    return not odd and _UNSAFE.search(path) is None


def _fold(path: str) -> str:
    """What a file system that ignores case and Unicode's forms of composition would compare."""
    if path.isascii():
        return path.lower()
    from unicodedata import normalize

    return normalize("NFC", normalize("NFC", path).casefold())


def _check_schema(schema: object) -> None:
    if schema == SCHEMA:
        return
    if isinstance(schema, str) and schema.startswith(SCHEMA.partition("/")[0] + "/"):
        raise LlmoptError(f"a manifest has the schema `{schema}`; this llmopt knows `{SCHEMA}`", hint="upgrade llmopt")
    raise CorruptError(f"not a manifest: its schema is not `{SCHEMA}`")


def _file(value: object) -> FileEntry:
    found = _typed(value, dict, "files")
    size, sha256 = _typed(found.get("size"), int, "files.size"), _typed(found.get("sha256"), str, "files.sha256")
    if size < 0 or not _SHA256.fullmatch(sha256):
        raise CorruptError("a file's size or digest is out of shape")
    return FileEntry(_typed(found.get("path"), str, "files.path"), size, sha256)


def _typed(value: object, kind: type[T], where: str) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise CorruptError(f"`{where}` is no {kind.__name__}")
    return value


def _texts(value: object, where: str) -> dict[str, str]:
    return {key: _typed(text, str, where) for key, text in _typed(value, dict, where).items()}


def _word(value: object, where: str) -> str:
    word = _typed(value, str, where)
    if not _WORD.fullmatch(word):
        raise CorruptError(f"`{where}` is not a plain word")
    return word
