"""A store on disk with another behind it, on S3 or in a shared folder: what is not here is looked for there.

Either the other is the store, and this disk its cache (`--store s3://...`): all that is made goes there, names are
there, and what was used longest ago leaves the disk when it gets too much. Or the store is here and the other a cache
that several machines share (`--remote`): results made elsewhere are used, and one's own sent if asked to (`--push`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmopt.artifacts import layout, signing
from llmopt.artifacts.disk import cache_home
from llmopt.artifacts.keys import PublicKey
from llmopt.artifacts.manifest import MAX_MANIFEST_BYTES, Action, Manifest
from llmopt.artifacts.objects import is_s3
from llmopt.artifacts.outcome import Json, Progress, silent
from llmopt.artifacts.remote import Remote
from llmopt.artifacts.store import Store, is_abbreviated, the_one
from llmopt.errors import CorruptError, LlmoptError


def open_store(
    location: str | None = None,
    *,
    remote: str | None = None,
    push: bool = False,
    trust: Sequence[PublicKey] = (),
    cache_bytes: int | None = None,
    verify_full: bool = False,
    progress: Progress = silent,
) -> Store:
    """The store that a user named: a folder or `s3://bucket/prefix`, None for the user's own.

    `remote` is one that is looked in too, `push`: and written to. `trust`: what comes from elsewhere must be signed by
    one of these keys. `cache_bytes` bounds what of a store on S3 stays on this disk.
    """
    if location is not None and is_s3(location):
        return SharedStore(
            _cache_of(location),
            Remote.open(location),
            own=True,
            push=True,
            trust=trust,
            cache_bytes=cache_bytes,
            verify_full=verify_full,
            progress=progress,
        )
    root = Store.open(location).root
    if remote is None:
        return Store(root, verify_full=verify_full)
    return SharedStore(
        root, Remote.open(remote), own=False, push=push, trust=trust, verify_full=verify_full, progress=progress
    )


class SharedStore(Store):
    """See the module. `own`: the remote is the store."""

    def __init__(
        self,
        root: Path,
        remote: Remote,
        *,
        own: bool,
        push: bool,
        trust: Sequence[PublicKey] = (),
        cache_bytes: int | None = None,
        verify_full: bool = False,
        progress: Progress = silent,
    ) -> None:
        super().__init__(root, verify_full=verify_full)
        self.remote = remote
        self.own, self._push, self._trust, self._cache_bytes = own, push, tuple(trust), cache_bytes
        self._progress = progress
        self._lost = False  # a cache that does not answer is not asked again
        if own:
            self.url = remote.url

    # -- writing

    def put(self, folder: Path, **about: Any) -> Manifest:
        manifest = super().put(folder, **about)
        self._send(manifest.id)
        return manifest

    def attach(self, artifact: str, envelope: Mapping[str, Json]) -> None:
        if not self.has(artifact):
            self.fetch(artifact)
        super().attach(artifact, envelope)
        self._send(artifact)

    def set_name(self, name: str, artifact: str) -> str | None:
        if not self.own:
            return super().set_name(name, artifact)
        layout.check_name(name)
        with self.remote.writing((), [artifact], self._progress):  # so that it stays until it has its name
            if not self.remote.has(artifact):
                self.send(artifact)
            before = self.remote.set_name(name, artifact)
        for line in told_of_name(self.remote, name, before):
            self._progress(line)
        return before

    # -- finding

    def find(self, key: str) -> Manifest | None:
        try:
            found = super().find(key)
        except CorruptError as error:
            if not self._fetch_result(key):
                raise
            self._progress(f"damaged here, and had again from `{self.remote.url}`: {error.message}")
            found = super().find(key)
        if found is None and self._fetch_result(key):
            found = super().find(key)
        elif found is not None:
            self._send(found.id, unless_there=True)
        return found

    def results(self, key: str) -> list[str]:
        here = super().results(key)
        there = self._ask(lambda: self.remote.results(key), []) if self.own or self._push else []
        return [*(artifact for artifact in there if artifact not in here), *here]

    def actions(self, op: str) -> Iterator[Action]:
        seen: set[str] = set()
        for action in super().actions(op):
            seen.add(action.key)
            yield action
        if self.own:
            for manifest, _ in self.ls():
                if manifest.action is not None and manifest.action.op == op and manifest.action.key not in seen:
                    seen.add(manifest.action.key)
                    yield manifest.action

    def get(self, artifact: str) -> Manifest:
        if self.has(artifact):
            return super().get(artifact)
        found = self._ask(lambda: self.remote.get(artifact), None)
        return super().get(artifact) if found is None else found

    def statements(self, artifact: str) -> list[dict[str, Json]]:
        here = super().statements(artifact)
        there = self._ask(lambda: self.remote.statements(artifact), []) if self.own else []
        return [*here, *(statement for statement in there if statement not in here)]

    def read(self, manifest: Manifest, path: str) -> bytes | None:
        entry = next((entry for entry in manifest.files if entry.path == path), None)
        if entry is None or self.blob(entry.sha256).exists():
            return super().read(manifest, path)
        data = self.remote.objects.read(layout.blob(entry.sha256), most=MAX_MANIFEST_BYTES)
        if data is None or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise CorruptError(
                f"`{path}` of `{manifest.id}` is damaged in `{self.remote.url}`", hint="verify the store"
            )
        return data

    def ids(self) -> list[str]:
        return list(self.remote.listed()) if self.own else super().ids()

    def ls(self) -> list[tuple[Manifest, float]]:
        if not self.own:
            return super().ls()
        from concurrent.futures import ThreadPoolExecutor

        listed = sorted(self.remote.listed().items(), key=lambda item: item[1].modified_s, reverse=True)

        def get(artifact: str) -> Manifest | None:
            try:
                return self.get(artifact)
            except CorruptError:  # `ids` and `verify` tell
                return None

        with ThreadPoolExecutor(16) as threads:
            found = zip(threads.map(get, (artifact for artifact, _ in listed)), listed, strict=True)
            return [(manifest, each.modified_s) for manifest, (_, each) in found if manifest is not None]

    def names(self) -> dict[str, str]:
        return self.remote.names() if self.own else super().names()

    def broken_names(self) -> dict[str, str]:
        return self.remote.broken_names(self.ids()) if self.own else super().broken_names()

    def resolve(self, reference: str) -> str | None:
        here = None if self.own else super().resolve(reference)
        if here is not None:
            return here
        if is_abbreviated(reference):
            digits = reference.removeprefix("sha256:").lower()
            if layout.HEX.fullmatch(digits):
                there = self._ask(lambda: self.remote.has(f"sha256:{digits}"), False)
                return f"sha256:{digits}" if there or self.has(f"sha256:{digits}") else None
            return the_one(reference, self._ask(lambda: list(self.remote.listed()), []))
        if not layout.NAME.fullmatch(reference):
            return None
        named: str | None = self._ask(lambda: self.remote.named(reference), None)
        return named

    # -- files

    def path(self, artifact: str) -> Path:
        self.fetch(artifact)
        return super().path(artifact)

    def export(self, artifact: str, dest: Path) -> None:
        self.fetch(artifact)
        super().export(artifact, dest)

    # -- the other

    def fetch(self, artifact: str) -> None:
        """Bring an artifact to this disk, as far as it is not there. What is not signed as it must be is refused."""
        self.leases.take(layout.digest(artifact))
        if self.has(artifact):
            manifest = super().get(artifact)
            if all(self.has_blob(entry) for entry in manifest.files):
                return
        from llmopt.artifacts.transfer import pull

        manifest_there = self._ask(lambda: self.remote.get(artifact), None)
        if manifest_there is None:
            return  # as far as it is anywhere, it is here
        self._require(manifest_there)
        pull(self, artifact, self.remote, self._progress)
        self._evict(layout.digest(artifact))

    def send(self, artifact: str) -> None:
        from llmopt.artifacts.transfer import push

        push(self, artifact, self.remote, self._progress)

    def _send(self, artifact: str, *, unless_there: bool = False) -> None:
        if self._push and not self._lost:
            if unless_there and self._ask(lambda: self.remote.has(artifact), True):
                return
            self._ask(lambda: self.send(artifact), None)
            self._evict(layout.digest(artifact))

    def _fetch_result(self, key: str) -> bool:
        """Bring the newest result that the other has of an action; whether there is one to be used."""
        for artifact in reversed(self._ask(lambda: self.remote.results(key), [])):
            try:
                manifest = self._ask(lambda artifact=artifact: self.remote.get(artifact), None)  # type: ignore[misc]
                if manifest is None or manifest.action is None or manifest.action.key != key:
                    continue
                self.fetch(artifact)
                return True
            except CorruptError as error:
                self._progress(f"not used from `{self.remote.url}`: {error.message}")
        return False

    def _require(self, manifest: Manifest) -> None:
        if self._trust:
            signing.require(manifest, self._envelopes_there(manifest.id), self._trust)

    def _envelopes_there(self, artifact: str) -> list[dict[str, Json]]:
        return [value for value in self.remote.statements(artifact) if signing.is_envelope(value)]

    def _ask(self, work: Callable[[], Any], otherwise: Any) -> Any:
        """A store that does not answer is an error; a shared cache that does not is done without."""
        if self._lost:
            return otherwise
        try:
            return work()
        except CorruptError:
            raise
        except LlmoptError as error:
            if self.own:
                raise
            self._lost = True
            self._progress(f"going on without the shared cache `{self.remote.url}`: {error.message}")
            return otherwise

    def _evict(self, newest: str) -> None:
        """Of a cache that got too large, remove what was used longest ago, is in the store and in use by nobody."""
        if self._cache_bytes is None or not self.own:
            return
        from llmopt.artifacts.local import evict

        evict(self, self._cache_bytes, self.remote, self._progress, keep=(newest,))


def told_of_name(remote: Remote, name: str, before: str | None) -> Iterator[str]:
    """What a user should know of a name that has just been moved."""
    if before is not None:
        yield f"the name `{name}` stood for {before[:19]} until now"
    if not remote.objects.swaps:
        yield f"`{remote.url}` cannot compare and swap: had another moved `{name}` just now, the last would win"


def trusted_keys(text: str | None) -> tuple[PublicKey, ...]:
    """The public keys in files separated by `:`, as `$LLMOPT_TRUST` has them; read at once."""
    from llmopt.artifacts.keys import read_public

    return tuple(read_public(file) for file in (text or "").split(":") if file)


def _cache_of(url: str) -> Path:
    name = url.removeprefix("s3://").strip("/").replace("/", "-")[:40]
    return cache_home() / "stores" / f"{name}-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:12]}"
