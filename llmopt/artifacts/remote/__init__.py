"""A store somewhere else, in the layout of the one on disk: read and written object by object.

Writers never overwrite a blob. Blobs go first, then the manifest, then the action or the name, so whatever can be found
is whole on any server, whatever conditions it knows. Who removes things and who writes tell each other by leases: each
writes its own and then looks for the other's, so that at least one of them sees the other. Who writes and sees a
removal waits for its end; a removal that sees a writer keeps all that the writer's lease names. Only then does a writer
ask what is there already, and a removal what is there at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from llmopt.artifacts import layout
from llmopt.artifacts.manifest import MAX_MANIFEST_BYTES, FileEntry, Manifest, canonical_json
from llmopt.artifacts.objects import Found, Objects, open_objects
from llmopt.artifacts.outcome import Json, Progress, silent
from llmopt.artifacts.threads import briefly
from llmopt.errors import CorruptError, LlmoptError, SettingsError

_WRITE, _REMOVE = "write", "remove"
#: How long a lease counts after it was last written, by the clock of the place. While a process works, it writes it
#: again and again; others wait for one that removes things, so a dead one's ends soon.
LEASE_S = {_WRITE: 3600.0, _REMOVE: 300.0}
#: What else lies there for a moment only, unless its process is killed.
_PASSING = ("clock", "probe")
_RENEWALS, _MARGIN = 6, 0.8
_WAIT_S, _LOOK_S, _SWAP_S = 900.0, 1.0, 60.0
_AT_ONCE = 16
_REPAIR = "`llmopt store verify --repair-from STORE` repairs it; or push it again"


class Remote:
    """Any number of machines may use one at the same time."""

    def __init__(self, objects: Objects, *, known: bool = False) -> None:
        """`known`: it is a store, whatever else lies there."""
        self.objects = objects
        self.url = objects.url
        self._checked = known

    @classmethod
    def open(cls, url: str) -> Remote:
        """The store at `s3://bucket/prefix`, or in a folder."""
        return cls(open_objects(url))

    # -- reading

    def get(self, artifact: str) -> Manifest | None:
        """The manifest of a full id, None if it is not here; CorruptError if it is not the one that the id names."""
        digest = layout.digest(artifact)
        self._check()
        data = self._read(layout.manifest(digest))
        if data is None:
            return None
        if hashlib.sha256(data).hexdigest() != digest:
            raise CorruptError(f"the manifest of `{artifact}` in `{self.url}` is damaged", hint=_REPAIR)
        return Manifest.from_bytes(data)

    def has(self, artifact: str) -> bool:
        self._check()
        return self.objects.find(layout.manifest(layout.digest(artifact))) is not None

    def holds(self, manifest: Manifest) -> bool:
        """Whether this very manifest is here, undamaged."""
        self._check()
        return self._read(layout.manifest(manifest.hex)) == manifest.to_bytes()

    def results(self, key: str) -> list[str]:
        """The ids of an action's distinct results, the newest last."""
        self._check()
        found = [
            (each.modified_s, digest)
            for each in self.objects.list(f"{layout.action(layout.checked_key(key))}/")
            if (digest := layout.hex_of(each.key)) is not None
        ]
        return [f"sha256:{digest}" for _, digest in sorted(found)]

    def listed(self) -> dict[str, Found]:
        """The object of every artifact's manifest, by its id."""
        self._check()
        return {
            f"sha256:{digest}": found
            for found in self.objects.list(f"{layout.MANIFESTS}/")
            if (digest := layout.hex_of(found.key)) is not None
        }

    def names(self) -> dict[str, str]:
        """What every name stands for."""
        return {name: artifact for name, artifact in self._names().items() if isinstance(artifact, str)}

    def broken_names(self, ids: Collection[str]) -> dict[str, str]:
        """Names that stand for nothing, and why, where these artifacts are here: something has damaged them."""
        found: dict[str, str] = {}
        for name, artifact in self._names().items():
            if isinstance(artifact, CorruptError):
                found[name] = artifact.message
            elif artifact not in ids:
                found[name] = f"the name `{name}` stands for `{artifact}`, which is not there"
        return found

    def _names(self) -> dict[str, str | CorruptError]:
        self._check()

        def named(name: str) -> str | CorruptError | None:
            try:
                return self.named(name)
            except CorruptError as error:
                return error

        names = [each.key.removeprefix(f"{layout.NAMES}/") for each in self.objects.list(f"{layout.NAMES}/")]
        names = [name for name in names if layout.NAME.fullmatch(name)]
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            found = zip(names, threads.map(named, names), strict=True)
            return {name: artifact for name, artifact in found if artifact is not None}

    def named(self, name: str) -> str | None:
        self._check()
        data = self._read(layout.name(name))
        return None if data is None else _artifact(data, name)

    def statements(self, artifact: str) -> list[dict[str, Json]]:
        """The statements about an artifact, bare or in envelopes, oldest first; none that is damaged."""
        prefix = f"{layout.attestation(layout.digest(artifact))}/"
        found = sorted(self.objects.list(prefix), key=lambda each: each.modified_s)
        read = ((layout.hex_of(each.key), self._read(each.key)) for each in found)
        good = [data for digest, data in read if data is not None and hashlib.sha256(data).hexdigest() == digest]
        return [value for value in map(json.loads, good) if isinstance(value, dict)]

    def chunks(self, manifest: Manifest) -> bytes | None:
        return self._read(layout.chunks(manifest.hex))

    def blob_problem(self, entry: FileEntry) -> str | None:
        """What can be seen to be wrong with a file without reading it."""
        found = self.objects.find(layout.blob(entry.sha256))
        if found is None:
            return "is missing"
        return None if found.size == entry.size else f"has {found.size} bytes, not {entry.size}"

    # -- writing, within `writing()`

    def add(self, key: str, data: bytes) -> None:
        """A small object whose key names its content; one that is there already is left if it is right."""
        if self._read(key) != data:
            self.objects.write(key, data)

    def set_name(self, name: str, artifact: str) -> str | None:
        """Let the name stand for an artifact that is here; what it stood for before, if anything else.

        Where the server can compare, no move of another's is lost unseen; LlmoptError when others keep moving it.
        """
        layout.check_name(name)
        with self.writing((), [artifact]):
            if not self.has(artifact):
                raise LlmoptError(f"no artifact `{artifact}` in the store `{self.url}`", hint="push it first")
            return self._move(name, artifact)

    def _move(self, name: str, artifact: str) -> str | None:
        data, found = f"{artifact}\n".encode(), None
        give_up, pause_s = time.monotonic() + _SWAP_S, 0.02
        while time.monotonic() < give_up:
            before, found = found, self.objects.read_tagged(layout.name(name), most=1000)
            mine = found is not None and found[0] == data
            if mine or self.objects.swap(layout.name(name), data, None if found is None else found[1]):
                # One's own is there already also where the answer to a swap was lost.
                replaced = before if mine else found
                with suppress(CorruptError):
                    return None if replaced is None or replaced[0] == data else _artifact(replaced[0], name)
                return None
            time.sleep(pause_s * random.random())
            pause_s = min(1.0, 1.5 * pause_s)
        raise LlmoptError(
            f"the name `{name}` keeps being moved by others in `{self.url}`", hint="run the command again"
        )

    @contextmanager
    def writing(
        self, blobs: Collection[str], artifacts: Collection[str], progress: Progress = silent
    ) -> Iterator[Lease]:
        """While this lasts, none of these blobs (by sha256) or artifacts is removed, here or missing yet."""
        self._check(mark=True)
        lease = Lease(self.objects, _WRITE, {"blobs": list(blobs), "artifacts": list(artifacts)})
        try:
            self._wait_for_removal(lease, progress)
            yield lease
        except KeyboardInterrupt:
            briefly(lease.end)
            raise
        except BaseException:
            lease.end()
            raise
        lease.end()

    @contextmanager
    def removing(self, *, alone: bool = False) -> Iterator[Removal]:
        """While this lasts, no writer begins that does not wait for it. `alone`: a lock keeps all others out, so that
        those who left a lease that says otherwise are dead."""
        self._check(mark=True)
        lease = Lease(self.objects, _REMOVE, {})
        try:
            found = self._leases(lease)
            rivals = sorted(found.of(_REMOVE))
            if alone:
                self.objects.delete(rivals)
            elif rivals:
                raise LlmoptError(
                    f"another process is removing things from `{self.url}`",
                    hint=f"wait for it; if it was killed, its `{rivals[0]}` counts for {LEASE_S[_REMOVE] / 60:.0f} min",
                )
            removal = Removal(lease, found.now_s)
            for key in found.of(_WRITE):
                if (data := self._read(key)) is not None:  # else its work is done, and will be seen
                    removal.protect(key, data)
            self.objects.delete(found.over)
            yield removal
        except KeyboardInterrupt:
            briefly(lease.end)
            raise
        except BaseException:
            lease.end()
            raise
        lease.end()

    # -- within

    def _check(self, *, mark: bool = False) -> None:
        """Refuse a place that holds other things; `mark` it as a store before the first write."""
        if self._checked:
            return
        marker = self._read(layout.MARKER)
        if marker is None:
            for number, found in enumerate(self.objects.list()):
                if not _ours(found.key):
                    raise SettingsError(
                        f"`{self.url}` is no store: it holds `{found.key}`",
                        hint="name a prefix of its own, for example `s3://BUCKET/llmopt`",
                    )
                if number == 20:
                    break
            if not mark:
                return
            self.objects.write(layout.MARKER, canonical_json({"schema": "llmopt.store/1"}))
        self._checked = True

    def _read(self, key: str) -> bytes | None:
        return self.objects.read(key, most=MAX_MANIFEST_BYTES)

    def _leases(self, own: Lease) -> _Leases:
        """Those of others, and the time there."""
        found = {each.key: each.modified_s for each in self.objects.list(f"{layout.LEASES}/")}
        now_s = found.pop(own.key, 0.0) or self.objects.now()
        counts = [key for key, modified_s in found.items() if now_s - modified_s < LEASE_S.get(_kind(key), 0.0)]
        kinds = (*LEASE_S, *_PASSING)
        over = [key for key, at_s in found.items() if _kind(key) in kinds and now_s - at_s > 2 * max(LEASE_S.values())]
        return _Leases(now_s, counts, over)

    def _wait_for_removal(self, lease: Lease, progress: Progress) -> None:
        """Until those end that have begun before the lease was there; those that begin now see it."""
        waiting = set(self._leases(lease).of(_REMOVE))
        if waiting:
            progress(f"waiting for `llmopt store gc`, which is at work in `{self.url}`")
        give_up = time.monotonic() + _WAIT_S
        while waiting:
            if time.monotonic() > give_up:
                raise LlmoptError(
                    f"`llmopt store gc` has been at work in `{self.url}` for long", hint="try again later"
                )
            time.sleep(_LOOK_S)
            lease.write()  # whose time tells what the time is there
            waiting &= set(self._leases(lease).of(_REMOVE))


@dataclass(frozen=True, slots=True)
class _Leases:
    now_s: float
    counts: list[str]  # the keys of those that count still
    over: list[str]  # of those that have not for long

    def of(self, kind: str) -> list[str]:
        return [key for key in self.counts if _kind(key) == kind]


class Lease:
    """An object that says who is at work. It is written again in the background until it ends."""

    def __init__(self, objects: Objects, kind: str, about: dict[str, Json]) -> None:
        self.key = f"{layout.LEASES}/{kind}-{os.urandom(8).hex()}.json"
        self._objects, self._lasts_s = objects, LEASE_S[kind]
        self._data = canonical_json({"schema": "llmopt.lease/1", **about})
        self._written_s, self._lost = _clock_s(), False
        self.write()
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew, daemon=True, name="llmopt-lease")
        self._renewing.start()

    def write(self) -> None:
        """Unless it may have run out: then others have taken what it said for void, and it cannot be had back."""
        self.check()
        at_s = _clock_s()
        self._objects.write(self.key, self._data)
        self._written_s = at_s

    def check(self) -> None:
        """Raise LlmoptError if it may have run out, because this process or the network stood still."""
        self._lost = self._lost or _clock_s() - self._written_s > _MARGIN * self._lasts_s
        if self._lost:
            raise LlmoptError(
                f"this process stood still for more than {_MARGIN * self._lasts_s / 60:.0f} minutes",
                hint="run the command again: it goes on where it stopped",
            )

    renew = check

    def end(self) -> None:
        self._ended.set()
        self._renewing.join()
        with suppress(LlmoptError):  # it ends by itself
            self._objects.delete([self.key])

    def _renew(self) -> None:
        while not self._ended.wait(self._lasts_s / _RENEWALS):
            with suppress(LlmoptError):
                self.write()


class Removal:
    """What a removal may go by: the time there, and the artifacts and blobs that writers at work have need of."""

    def __init__(self, lease: Lease, now_s: float) -> None:
        self.now_s = now_s
        self.blobs: set[str] = set()
        self.artifacts: set[str] = set()
        self.check = lease.check

    def protect(self, key: str, data: bytes) -> None:
        """What a writer's lease names."""
        try:
            about = json.loads(data)
            self.blobs |= {str(sha256) for sha256 in about["blobs"]}
            self.artifacts |= {str(artifact) for artifact in about["artifacts"]}
        except (ValueError, TypeError, KeyError, RecursionError):
            raise LlmoptError(
                f"a writer is at work, and what its lease `{key}` says cannot be read",
                hint=f"try again later: it counts for {LEASE_S[_WRITE] / 60:.0f} min after the writer's end",
            ) from None


def _clock_s() -> float:
    """Goes on while the machine sleeps, where there is such a clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _kind(key: str) -> str:
    return key.removeprefix(f"{layout.LEASES}/").partition("-")[0]


def _ours(key: str) -> bool:
    folders = {each.partition("/")[0] for each in (*layout.ALL, *layout.ON_DISK)}
    return key.partition("/")[0] in folders or key == layout.MARKER


def _artifact(data: bytes, name: str) -> str:
    artifact = data.decode(errors="replace").strip()
    if not layout.is_id(artifact):
        raise CorruptError(f"the name `{name}` stands for no artifact", hint="name the artifact again")
    return artifact
