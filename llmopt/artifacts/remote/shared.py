"""A store on disk with another behind it, on S3 or in a shared folder: what is not here is looked for there.

Either the other is the store, and this disk its cache (`--store s3://...`): all that is made goes there, names are
there, and what was used longest ago leaves the disk when it gets too much. Or the store is here and the other a cache
that several machines share (`--remote`): results made elsewhere are used, and one's own sent if asked to (`--push`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from llmopt.artifacts import layout
from llmopt.artifacts.disk import cache_home
from llmopt.artifacts.manifest import MAX_MANIFEST_BYTES, Action, Manifest
from llmopt.artifacts.objects import GoneError, is_s3
from llmopt.artifacts.outcome import Json, Progress, silent
from llmopt.artifacts.remote import Remote
from llmopt.artifacts.store import Store, is_abbreviated, the_one
from llmopt.artifacts.trust import signing
from llmopt.artifacts.trust.keys import PublicKey
from llmopt.errors import CorruptError, LlmoptError, SettingsError

_AT_ONCE = 16
#: With a shared cache that has not answered yet.
_PATIENCE_S = 15.0


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
        if remote is not None:
            raise SettingsError(
                f"`--remote {remote}` goes with a store on this disk, and `{location}` is on S3",
                hint="give one of them",
            )
        place = Remote.open(location)
        return SharedStore(
            _cache_of(place),
            place,
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
        self._met, self._lost = False, False  # a cache that does not answer is not asked again
        self._damaged_there: set[str] = set()  # to be put right there once they are made again
        if own:
            self.url = remote.url

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

    def set_name(self, name: str, artifact: str) -> str | None:
        if not self.own:
            return super().set_name(name, artifact)
        layout.check_name(name)
        with self.remote.writing((), [artifact], self._progress):  # so that it stays until it has its name
            self.send(artifact)
            before = self.remote.set_name(name, artifact)
        for line in told_of_name(self.remote, name, before):
            self._progress(line)
        return before

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
        try:
            if self.has(artifact):
                return super().get(artifact)
        except CorruptError:
            if (there := self._get_there(artifact)) is None:
                raise
            return there
        there = self._get_there(artifact)
        return super().get(artifact) if there is None else there

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
                f"`{path}` of `{manifest.id}` is damaged in `{self.remote.url}`", hint="see `llmopt store verify`"
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
            except LlmoptError:  # damaged: `ids` and `verify` tell
                return None

        with ThreadPoolExecutor(_AT_ONCE) as threads:
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
        here = Store(self.root, verify_full=self._verify_full)
        here.leases, here._verified, here._fresh = self.leases, self._verified, self._fresh
        return here

    def fetch(self, artifact: str) -> bool:
        """What is not signed as it must be is refused, also if it came here when it need not have been."""
        self.leases.take(layout.digest(artifact))
        if self._is_whole(artifact):
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

    def make_room(self, artifact: str) -> None:
        """Of a cache that got too large, remove what was used longest ago, can be had again and nobody uses."""
        if self._cache_bytes is None or not self.own:
            return
        from llmopt.artifacts.local import evict
        from llmopt.artifacts.remote.plain import sources

        try:
            evict(
                self.here,
                self._cache_bytes,
                self.remote,
                self._progress,
                keep=(layout.digest(artifact),),
                elsewhere=lambda: sources(self.root),
            )
        except LlmoptError as error:  # it is there, and there will be other times
            self._progress(f"the cache may be larger than it should be: {error.message}")

    # -- within

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

    def _is_whole(self, artifact: str) -> bool:
        try:
            return self.has(artifact) and not self._blob_problems(self.here.get(artifact).files)
        except CorruptError:
            return False

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

    def _get_there(self, artifact: str) -> Manifest | None:
        found: Manifest | None = self._ask(lambda: self.remote.get(artifact), None)
        return found

    def _ask(self, work: Callable[[], Any], otherwise: Any) -> Any:
        """A store that does not answer is an error; a shared cache that does not is done without."""
        if self._lost:
            return otherwise
        try:
            return work() if self.own or self._met else self._first(work)
        except (CorruptError, SettingsError):
            raise
        except LlmoptError as error:
            if self.own:
                raise
            self._lost = True
            self._progress(f"going on without the shared cache `{self.remote.url}`: {error.message}")
            return otherwise

    def _first(self, work: Callable[[], Any]) -> Any:
        """Work without a cache is worth more than waiting for one: that is for what is on its way."""
        from llmopt.artifacts.threads import apart

        try:
            answer = apart(work, patience_s=_PATIENCE_S)
        except TimeoutError:
            raise LlmoptError(f"it has not answered for {_PATIENCE_S:.0f} s") from None
        self._met = True
        return answer


def told_of_name(remote: Remote, name: str, before: str | None) -> Iterator[str]:
    """What a user should know of a name that has just been moved."""
    if before is not None:
        yield f"the name `{name}` stood for {before[:19]} until now"
    if not remote.objects.swaps:
        yield f"`{remote.url}` cannot compare and swap: had another moved `{name}` just now, the last would win"


def trusted_keys(text: str | None) -> tuple[PublicKey, ...]:
    """The public keys in files separated by `:`, as `$LLMOPT_TRUST` has them; read at once."""
    from llmopt.artifacts.trust.keys import read_public

    return tuple(read_public(file) for file in (text or "").split(":") if file)


def _cache_of(remote: Remote) -> Path:
    """A folder for each bucket and prefix of each server."""
    place = f"{getattr(getattr(remote.objects, 'access', None), 'endpoint', '')}\n{remote.url}"
    name = remote.url.removeprefix("s3://").replace("/", "-")[:40]
    return cache_home() / "stores" / f"{name}-{hashlib.sha256(place.encode()).hexdigest()[:12]}"
