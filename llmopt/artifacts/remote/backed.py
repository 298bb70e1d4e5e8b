"""A store on disk with another behind it, on S3 or in a shared folder: what is not here is looked for there."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from llmopt.artifacts import layout
from llmopt.artifacts.manifest import MAX_MANIFEST_BYTES, Manifest
from llmopt.artifacts.objects import GoneError
from llmopt.artifacts.outcome import Json, Progress, silent
from llmopt.artifacts.remote import Remote
from llmopt.artifacts.store import Store
from llmopt.artifacts.trust import signing
from llmopt.artifacts.trust.keys import PublicKey
from llmopt.errors import CorruptError


class BackedStore(Store, ABC):
    """`push`: what is made here goes there too. `trust`: what comes from there must be signed by one of these keys."""

    def __init__(
        self,
        root: Path,
        remote: Remote,
        *,
        push: bool,
        trust: Sequence[PublicKey] = (),
        verify_full: bool = False,
        progress: Progress = silent,
    ) -> None:
        super().__init__(root, verify_full=verify_full)
        self.remote = remote
        self._push, self._trust, self._progress = push, tuple(trust), progress
        self._damaged_there: set[str] = set()  # to be put right there once they are made again

    # -- writing

    def put(self, folder: Path, **about: Any) -> Manifest:
        manifest = super().put(folder, **about)
        self._published(manifest)
        return manifest

    def adopt(self, manifest: Manifest, files: Mapping[str, Path], parts: Mapping[str, tuple[str, ...]]) -> None:
        super().adopt(manifest, files, parts)
        self._published(manifest)

    def attach(self, artifact: str, envelope: Mapping[str, Json]) -> None:
        if not self.has(artifact):
            self.fetch(artifact)
        super().attach(artifact, envelope)
        self._send(artifact)

    # -- finding

    def find(self, key: str) -> Manifest | None:
        found, damage = None, None
        try:
            found = self._find_here(key)
        except CorruptError as error:
            damage = error
        if found is not None:
            self.send(found.id)
            return found
        if not self._fetch_result(key):
            if damage is not None:
                raise damage
            return None
        if damage is not None:
            self._progress(f"damaged here, and had again from `{self.remote.url}`: {damage.message}")
        return self.here.find(key)

    def results(self, key: str) -> list[str]:
        here = super().results(key)
        there = self._ask(lambda: self.remote.results(key), []) if self._push else []
        return [*(artifact for artifact in there if artifact not in here), *here]

    def get(self, artifact: str) -> Manifest:
        try:
            if self.has(artifact):
                return super().get(artifact)
        except CorruptError:
            if (there := self._get_there(artifact)) is None:
                raise
            return there
        there = self._get_there(artifact)
        return super().get(artifact) if there is None else there

    def read(self, manifest: Manifest, path: str) -> bytes | None:
        entry = next((entry for entry in manifest.files if entry.path == path), None)
        if entry is None or self.blobs.path(entry.sha256).exists():
            return super().read(manifest, path)
        data = self.remote.objects.read(layout.blob(entry.sha256), most=MAX_MANIFEST_BYTES)
        if data is None or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise CorruptError(
                f"`{path}` of `{manifest.id}` is damaged in `{self.remote.url}`", hint="see `llmopt store verify`"
            )
        return data

    # -- files

    def path(self, artifact: str) -> Path:
        self.fetch(artifact)
        return super().path(artifact)

    def verify(self, artifact: str) -> list[str]:
        """Of what is on this disk, once what is missing or damaged here has been fetched."""
        try:
            self.fetch(artifact)
        except CorruptError as error:
            return [error.message]
        return super().verify(artifact)

    def export(self, artifact: str, dest: Path) -> None:
        self.fetch(artifact)
        super().export(artifact, dest)

    # -- the other

    @cached_property
    def here(self) -> Store:
        """This disk alone, of which the two know the same."""
        here = Store(self.root)
        here.leases, here.blobs = self.leases, self.blobs
        return here

    def fetch(self, artifact: str) -> bool:
        """What is not signed as it must be is refused, also if it came here when it need not have been."""
        self.leases.take(layout.digest(artifact))
        if self.here.is_whole(artifact):
            if self._is_refused(artifact):
                self._require(self.here.get(artifact))
                self._unsigned(artifact).unlink(missing_ok=True)
            return True
        manifest = self._get_there(artifact)
        if manifest is None:
            return False
        self._require(manifest)
        return self._pull(manifest)

    def send(self, artifact: str) -> None:
        if self._push and (artifact in self._damaged_there or not self._ask(lambda: self.remote.has(artifact), True)):
            self._send(artifact)

    # -- within

    @abstractmethod
    def _ask(self, work: Callable[[], Any], otherwise: Any) -> Any:
        """The other's answer, or what to go on with where it is done without."""

    def _published(self, manifest: Manifest) -> None:
        self._unsigned(manifest.id).unlink(missing_ok=True)
        self._send(manifest.id)
        self.make_room(manifest.id)

    def _send(self, artifact: str) -> None:
        """All that is known about it here, and its files as far as they are not there, or damaged there."""
        if not self._push:
            return
        from llmopt.artifacts.remote import transfer, verify

        def send() -> None:
            damaged = verify.problems(self.remote, artifact) if artifact in self._damaged_there else {}
            transfer.push(self.here, artifact, self.remote, self._progress, replace=tuple(damaged))
            self._damaged_there.discard(artifact)

        self._ask(send, None)

    def _find_here(self, key: str) -> Manifest | None:
        """One that came here unsigned is not taken any more once it must be signed."""
        found = self.here.find(key)
        if found is not None and self._is_refused(found.id):
            try:
                self.fetch(found.id)
            except CorruptError as error:
                self._progress(f"not used, though it is on this disk: {error.message}")
                return None
        return found

    def _fetch_result(self, key: str) -> bool:
        """Bring the newest result that the other has of an action; whether there is one to be used."""
        for artifact in reversed(self._ask(lambda: self.remote.results(key), [])):
            try:
                manifest = self._get_there(artifact)
                if manifest is None or manifest.action is None or manifest.action.key != key:
                    continue
                self._require(manifest)
            except CorruptError as error:
                self._progress(f"not used from `{self.remote.url}`: {error.message}")
                continue
            try:
                if self._pull(manifest):
                    return True
            except CorruptError as error:
                self._damaged_there.add(artifact)
                self._progress(f"not used from `{self.remote.url}`: {error.message}")
        return False

    def _pull(self, manifest: Manifest) -> bool:
        """CorruptError for what is there and damaged, or is there in part only."""
        from llmopt.artifacts.remote import transfer

        def pull() -> bool:
            if not self._trust:
                self._mark(manifest.id)
            try:
                transfer.pull(self.here, manifest.id, self.remote, self._progress)
            except GoneError as error:
                raise CorruptError(error.message, hint=error.hint) from error
            return True

        done: bool = self._ask(pull, False)
        if done:
            if self._trust:
                self._unsigned(manifest.id).unlink(missing_ok=True)
            self.make_room(manifest.id)
        return done

    def _unsigned(self, artifact: str) -> Path:
        """Is there for what came from elsewhere when nobody asked for a signature."""
        return self.root / "unsigned" / layout.digest(artifact)

    def _is_refused(self, artifact: str) -> bool:
        return bool(self._trust) and self._unsigned(artifact).exists()

    def _mark(self, artifact: str) -> None:
        """Not what was made here too."""
        if not self.has(artifact):
            with self._writing():
                self._unsigned(artifact).parent.mkdir(parents=True, exist_ok=True)
                self._unsigned(artifact).touch()

    def _require(self, manifest: Manifest) -> None:
        """CorruptError unless one of the keys vouches for it, by what is said of it here or there."""
        if self._trust:
            there = self._ask(lambda: self.remote.statements(manifest.id), [])
            envelopes = [value for value in there if signing.is_envelope(value)]
            signing.require(manifest, [*self.here.envelopes(manifest.id), *envelopes], self._trust)

    def _resolve_there(self, reference: str) -> str | None:
        if layout.is_abbreviated(reference):
            digits = reference.removeprefix("sha256:").lower()
            if layout.HEX.fullmatch(digits):
                there = self._ask(lambda: self.remote.has(f"sha256:{digits}"), False)
                return f"sha256:{digits}" if there or self.has(f"sha256:{digits}") else None
            return layout.the_one(reference, self._ask(lambda: list(self.remote.listed()), []))
        if not layout.NAME.fullmatch(reference):
            return None
        named: str | None = self._ask(lambda: self.remote.named(reference), None)
        return named

    def _get_there(self, artifact: str) -> Manifest | None:
        found: Manifest | None = self._ask(lambda: self.remote.get(artifact), None)
        return found
