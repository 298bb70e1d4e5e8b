"""A small Hugging Face hub: the listing of a revision, and files by HEAD, GET and ranges, large ones by a redirect."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".parquet", ".bin", ".gguf")
TOKEN = "hf_right"


@dataclass
class Repository:
    """`commits`, the newest last; a branch `main` is at the newest."""

    commits: dict[str, dict[str, bytes]]
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        if revision in ("main", "refs/convert/parquet"):
            return list(self.commits)[-1]
        return revision if revision in self.commits else None


@dataclass
class Hub:
    """What there is, what was asked for, and what goes wrong."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""
    large_url: str = ""  # where large files are: another host, as far as a client can tell
    down: int | None = None  # the status of every answer
    cut: dict[str, int] = field(default_factory=dict)  # files of which so many answers end halfway
    grown: set[str] = field(default_factory=set)  # files that come with a byte more than was said

    def add(self, name: str, files: Mapping[str, bytes], *, gated: bool = False) -> str:
        """A new commit of `org/name` or `datasets/org/name`; its digest."""
        repository = self.repositories.setdefault(name, Repository({}, gated))
        digest = hashlib.sha1(f"{name}{len(repository.commits)}".encode()).hexdigest()
        repository.commits[digest] = dict(files)
        return digest

    def downloads(self) -> list[str]:
        """The names of the files whose bytes were sent."""
        return [line.split("/")[-1] for line in self.requests if line.startswith("GET") and "/api/" not in line]


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            if hub.down is not None:
                return self.refuse(hub.down)
            if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/revision/(.+)", path):
                return self.listing(*found.groups())
            if found := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([0-9a-f]{40})/(.+)", path):
                return self.file(*found.groups(), body=body)
            if found := re.fullmatch(r"/large/(.+)/([0-9a-f]{40})/(.+)", path):
                return self.send_bytes(hub.repositories[found[1]].commits[found[2]][found[3]], found[3], {}, body=body)
            return self.refuse(404)

        def listing(self, kind: str, name: str, revision: str) -> None:
            full = name if kind == "models" else f"datasets/{name}"
            repository = hub.repositories.get(full)
            if repository is None:
                return self.refuse(404, "RepoNotFound")
            commit = repository.commit(revision)
            if commit is None:
                return self.refuse(404, "RevisionNotFound")
            siblings = [{"rfilename": n, "size": len(data)} for n, data in repository.commits[commit].items()]
            return self.send_bytes(json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode(), "", {})

        def file(self, name: str, commit: str, path: str, *, body: bool) -> None:
            repository = hub.repositories[name]
            if repository.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.refuse(403 if "Authorization" in self.headers else 401, "GatedRepo")
            data = repository.commits[commit].get(path)
            if data is None:
                return self.refuse(404, "EntryNotFound")
            headers = {"X-Repo-Commit": commit}
            if path.endswith(LARGE):
                headers |= {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
                headers |= {"Location": f"{hub.large_url}/large/{name}/{commit}/{path}"}
                return self.send_bytes(b"", path, headers, status=302, body=False)
            headers["ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
            return self.send_bytes(data, path, headers, body=body)

        def send_bytes(
            self, data: bytes, path: str, headers: Mapping[str, str], *, status: int = 200, body: bool = True
        ) -> None:
            total = len(data)
            if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
                start, status = int(asked[1]), 206
                data, headers = data[start:], {**headers, "Content-Range": f"bytes {start}-{total - 1}/{total}"}
            if body and path in hub.grown:
                data += b"\0"
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body and hub.cut.get(path):
                hub.cut[path] -= 1
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
            elif body:
                self.wfile.write(data)

        def refuse(self, status: int, code: str | None = None) -> None:
            self.send_response(status)
            if code is not None:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    hub.large_url = f"http://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
