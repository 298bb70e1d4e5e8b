"""Stores to push to, in a folder and on S3, and what lies in them, read and spoilt behind the store's back."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree import ElementTree

from servers.server import Server


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a store is: `url` for llmopt; on S3 `server` for what a test does there itself."""

    url: str
    server: Server | None = None

    def all(self) -> list[str]:
        return self.keys("")

    def keys(self, prefix: str) -> list[str]:
        """Of what begins with the prefix."""
        if self.server is None:
            root = Path(self.url)
            found = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
            return sorted(key for key in found if key.startswith(prefix))
        return sorted(self._listed(self.server, prefix))

    def read(self, key: str) -> bytes:
        found = self.find(key)
        assert found is not None, f"no {key}"
        return found

    def find(self, key: str) -> bytes | None:
        if self.server is None:
            file = Path(self.url) / key
            return file.read_bytes() if file.exists() else None
        reply = self.server.request("GET", self._path(key))
        assert reply.status in (200, 404), (key, reply.status)
        return reply.body if reply.status == 200 else None

    def write(self, key: str, data: bytes) -> None:
        """In a folder, in place: the same file, with the same time of the last change."""
        if self.server is not None:
            assert self.server.request("PUT", self._path(key), body=data).status == 200
            return
        file = Path(self.url) / key
        file.parent.mkdir(parents=True, exist_ok=True)
        times = file.stat() if file.exists() else None
        if times is not None:
            file.chmod(0o644)
        file.write_bytes(data)
        if times is not None:
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    def delete(self, key: str) -> None:
        if self.server is None:
            (Path(self.url) / key).unlink()
        else:
            assert self.server.request("DELETE", self._path(key)).status in (200, 204)

    def _path(self, key: str) -> str:
        address = urlsplit(self.url)
        return f"/{address.netloc}{address.path}/{key}"

    def _listed(self, server: Server, prefix: str) -> Iterator[str]:
        address = urlsplit(self.url)
        base = f"{address.path[1:]}/"
        query = {"list-type": "2", "prefix": f"{base}{prefix}"}
        while True:
            reply = server.request("GET", f"/{address.netloc}", query=query)
            assert reply.status == 200, reply.body
            root = ElementTree.fromstring(reply.body)
            space = root.tag.partition("}")[0] + "}" if root.tag.startswith("{") else ""
            yield from (str(key.text).removeprefix(base) for key in root.iter(f"{space}Key"))
            token = root.findtext(f"{space}NextContinuationToken")
            if not token:
                return
            query["continuation-token"] = token


def faults(place: Place) -> list[str]:
    """What can be found in a store and is not whole, by nothing but its bytes and the layout in docs."""
    data = None
    while data is None:  # a request of a client that was killed may only be done now
        read = {key: place.find(key) for key in place.all() if key.partition("/")[0] in _FINDABLE}
        data = {key: content for key, content in read.items() if content is not None}
        data = data if len(data) == len(read) else None
    found = []
    for key, content in data.items():
        kind, _, rest = key.partition("/")
        stem = rest.rpartition("/")[2].removesuffix(".json")
        if kind in ("blobs", "manifests", "attestations") and hashlib.sha256(content).hexdigest() != stem:
            found.append(f"{key} is not what its name says")
        elif kind == "manifests":
            for file in json.loads(content)["files"]:
                blob = f"blobs/sha256/{file['sha256'][:2]}/{file['sha256']}"
                found += [] if blob in data else [f"{key} lists {file['path']}, which is missing"]
        elif kind in ("actions", "names"):
            digest = stem if kind == "actions" else content.decode().strip().removeprefix("sha256:")
            found += [] if f"manifests/sha256/{digest}.json" in data else [f"{key} leads to nothing"]
    return found


_FINDABLE = ("blobs", "manifests", "actions", "names", "attestations")
