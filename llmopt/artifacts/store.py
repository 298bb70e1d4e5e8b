"""The artifacts on disk: content-addressed, verified when read, written so that a crash leaves nothing half-made.

    blobs/sha256/ab/<hex>        the files, read-only
    manifests/sha256/<hex>.json  the artifacts
    actions/<key>/<hex>.json     a file for each distinct result of an action
    names/<name>                 the id of an artifact
    attestations/<hex>/          who made it and when, one file a run, bare or signed
    chunks/sha256/<hex>.json     digests of the chunks of an artifact's large files, for transfers
    leases/<hex>                 locked by those who use the artifact
    verified                     which blobs were read through, and how they looked then
    trees/<hex>/                 an artifact's files under their names: links to blobs, made when asked for
    begun/<key>/                 what an action that ended early has finished, to go on from
    tmp/                         what is being written

On S3 the first six and `leases/` lie just so (`layout.py`). Blobs go first, then the manifest, then the action or the
name, so whatever can be found is whole.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from llmopt.artifacts import chunks, disk, layout, records, trees
from llmopt.artifacts.blobs import REPAIR, Blobs
from llmopt.artifacts.digest import in_parallel, seal
from llmopt.artifacts.export import copy_out
from llmopt.artifacts.leases import Leases
from llmopt.artifacts.manifest import (
    MANIFEST_NAME,
    Action,
    FileEntry,
    Manifest,
    canonical_json,
)
from llmopt.artifacts.objects import folder_of
from llmopt.artifacts.outcome import Json
from llmopt.artifacts.records import OPTION
from llmopt.artifacts.trust import signing
from llmopt.artifacts.trust.keys import SigningKey
from llmopt.errors import CorruptError, LlmoptError, SettingsError

BEGUN = ".begun"


class Store:
    """Any number of processes may use one at the same time. Reading from one that is not there finds nothing."""

    def __init__(self, root: Path, *, verify_full: bool = False) -> None:
        """`verify_full`: what is used is read through once in this process, whatever was known of it before."""
        self.root = root
        self.url = str(root)
        self.signer: SigningKey | None = None  # signs what is said of the artifacts that `runner.execute` publishes
        self.leases = Leases(root / layout.LEASES)
        self.blobs = Blobs(root, verify_full=verify_full)

    @classmethod
    def open(cls, url: str | None = None) -> Store:
        """The store in a folder (a path or `file://`), else in $LLMOPT_STORE, else in the user's data folder."""
        return cls(_root(url or os.environ.get("LLMOPT_STORE") or None))

    @classmethod
    def around(cls, path: Path) -> Store | None:
        """The store that has handed out this folder as an artifact's; None for any other folder."""
        trees_folder = path.absolute().parent
        handed_out = trees_folder.name == "trees" and layout.HEX.fullmatch(path.name) is not None
        return cls(trees_folder.parent) if handed_out and path.is_dir() else None

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
                raise disk.full("the store", self.root, option=OPTION) from error

    def forget(self, key: str) -> None:
        """Remove what an action that ended early has left, unless a process is at work on it."""
        begun = self._begun(key)
        if not begun.exists() and not begun.with_name(f"{key}{disk.LOCK}").exists():
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
            sealed = dict(zip(files, in_parallel(seal, files.values(), files), strict=True))
            manifest = Manifest(
                kind=kind,
                files=tuple(entry for entry, _ in sealed.values()),
                action=action,
                status=status,
                events=tuple(events),
                metrics=dict(metrics or {}),
            )
            self._publish(
                manifest, files, {entry.sha256: parts for entry, parts in sealed.values() if parts}, aside, attestation
            )
            for entry in manifest.files:  # theirs no more: until here a crash leaves the folder as it was
                self.blobs.unlink(folder / entry.path, entry)
            self.blobs.record(manifest.files)
        return manifest

    def adopt(self, manifest: Manifest, files: Mapping[str, Path], parts: Mapping[str, tuple[str, ...]]) -> None:
        """Move files that were fetched into the store, as the artifact that they are.

        `files` holds, by sha256, those that the store lacked; each has been read through, is read-only and synced, and
        lies on the store's disk. `parts` are the chunk digests of the large ones.
        """
        with self._writing(), self._aside() as aside:
            left = dict(files)
            here = {entry.path: left.pop(entry.sha256) for entry in manifest.files if entry.sha256 in left}
            self._publish(manifest, here, parts, aside, None)
            self.blobs.record(manifest.files)
        if os.path.lexists(self._tree(manifest)):  # with links to what was replaced
            self._put_right(manifest)

    def _publish(
        self,
        manifest: Manifest,
        files: Mapping[str, Path],
        parts: Mapping[str, tuple[str, ...]],
        aside: Path,
        attestation: Callable[[Manifest], Mapping[str, Json]] | None,
    ) -> None:
        """Blobs first, then the manifest with what lies beside it, then the action."""
        data = Manifest.from_bytes(manifest.to_bytes()).to_bytes()  # what cannot be read back is not written
        with self.leases.publishing():
            self.leases.take(manifest.hex, published=True)
            added = {entry.sha256 for entry in manifest.files if entry.path in files}
            for entry in manifest.files:
                if entry.path in files:
                    self.blobs.add(files[entry.path], entry)
                elif entry.sha256 not in added and (problem := self.blobs.problem(entry)) is not None:
                    raise CorruptError(f"`{entry.path}` of `{manifest.id}` {problem}", hint="run the command again")
            disk.sync_folders([self.blobs.path(entry.sha256) for entry in manifest.files], self.root)
            self._put_chunks(manifest.hex, parts, aside)
            if records.read(self._manifest(manifest.hex)) != data:
                disk.publish(data, self._manifest(manifest.hex), aside=aside, root=self.root)
            else:  # whoever wrote it may have been cut off before this
                disk.sync_folders([self._manifest(manifest.hex)], self.root)
            if attestation is not None:
                self._attest(manifest, canonical_json(attestation(manifest)), aside)
            if manifest.action is not None:
                target = self.root / layout.action(manifest.action.key, manifest.hex)
                disk.publish(records.action_result(manifest), target, aside=aside, root=self.root)

    def set_name(self, name: str, artifact: str) -> str | None:
        """Let `name` stand for an artifact of this store from now on; what it stood for before, if anything else."""
        layout.check_name(name)
        with self._writing(), self._aside() as aside, self.leases.publishing(), disk.locked(self.root / disk.SWAP):
            data, before = f"{self.get(artifact).id}\n".encode(), None
            with suppress(CorruptError):
                before = self._named(name)
            disk.publish(data, self.root / layout.name(name), aside=aside, root=self.root)
        return None if before == artifact else before

    # -- finding

    def find(self, key: str) -> Manifest | None:
        """The newest result of an action, verified; CorruptError if it is not right."""
        results = self.results(key)
        if not results:
            return None
        self.leases.take(layout.digest(results[-1]))
        manifest = self._load(results[-1])
        if manifest is None:
            raise CorruptError(f"the manifest of `{results[-1]}` is missing", hint=REPAIR)
        if manifest.action is None or manifest.action.key != key:
            raise CorruptError(f"the artifact `{manifest.id}` is no result of the action `{key}`", hint=REPAIR)
        self.blobs.check(manifest)
        return manifest

    def results(self, key: str) -> list[str]:
        """The ids of an action's distinct results, the newest last. More than one: it is not reproducible."""
        folder = self.root / layout.action(layout.checked_key(key))
        return [f"sha256:{digest}" for _, digest in sorted(records.dated(folder))]

    def actions(self, op: str) -> Iterator[Action]:
        """Every action of an operation that has a result here; what is not readable as one is passed over."""
        for key in records.names(self.root / layout.ACTIONS):
            for _, digest in records.dated(self.root / layout.action(key)):
                action = records.action(self.root / layout.action(key, digest))
                if action is not None and action.op == op and action.key == key:
                    yield action
                    break

    def get(self, artifact: str) -> Manifest:
        """The manifest of a full id; CorruptError if it is not the one that the id names. Its files are not read."""
        manifest = self._load(artifact)
        if manifest is None:
            raise LlmoptError(f"no artifact `{artifact}` in the store `{self.url}`", hint="see `llmopt store ls`")
        return manifest

    def attestations(self, artifact: str) -> list[dict[str, Json]]:
        """The statements about an artifact, signed or not, oldest first. Nothing here says that one is to be believed.

        One that is there bare and in an envelope, or in several, is one run.
        """
        found: list[dict[str, Json]] = []
        for value in self.statements(artifact):
            with suppress(CorruptError):
                if (statement := signing.unwrap(value)) not in found:
                    found.append(statement)
        return found

    def envelopes(self, artifact: str) -> list[dict[str, Json]]:
        """The signed ones of these, as they are, for `signing.require` to judge."""
        return [value for value in self.statements(artifact) if signing.is_envelope(value)]

    def statements(self, artifact: str) -> list[dict[str, Json]]:
        """All that lies beside an artifact, bare or in envelopes, oldest first."""
        folder = self.root / layout.attestation(layout.digest(artifact))
        whole = [file for _, name in sorted(records.dated(folder)) if records.is_whole(file := folder / f"{name}.json")]
        return [value for value in map(records.as_json, whole) if value is not None]

    def attach(self, artifact: str, envelope: Mapping[str, Json]) -> None:
        """Keep a statement beside the artifact of this store that it is about; CorruptError if it is about another."""
        manifest = self.get(artifact)
        signing.check_about(signing.unwrap(envelope), manifest)
        with self._writing(), self._aside() as aside, self.leases.publishing():
            self.get(artifact)  # which may have been removed
            self._attest(manifest, canonical_json(dict(envelope)), aside)

    def read(self, manifest: Manifest, path: str) -> bytes | None:
        """One small file of an artifact, checked, without the others being read; None if it has no such file."""
        entry = next((entry for entry in manifest.files if entry.path == path), None)
        if entry is None:
            return None
        data = records.read(self.blobs.path(entry.sha256))
        if data is None or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise CorruptError(f"the artifact `{manifest.id}` is corrupt: `{path}` is not as stored", hint=REPAIR)
        return data

    def ids(self) -> list[str]:
        """Of all artifacts, damaged ones too, in no order that means anything."""
        return [f"sha256:{digest}" for _, digest in records.dated(self._manifest("").parent)]

    def ls(self) -> list[tuple[Manifest, float]]:
        """Every artifact that can be listed and when it was first stored (seconds since 1970), newest first."""
        found = []
        for created_ns, digest in sorted(records.dated(self._manifest("").parent), reverse=True):
            try:
                found.append((self.get(f"sha256:{digest}"), created_ns / 1e9))
            except LlmoptError:  # damaged: `ids` and `verify` tell
                continue
        return found

    def names(self) -> dict[str, str]:
        """What every name stands for."""
        found: dict[str, str] = {}
        for name in records.names(self.root / layout.NAMES):
            with suppress(CorruptError):
                if layout.NAME.fullmatch(name) and (artifact := self._named(name)):
                    found[name] = artifact
        return found

    def broken_names(self) -> dict[str, str]:
        """Names that stand for nothing, and why: something has damaged them."""
        found: dict[str, str] = {}
        for name in filter(layout.NAME.fullmatch, records.names(self.root / layout.NAMES)):
            try:
                artifact = self._named(name)
            except CorruptError as error:
                found[name] = error.message
            else:
                if artifact is not None and not self.has(artifact):
                    found[name] = f"the name `{name}` stands for `{artifact}`, which is not there"
        return found

    def resolve(self, reference: str) -> str | None:
        """The full id for an id, for 8 or more of its digits (with or without `sha256:`), or for a name.

        None when there is nothing of that kind; SettingsError when the digits fit more than one artifact.
        """
        if not layout.is_abbreviated(reference):
            return self._named(reference) if layout.NAME.fullmatch(reference) else None
        return layout.the_one(reference, self.ids())

    # -- files

    def path(self, artifact: str) -> Path:
        """A folder with the artifact's verified files and its manifest; they are links to blobs: not to be written to.

        Whatever in it is not the artifact's is put right first. Until this process ends, nothing removes it.
        """
        self.leases.take(layout.digest(artifact))
        manifest = self.get(artifact)
        self.blobs.check(manifest)
        return self._put_right(manifest)

    def _put_right(self, manifest: Manifest) -> Path:
        """The folder of links to blobs that are right."""
        tree = self._tree(manifest)
        if self._tree_faults(manifest) != trees.NO_FAULTS:
            with (
                self._writing(needs=manifest.size),
                self.blobs.relinking(entry.sha256 for entry in manifest.files),
                self._aside() as aside,
            ):
                trees.repair(tree, manifest, self._stored, aside)
            if self._tree_faults(manifest) != trees.NO_FAULTS:
                raise CorruptError(f"`{tree}` is being changed by someone else", hint="nothing may write to the store")
        return tree

    def verify(self, artifact: str) -> list[str]:
        """Read all of an artifact again and say what is wrong with it; nothing when all is well."""
        try:
            manifest = self.get(artifact)
        except LlmoptError as error:
            return [error.message]
        self.blobs.forget(manifest.files)
        problems = [f"`{entry.path}` {problem}" for entry, problem in self.blobs.problems(manifest.files, here=True)]
        problems += self._problems_beside(manifest)
        tree = self._tree(manifest)
        if os.path.lexists(tree) and not problems:  # a tree is compared with its blobs, so only once these are right
            odd, changed = self._tree_faults(manifest)
            problems += [f"`{tree / path}` does not belong there" for path in odd]
            problems += [f"`{tree / entry.path}` is missing or changed" for entry in changed]
        return problems

    def export(self, artifact: str, dest: Path) -> None:
        """Copy an artifact into a folder outside the store, all of it or nothing; see `export.copy_out`."""
        manifest = self.get(artifact)
        self.blobs.check(manifest)
        corrupt = CorruptError(f"the copy of `{artifact}` in `{dest}` came out wrong", hint="check the disk")
        copy_out(manifest, dest, self.blobs.path, corrupt)

    def chunks(self, manifest: Manifest) -> dict[str, tuple[str, ...]]:
        """The chunk digests of its large files by their sha256, as far as they are known."""
        return chunks.from_bytes(records.read(self.root / layout.chunks(manifest.hex)))

    # -- of a store that has its artifacts, or more of them, elsewhere; see `BackedStore`

    @property
    def here(self) -> Store:
        """What of the store is on this disk."""
        return self

    def fetch(self, artifact: str) -> bool:
        """Have all of an artifact on this disk; whether it is there. CorruptError for one that cannot be trusted."""
        return self.has(artifact)

    def send(self, artifact: str) -> None:
        """Have an artifact that is on this disk where the store keeps its artifacts, if that is elsewhere."""

    def make_room(self, artifact: str) -> None:
        """To be called when an artifact has come to this disk: others may have to leave it."""

    # -- within

    def _aside(self) -> AbstractContextManager[Path]:
        return disk.temporary(self.root / "tmp")

    def _writing(self, needs: int = 0) -> AbstractContextManager[None]:
        return disk.writing("the store", self.root, option=OPTION, needs=needs)

    def _begun(self, key: str) -> Path:
        return self.root / "begun" / layout.checked_key(key)

    def _manifest(self, digest: str) -> Path:
        return self.root / layout.manifest(digest)

    def _tree(self, manifest: Manifest) -> Path:
        return self.root / "trees" / manifest.hex

    def has(self, artifact: str) -> bool:
        """Whether its manifest is on this disk; whether it and its files are right is not asked."""
        return self._manifest(layout.digest(artifact)).exists()

    def is_whole(self, artifact: str) -> bool:
        """Whether it is on this disk, and it and its files are right."""
        try:
            return self.has(artifact) and not self.blobs.problems(self.get(artifact).files)
        except CorruptError:
            return False

    def _load(self, artifact: str) -> Manifest | None:
        digest = layout.digest(artifact)
        data = records.read(self._manifest(digest))
        if data is None:
            return None
        if hashlib.sha256(data).hexdigest() != digest:
            raise CorruptError(f"the manifest of `{artifact}` is not the one that was stored", hint=REPAIR)
        try:
            return Manifest.from_bytes(data)
        except CorruptError as error:
            raise CorruptError(f"the manifest of `{artifact}` cannot be used: {error.message}", hint=REPAIR) from error

    def _named(self, name: str) -> str | None:
        data = records.read(self.root / layout.name(name))
        if data is None:
            return None
        artifact = data.decode(errors="replace").strip()
        if not layout.is_id(artifact):
            raise CorruptError(f"the name `{name}` stands for no artifact", hint="name the artifact again")
        return artifact

    def _put_chunks(self, digest: str, parts: Mapping[str, tuple[str, ...]], aside: Path) -> None:
        file, data = self.root / layout.chunks(digest), chunks.to_bytes(parts)
        there = records.read(file)
        if parts and there != data:
            disk.publish(data, file, aside=aside, root=self.root)
        elif there is not None and not parts and not chunks.are_whole(there):
            file.unlink(missing_ok=True)  # then each file is compared as a whole

    def _problems_beside(self, manifest: Manifest) -> Iterator[str]:
        """What is damaged of what is known about an artifact. None of it is used then."""
        if not chunks.are_whole(records.read(self.root / layout.chunks(manifest.hex)) or b"{}"):
            yield f"`{layout.chunks(manifest.hex)}` is damaged"
        folder = layout.attestation(manifest.hex)
        for _, name in records.dated(self.root / folder):
            if not records.is_whole(self.root / folder / f"{name}.json"):
                yield f"`{folder}/{name}.json` is damaged"
        if manifest.action is not None:
            file = layout.action(manifest.action.key, manifest.hex)
            if records.read(self.root / file) not in (None, records.action_result(manifest)):
                yield f"`{file}` is damaged"

    def _attest(self, manifest: Manifest, data: bytes, aside: Path) -> None:
        name = hashlib.sha256(data).hexdigest()
        disk.publish(data, self.root / layout.attestation(manifest.hex, name), aside=aside, root=self.root)

    def _tree_faults(self, manifest: Manifest) -> trees.Faults:
        return trees.find_faults(self._tree(manifest), manifest, self._stored)

    def _stored(self, entry: FileEntry) -> Path:
        return self._manifest(entry.sha256) if entry.path == MANIFEST_NAME else self.blobs.path(entry.sha256)


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
            disk.copy_file(file, files[path], sync=False)
        else:
            disk.link_or_copy(file, files[path])
    if not files:
        raise LlmoptError(f"nothing to store in `{folder}`", hint="an artifact has at least one file")
    return files


def _root(url: str | None) -> Path:
    try:
        root = (folder_of(url) if url else disk.data_home()).absolute()
    except RuntimeError as error:  # no home folder
        raise SettingsError(f"the store's folder is not known: {error}", hint=f"name it with `{OPTION}`") from error
    there = next(path for path in (root, *root.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise SettingsError(
            f"the store `{root}` cannot be there: `{there}` is no folder", hint=f"use `{OPTION} FOLDER`"
        )
    return root
