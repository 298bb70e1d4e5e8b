"""A store somewhere else, in the layout of the one on disk: read and written object by object.

Writers never overwrite a blob. Blobs go first, then the manifest, then the action or the name, so whatever can be found
is whole on any server, whatever conditions it knows. Who removes things and who writes tell each other by leases: each
writes its own and then looks for the other's, so that at least one of them sees the other.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

from llmopt.artifacts import layout
from llmopt.artifacts.manifest import MAX_MANIFEST_BYTES, FileEntry, Manifest, canonical_json
from llmopt.artifacts.objects import Found, Objects, open_objects
from llmopt.artifacts.outcome import Json
from llmopt.artifacts.threads import briefly
from llmopt.errors import CorruptError, LlmoptError, SettingsError

#: How long a lease counts after it was last written. Whoever works longer writes it again.
LEASE_S = 3600.0
_RENEW_S, _WAIT_S = 600.0, 600.0
_WRITE, _REMOVE = "write", "remove"
_REPAIR = "`llmopt store verify --repair-from STORE` repairs it; or push it again"


class Remote:
    """Any number of machines may use one at the same time."""

    def __init__(self, objects: Objects) -> None:
        self.objects = objects
        self.url = objects.url
        self._checked = False

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
        self._check()
        found: dict[str, str] = {}
        for each in self.objects.list(f"{layout.NAMES}/"):
            name = each.key.removeprefix(f"{layout.NAMES}/")
            with suppress(CorruptError):
                if layout.NAME.fullmatch(name) and (artifact := self.named(name)):
                    found[name] = artifact
        return found

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
        """A small object whose key names its content; one that is there already is left unless its size is wrong."""
        found = self.objects.find(key)
        if found is None or found.size != len(data):
            self.objects.write(key, data)

    def set_name(self, name: str, artifact: str) -> str | None:
        """Let the name stand for an artifact that is here; what it stood for before, if anything else.

        Where the server can compare, no move of another's is lost unseen; LlmoptError when others keep moving it.
        """
        layout.check_name(name)
        if not self.has(artifact):
            raise LlmoptError(f"no artifact `{artifact}` in the store `{self.url}`", hint="push it first")
        data = f"{artifact}\n".encode()
        for _ in range(20):
            found = self.objects.read_tagged(layout.name(name), most=1000)
            if found is not None and found[0] == data:
                return None
            if self.objects.swap(layout.name(name), data, None if found is None else found[1]):
                with suppress(CorruptError):
                    return None if found is None else _artifact(found[0], name)
                return None
            time.sleep(0.05)
        raise LlmoptError(
            f"the name `{name}` keeps being moved by others in `{self.url}`", hint="run the command again"
        )

    @contextmanager
    def writing(self, blobs: Collection[str]) -> Iterator[Lease]:
        """While this lasts, none of these blobs (by sha256) is removed, here or missing yet."""
        self._check(mark=True)
        lease = Lease(self.objects, _WRITE, {"blobs": list(blobs)})
        try:
            self._wait_for_removal(lease)
            yield lease
        except KeyboardInterrupt:
            briefly(lease.end)
            raise
        except BaseException:
            lease.end()
            raise
        lease.end()

    @contextmanager
    def removing(self) -> Iterator[Removal]:
        """While this lasts, no writer begins that does not wait for it."""
        self._check(mark=True)
        lease = Lease(self.objects, _REMOVE, {})
        try:
            now, others = self._leases(lease)
            rivals = sorted(key for key in others if _kind(key) == _REMOVE)
            if rivals:
                raise LlmoptError(
                    f"another process is removing things from `{self.url}`",
                    hint=f"wait for it; what it left if it was killed counts for {LEASE_S / 3600:.0f} h: `{rivals[0]}`",
                )
            protected: set[str] = set()
            for key in others:
                with suppress(ValueError, TypeError, AttributeError):
                    protected |= set(json.loads(self._read(key) or b"{}").get("blobs", ()))
            yield Removal(lease, now, protected)
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

    def _leases(self, own: Lease) -> tuple[float, list[str]]:
        """The time there, and the leases of others that still count."""
        found = {each.key: each.modified_s for each in self.objects.list(f"{layout.LEASES}/")}
        now = found.get(own.key, 0.0) or self.objects.now()
        return now, [
            key
            for key, modified_s in found.items()
            if key != own.key and _kind(key) in (_WRITE, _REMOVE) and now - modified_s < LEASE_S
        ]

    def _wait_for_removal(self, lease: Lease) -> None:
        give_up = time.monotonic() + _WAIT_S
        while any(_kind(key) == _REMOVE for key in self._leases(lease)[1]):
            if time.monotonic() > give_up:
                raise LlmoptError(
                    f"`llmopt store gc` has been at work in `{self.url}` for long", hint="try again later"
                )
            time.sleep(1.0)
            lease.renew(now=True)


class Lease:
    """An object that says who is at work, by the server's clock."""

    def __init__(self, objects: Objects, kind: str, about: dict[str, Json]) -> None:
        self.key = f"{layout.LEASES}/{kind}-{os.urandom(8).hex()}.json"
        self._objects = objects
        self._data = canonical_json({"schema": "llmopt.lease/1", **about})
        self._written_s = 0.0
        self.renew(now=True)

    def renew(self, *, now: bool = False) -> None:
        """To be called every now and then by who works long."""
        if now or time.monotonic() - self._written_s > _RENEW_S:
            self._objects.write(self.key, self._data)
            self._written_s = time.monotonic()

    def end(self) -> None:
        with suppress(LlmoptError):  # it ends by itself
            self._objects.delete([self.key])


class Removal:
    """What a removal may go by: the time there, and the blobs that writers at work have need of."""

    def __init__(self, lease: Lease, now_s: float, protected: set[str]) -> None:
        self.now_s, self.protected = now_s, protected
        self.renew = lease.renew


def _kind(key: str) -> str:
    return key.removeprefix(f"{layout.LEASES}/").partition("-")[0]


def _ours(key: str) -> bool:
    folders = (*(f"{each.partition('/')[0]}/" for each in layout.ALL), "tmp/", "trees/", "begun/")
    return key.startswith(folders) or key in (layout.MARKER, "verified")


def _artifact(data: bytes, name: str) -> str:
    artifact = data.decode(errors="replace").strip()
    if not layout.is_id(artifact):
        raise CorruptError(f"the name `{name}` stands for no artifact", hint="name the artifact again")
    return artifact
