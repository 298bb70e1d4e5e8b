"""The store that a user named, with what of it is elsewhere.

Either it is on S3, and this disk its cache (`--store s3://...`): all that is made goes there, names are there, and what
was used longest ago leaves the disk when it gets too much. Or it is here and another is a cache that several machines
share (`--remote`): results made elsewhere are used, and one's own sent if asked to (`--push`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmopt.artifacts import layout
from llmopt.artifacts.disk import cache_home
from llmopt.artifacts.manifest import Action, Manifest
from llmopt.artifacts.objects import is_s3
from llmopt.artifacts.outcome import Json, Progress, silent
from llmopt.artifacts.remote import Remote
from llmopt.artifacts.remote.backed import BackedStore
from llmopt.artifacts.store import Store
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
        return S3Store(
            Remote.open(location), trust=trust, cache_bytes=cache_bytes, verify_full=verify_full, progress=progress
        )
    root = Store.open(location).root
    if remote is None:
        return Store(root, verify_full=verify_full)
    return SharingStore(root, Remote.open(remote), push=push, trust=trust, verify_full=verify_full, progress=progress)


class S3Store(BackedStore):
    """On S3. `cache_bytes` bounds what of it stays on this disk, where what was fetched is verified and used."""

    def __init__(
        self,
        remote: Remote,
        *,
        trust: Sequence[PublicKey] = (),
        cache_bytes: int | None = None,
        verify_full: bool = False,
        progress: Progress = silent,
    ) -> None:
        super().__init__(_cache_of(remote), remote, push=True, trust=trust, verify_full=verify_full, progress=progress)
        self.url = remote.url
        self._cache_bytes = cache_bytes

    def set_name(self, name: str, artifact: str) -> str | None:
        layout.check_name(name)
        with self.remote.writing((), [artifact], self._progress):  # so that it stays until it has its name
            self.send(artifact)
            before = self.remote.set_name(name, artifact)
        for line in told_of_name(self.remote, name, before):
            self._progress(line)
        return before

    def actions(self, op: str) -> Iterator[Action]:
        seen: set[str] = set()
        for action in super().actions(op):
            seen.add(action.key)
            yield action
        for manifest, _ in self.ls():
            if manifest.action is not None and manifest.action.op == op and manifest.action.key not in seen:
                seen.add(manifest.action.key)
                yield manifest.action

    def statements(self, artifact: str) -> list[dict[str, Json]]:
        here = super().statements(artifact)
        return [*here, *(said for said in self.remote.statements(artifact) if said not in here)]

    def ids(self) -> list[str]:
        return list(self.remote.listed())

    def ls(self) -> list[tuple[Manifest, float]]:
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
        return self.remote.names()

    def broken_names(self) -> dict[str, str]:
        return self.remote.broken_names(self.ids())

    def resolve(self, reference: str) -> str | None:
        return self._resolve_there(reference)

    def make_room(self, artifact: str) -> None:
        """Of a cache that got too large, remove what was used longest ago, can be had again and nobody uses."""
        if self._cache_bytes is None:
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

    def _ask(self, work: Callable[[], Any], otherwise: Any) -> Any:
        """A store that does not answer is an error."""
        return work()


class SharingStore(BackedStore):
    """On this disk, beside a cache that several machines share, which is done without where it does not answer."""

    _met, _lost = False, False  # one that does not answer is not asked again

    def resolve(self, reference: str) -> str | None:
        return super().resolve(reference) or self._resolve_there(reference)

    def _ask(self, work: Callable[[], Any], otherwise: Any) -> Any:
        if self._lost:
            return otherwise
        try:
            return work() if self._met else self._first(work)
        except (CorruptError, SettingsError):
            raise
        except LlmoptError as error:
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


def _cache_of(remote: Remote) -> Path:
    """A folder for each bucket and prefix of each server."""
    place = f"{getattr(getattr(remote.objects, 'access', None), 'endpoint', '')}\n{remote.url}"
    name = remote.url.removeprefix("s3://").replace("/", "-")[:40]
    return cache_home() / "stores" / f"{name}-{hashlib.sha256(place.encode()).hexdigest()[:12]}"
