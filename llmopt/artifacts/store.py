"""The artifacts on disk: content-addressed, verified when read, written so that a crash leaves nothing half-made.

    blobs/sha256/ab/<hex>        the files, read-only
    manifests/sha256/<hex>.json  the artifacts
    actions/<key>/<hex>.json     a file for each distinct result of an action
    names/<name>                 the id of an artifact
    attestations/<hex>/          who made it and when, one file a run
    trees/<hex>/                 an artifact's files under their names: links to blobs, made when asked for
    begun/<key>/                 what an action that ended early has finished, to go on from
    tmp/                         what is being written

Blobs go first, then the manifest, then the action or the name, so whatever can be found is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from llmopt.artifacts import disk
from llmopt.artifacts.digest import faults, same_bytes, seal, sha256_file
from llmopt.artifacts.export import copy_out
from llmopt.artifacts.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Action,
    FileEntry,
    Manifest,
    canonical_json,
)
from llmopt.artifacts.outcome import Json
from llmopt.errors import CorruptError, LlmoptError, SettingsError

_ACTION_SCHEMA = "llmopt.action/1"
_HEX = re.compile(r"[0-9a-f]{64}")
_ID = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_PREFIX = re.compile(r"[0-9a-fA-F]{8,64}")
_REPAIR = "run the command that made it again: it replaces what is damaged"
_OPTION = "--store"
BEGUN = ".begun"
_NO_FAULTS: tuple[list[str], list[FileEntry]] = ([], [])


class Store:
    """Any number of processes may use one at the same time. Reading from one that is not there finds nothing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._verified: dict[str, tuple[int, int, int]] = {}  # blobs read through in this process, and as what

    @classmethod
    def open(cls, url: str | None = None) -> Store:
        """The store in a folder (a path or `file://`), else in $LLMOPT_STORE, else in the user's data folder."""
        return cls(_root(url or os.environ.get("LLMOPT_STORE") or None))

    # -- writing

    @contextmanager
    def stage(self, key: str | None = None) -> Iterator[Path]:
        """An empty folder on the store's disk to work in, gone afterwards. A full disk becomes an LlmoptError.

        With the `key` of an action, the folder is that action's own: it stays when the work ends early, whatever ended
        it, and is handed out again with what lies in it. While another process works in it, this one gets another.
        What lies in its sub-folder `BEGUN` is the work's own record and no part of the result.
        """
        with ExitStack() as stack:
            with self._writing():
                folder = None
                if key is not None:
                    folder = stack.enter_context(disk.lasting(self._begun(key)))
                folder = folder or stack.enter_context(self._aside())
            try:
                yield folder
            except Exception as error:
                if isinstance(error, LlmoptError) or not disk.is_full(error):
                    raise
                raise disk.full("the store", self.root, option=_OPTION) from error

    def forget(self, key: str) -> None:
        """Remove what an action that ended early has left, unless a process is at work on it."""
        if not self._begun(key).exists():
            return
        with self._writing(), disk.lasting(self._begun(key)):
            pass

    def put(
        self,
        folder: Path,
        *,
        kind: str,
        action: Action | None = None,
        status: str = "complete",
        events: Sequence[str] = (),
        metrics: Mapping[str, Json] | None = None,
        attestation: Callable[[Manifest], Mapping[str, Json]] | None = None,
    ) -> Manifest:
        """Move the files of a staged folder into the store, as the newest result of `action`.

        A blob that is there already is read through, and replaced if it is not what its name says.
        """
        with self._writing(), self._aside() as aside:
            files = _take(folder, aside)
            manifest = Manifest(
                kind=kind,
                files=tuple(seal(file, path) for path, file in files.items()),
                action=action,
                status=status,
                events=tuple(events),
                metrics=dict(metrics or {}),
            )
            data = Manifest.from_bytes(manifest.to_bytes()).to_bytes()  # what cannot be read back is not written
            for entry in manifest.files:
                self._add_blob(files[entry.path], entry)
            disk.sync_folders([self._blob(entry.sha256) for entry in manifest.files], self.root)
            if _read(self._manifest(manifest.hex)) != data:
                disk.publish(data, self._manifest(manifest.hex), aside=aside, root=self.root)
            else:  # whoever wrote it may have been cut off before this
                disk.sync_folders([self._manifest(manifest.hex)], self.root)
            if attestation is not None:
                self._attest(manifest, canonical_json(attestation(manifest)), aside)
            if action is not None:
                result = {"schema": _ACTION_SCHEMA, "artifact": manifest.id, "action": action.to_json()}
                target = self.root / "actions" / action.key / f"{manifest.hex}.json"
                disk.publish(canonical_json(result), target, aside=aside, root=self.root)
            for path in files:  # theirs no more: until here a crash leaves the folder as it was
                (folder / path).unlink()
        return manifest

    def attest(self, artifact: str, statement: Mapping[str, Json]) -> None:
        """Keep a statement that was made elsewhere beside an artifact of this store."""
        manifest = self.get(artifact)
        with self._writing(), self._aside() as aside:
            self._attest(manifest, canonical_json(statement), aside)

    def set_name(self, name: str, artifact: str) -> None:
        """Let `name` stand for an artifact of this store from now on."""
        self.check_name(name)
        manifest = self.get(artifact)
        with self._writing(), self._aside() as aside:
            disk.publish(f"{manifest.id}\n".encode(), self.root / "names" / name, aside=aside, root=self.root)

    @staticmethod
    def check_name(name: str) -> None:
        """Raise SettingsError for what cannot be a name, or could be taken for a digest."""
        if _PREFIX.fullmatch(name):
            raise SettingsError(f"the name `{name}` looks like a digest", hint="add a letter past `f`, or a `-`")
        if not _NAME.fullmatch(name):
            raise SettingsError(
                f"`{name}` cannot be a name", hint="letters, digits, `.`, `_` and `-`, at most 128, no sign first"
            )

    # -- finding

    def find(self, key: str) -> Manifest | None:
        """The newest result of an action with every byte of it verified; CorruptError if one is not right."""
        results = self.results(key)
        if not results:
            return None
        manifest = self._load(results[-1])
        if manifest is None:
            raise CorruptError(f"the manifest of `{results[-1]}` is missing", hint=_REPAIR)
        if manifest.action is None or manifest.action.key != key:
            raise CorruptError(f"the artifact `{manifest.id}` is no result of the action `{key}`", hint=_REPAIR)
        self._verify_blobs(manifest)
        return manifest

    def results(self, key: str) -> list[str]:
        """The ids of an action's distinct results, the newest last. More than one: it is not reproducible."""
        folder = self.root / "actions" / _checked_hex(key)
        return [f"sha256:{digest}" for _, digest in sorted(_dated(folder))]

    def actions(self, op: str) -> Iterator[Action]:
        """Every action of an operation that has a result here; what is not readable as one is passed over."""
        for key in _names(self.root / "actions"):
            for _, digest in _dated(self.root / "actions" / key):
                action = _action(self.root / "actions" / key / f"{digest}.json")
                if action is not None and action.op == op and action.key == key:
                    yield action
                    break

    def get(self, artifact: str) -> Manifest:
        """The manifest of a full id; CorruptError if it is not the one that the id names. Its files are not read."""
        manifest = self._load(artifact)
        if manifest is None:
            raise LlmoptError(f"no artifact `{artifact}` in the store `{self.root}`", hint="see `llmopt store ls`")
        return manifest

    def attestations(self, artifact: str) -> list[dict[str, Json]]:
        """The statements about an artifact, oldest first."""
        folder = self.root / "attestations" / _digest(artifact)
        found = [_json(folder / f"{name}.json") for _, name in sorted(_dated(folder))]
        return [statement for statement in found if statement is not None]

    def read(self, manifest: Manifest, path: str) -> bytes | None:
        """One small file of an artifact, checked, without the others being read; None if it has no such file."""
        entry = next((entry for entry in manifest.files if entry.path == path), None)
        if entry is None:
            return None
        data = _read(self._blob(entry.sha256))
        if data is None or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise CorruptError(f"the artifact `{manifest.id}` is corrupt: `{path}` is not as stored", hint=_REPAIR)
        return data

    def ids(self) -> list[str]:
        """Of all artifacts, damaged ones too, in no order that means anything."""
        return [f"sha256:{digest}" for _, digest in _dated(self._manifest("").parent)]

    def ls(self) -> list[tuple[Manifest, float]]:
        """Every artifact that can be listed and when it was first stored (seconds since 1970), newest first."""
        found = []
        for created_ns, digest in sorted(_dated(self._manifest("").parent), reverse=True):
            try:
                found.append((self.get(f"sha256:{digest}"), created_ns / 1e9))
            except LlmoptError:  # damaged: `ids` and `verify` tell
                continue
        return found

    def names(self) -> dict[str, str]:
        """What every name stands for."""
        found: dict[str, str] = {}
        for name in _names(self.root / "names"):
            with suppress(CorruptError):
                if _NAME.fullmatch(name) and (artifact := self._named(name)):
                    found[name] = artifact
        return found

    def resolve(self, reference: str) -> str | None:
        """The full id for an id, for 8 or more of its digits (with or without `sha256:`), or for a name.

        None when there is nothing of that kind; SettingsError when the digits fit more than one artifact.
        """
        digits = reference.removeprefix("sha256:")
        if not _PREFIX.fullmatch(digits):
            if digits != reference:
                raise SettingsError(
                    f"`{reference}` is not an artifact's id", hint="write `sha256:` and 8 digits or more"
                )
            return self._named(reference) if _NAME.fullmatch(reference) else None
        found = sorted(artifact for artifact in self.ids() if artifact.startswith(f"sha256:{digits.lower()}"))
        if len(found) > 1:
            listed = ", ".join(f"`{artifact}`" for artifact in found[:5])
            raise SettingsError(f"`{reference}` fits {len(found)} artifacts", hint=f"write more digits: {listed}")
        return found[0] if found else None

    # -- files

    def path(self, artifact: str) -> Path:
        """A folder with the artifact's verified files and its manifest; they are links to blobs: not to be written to.

        Whatever in it is not the artifact's is put right first. A file read through in this process is not read again.
        """
        manifest = self.get(artifact)
        self._verify_blobs(manifest)
        tree = self._tree(manifest)
        if self._tree_faults(manifest) != _NO_FAULTS:
            with self._writing(needs=manifest.size), self._aside() as aside:
                self._repair_tree(manifest, aside)
            if self._tree_faults(manifest) != _NO_FAULTS:
                raise CorruptError(f"`{tree}` is being changed by someone else", hint="nothing may write to the store")
        return tree

    def verify(self, artifact: str) -> list[str]:
        """Read all of an artifact again and say what is wrong with it; nothing when all is well."""
        try:
            manifest = self.get(artifact)
        except LlmoptError as error:
            return [error.message]
        for entry in manifest.files:
            self._verified.pop(entry.sha256, None)
        checked = [(entry.path, self._blob_problem(entry)) for entry in manifest.files]
        problems = [f"`{path}` {problem}" for path, problem in checked if problem]
        tree = self._tree(manifest)
        if os.path.lexists(tree) and not problems:  # a tree is compared with its blobs, so only once these are right
            odd, changed = self._tree_faults(manifest)
            problems += [f"`{tree / path}` does not belong there" for path in odd]
            problems += [f"`{tree / entry.path}` is missing or changed" for entry in changed]
        return problems

    def export(self, artifact: str, dest: Path) -> None:
        """Copy an artifact into a folder outside the store, all of it or nothing; see `export.copy_out`."""
        manifest = self.get(artifact)
        self._verify_blobs(manifest)
        corrupt = CorruptError(f"the copy of `{artifact}` in `{dest}` came out wrong", hint="check the disk")
        copy_out(manifest, dest, self._blob, corrupt)

    # -- within

    def _aside(self) -> AbstractContextManager[Path]:
        return disk.temporary(self.root / "tmp")

    def _writing(self, needs: int = 0) -> AbstractContextManager[None]:
        return disk.writing("the store", self.root, option=_OPTION, needs=needs)

    def _begun(self, key: str) -> Path:
        return self.root / "begun" / _checked_hex(key)

    def _blob(self, sha256: str) -> Path:
        return self.root / "blobs" / "sha256" / sha256[:2] / sha256

    def _manifest(self, digest: str) -> Path:
        return self.root / "manifests" / "sha256" / f"{digest}.json"

    def _tree(self, manifest: Manifest) -> Path:
        return self.root / "trees" / manifest.hex

    def _load(self, artifact: str) -> Manifest | None:
        digest = _digest(artifact)
        data = _read(self._manifest(digest))
        if data is None:
            return None
        if hashlib.sha256(data).hexdigest() != digest:
            raise CorruptError(f"the manifest of `{artifact}` is not the one that was stored", hint=_REPAIR)
        try:
            return Manifest.from_bytes(data)
        except CorruptError as error:
            raise CorruptError(f"the manifest of `{artifact}` cannot be used: {error.message}", hint=_REPAIR) from error

    def _named(self, name: str) -> str | None:
        data = _read(self.root / "names" / name)
        if data is None:
            return None
        artifact = data.decode(errors="replace").strip()
        if not _ID.fullmatch(artifact):
            raise CorruptError(f"the name `{name}` stands for no artifact", hint="name the artifact again")
        return artifact

    def _add_blob(self, file: Path, entry: FileEntry) -> None:
        """Move a private, sealed file in, unless its bytes are there already."""
        blob = self._blob(entry.sha256)
        self._verified.pop(entry.sha256, None)
        if self._blob_problem(entry) is None:
            file.unlink()
            return
        blob.parent.mkdir(parents=True, exist_ok=True)
        if blob.is_dir():
            disk.remove(blob)
        file.replace(blob)
        self._verified[entry.sha256] = _mark(blob.lstat())

    def _attest(self, manifest: Manifest, data: bytes, aside: Path) -> None:
        name = f"{hashlib.sha256(data).hexdigest()}.json"
        disk.publish(data, self.root / "attestations" / manifest.hex / name, aside=aside, root=self.root)

    def _verify_blobs(self, manifest: Manifest) -> None:
        for entry in manifest.files:
            if problem := self._blob_problem(entry):
                raise CorruptError(f"the artifact `{manifest.id}` is corrupt: `{entry.path}` {problem}", hint=_REPAIR)

    def _blob_problem(self, entry: FileEntry) -> str | None:
        """What is wrong with a stored file, by reading all of it, once in a process as long as it looks the same."""
        blob = self._blob(entry.sha256)
        try:
            found = blob.lstat()
            if not stat.S_ISREG(found.st_mode):
                return "is not a regular file"
            if found.st_size != entry.size:
                return f"has {found.st_size} bytes, not {entry.size}"
            if self._verified.get(entry.sha256) == _mark(found):
                return None
            if sha256_file(blob) != entry.sha256:
                return "has changed bytes"
        except (FileNotFoundError, NotADirectoryError):
            return "is missing"
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        self._verified[entry.sha256] = _mark(found)
        return None

    def _tree_faults(self, manifest: Manifest) -> tuple[list[str], list[FileEntry]]:
        return faults(self._tree(manifest), _tree_files(manifest), self._same_as_stored)

    def _same_as_stored(self, path: Path, entry: FileEntry) -> bool:
        """A link to the stored file is as good as that file, which has been verified; anything else is read."""
        try:
            return path.samefile(self._stored(entry)) or same_bytes(path, entry)
        except OSError:
            return False

    def _stored(self, entry: FileEntry) -> Path:
        return self._manifest(entry.sha256) if entry.path == MANIFEST_NAME else self._blob(entry.sha256)

    def _repair_tree(self, manifest: Manifest, aside: Path) -> None:
        """Move out what is wrong, then link in what is missing. A right file is at its place throughout.

        Others may be reading it, or repairing too.
        """
        tree, files = self._tree(manifest), {entry.path for entry in _tree_files(manifest)}
        if tree.is_symlink() or tree.is_file():
            tree.unlink(missing_ok=True)
        odd, missing = self._tree_faults(manifest)
        for number, path in enumerate(odd):
            if path not in files or (tree / path).is_dir():  # what is not a folder is replaced below, at once
                with suppress(FileNotFoundError):
                    (tree / path).rename(aside / f"{number}.odd")
        for number, entry in enumerate(missing):
            target, link = tree / entry.path, aside / f"{number}.link"
            target.parent.mkdir(parents=True, exist_ok=True)
            disk.link_or_copy(self._stored(entry), link)
            link.replace(target)


def _tree_files(manifest: Manifest) -> tuple[FileEntry, ...]:
    return (*manifest.files, FileEntry(MANIFEST_NAME, len(manifest.to_bytes()), manifest.hex))


def _mark(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_size, found.st_mtime_ns


def _take(folder: Path, aside: Path) -> dict[str, Path]:
    """The files of a staged folder by their paths in it, as files of `aside` that nobody else will write to.

    The folder keeps them until the artifact is whole: links where nobody else has one, else copies.
    """
    files: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        found, path = file.lstat(), file.relative_to(folder).as_posix()
        if stat.S_ISDIR(found.st_mode) or path.startswith(f"{BEGUN}/"):
            continue
        if not stat.S_ISREG(found.st_mode):
            raise LlmoptError(f"`{path}` cannot be stored: it is not a regular file", hint="store plain files only")
        files[path] = aside / f"{len(files)}.taken"
        if found.st_nlink > 1:
            disk.copy_file(file, files[path])
        else:
            disk.link_or_copy(file, files[path])
    if not files:
        raise LlmoptError(f"nothing to store in `{folder}`", hint="an artifact has at least one file")
    return files


def _root(url: str | None) -> Path:
    try:
        root = (_path(url) if url else _data_home() / "llmopt").absolute()
    except RuntimeError as error:  # no home folder
        raise SettingsError(f"the store's folder is not known: {error}", hint=f"name it with `{_OPTION}`") from error
    there = next(path for path in (root, *root.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise SettingsError(
            f"the store `{root}` cannot be there: `{there}` is no folder", hint=f"use `{_OPTION} FOLDER`"
        )
    return root


def _path(url: str) -> Path:
    scheme, separator, rest = url.partition("://")
    if not separator:
        return Path(url).expanduser()
    if scheme == "file" and rest.startswith("/"):
        from urllib.parse import unquote

        return Path(unquote(rest))
    known = "stores are on disk only for now" if scheme == "s3" else "a store is a folder, or `file:///FOLDER`"
    raise SettingsError(f"the store `{url}` cannot be used: {known}", hint=f"use `{_OPTION} FOLDER`")


def _data_home() -> Path:
    given = Path(os.environ.get("XDG_DATA_HOME", ""))
    return given if given.is_absolute() else Path.home() / ".local" / "share"


def _digest(artifact: str) -> str:
    if not _ID.fullmatch(artifact):
        raise SettingsError(f"`{artifact}` is not an artifact's full id", hint="`sha256:` and 64 digits")
    return artifact.removeprefix("sha256:")


def _checked_hex(key: str) -> str:
    if not _HEX.fullmatch(key):
        raise SettingsError(f"`{key}` is not an action's key", hint="64 hexadecimal digits")
    return key


def _names(folder: Path) -> list[str]:
    """What is in a folder of the store; nothing if it is not there."""
    try:
        return sorted(file.name for file in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise LlmoptError(f"`{folder}` cannot be read: {error.strerror}", hint=f"use another `{_OPTION}`") from error


def _dated(folder: Path) -> list[tuple[int, str]]:
    """Digest and time (ns) of each `<hex>.json` in a folder; other files are not ours."""
    found = []
    for name in _names(folder):
        digest, _, suffix = name.partition(".")
        if suffix == "json" and _HEX.fullmatch(digest):
            with suppress(FileNotFoundError):
                found.append(((folder / name).stat().st_mtime_ns, digest))
    return found


def _read(file: Path) -> bytes | None:
    """A small file of the store; None if it is not there."""
    try:
        with file.open("rb") as opened:
            return opened.read(MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise LlmoptError(f"`{file}` cannot be read: {error.strerror}", hint=f"use another `{_OPTION}`") from error


def _json(file: Path) -> dict[str, Json] | None:
    try:
        found = json.loads(_read(file) or b"null")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _action(file: Path) -> Action | None:
    try:
        return Action.from_json((_json(file) or {}).get("action"))
    except LlmoptError:
        return None
