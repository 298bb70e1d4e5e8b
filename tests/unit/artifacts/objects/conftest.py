"""Stores on real S3 servers, with the proxy that breaks things between, and artifacts to send."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers import Proxy, Server

from llmopt.artifacts import Manifest, Store
from llmopt.artifacts.objects import multipart, retries
from llmopt.artifacts.objects.s3 import S3Objects
from llmopt.artifacts.remote import Remote

MIB = 1 << 20

#: Opens the place that a test is about: with a prefix of its own, or one that is given.
OpenS3 = Callable[..., S3Objects]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found out about servers is kept there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tries as always, with less between them."""
    monkeypatch.setattr(retries, "PAUSE_S", 0.01)
    monkeypatch.setattr(retries, "MOST_PAUSE_S", 0.03)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence of half a second is taken for a server that has gone."""
    monkeypatch.setattr(multipart, "SILENCE_S", 0.5)


@pytest.fixture
def proxy(s3_server: Server) -> Iterator[Proxy]:
    with Proxy(s3_server) as proxy:
        yield proxy


@pytest.fixture
def bucket(s3_server: Server) -> str:
    return s3_server.new_bucket()


@pytest.fixture
def open_s3(proxy: Proxy, bucket: str, monkeypatch: pytest.MonkeyPatch) -> OpenS3:
    """open_s3(prefix="store") -> the objects below it, through the proxy."""
    proxy.server.set_in(monkeypatch)
    return lambda prefix="store": S3Objects.open(f"s3://{bucket}/{prefix}")


@pytest.fixture
def s3(open_s3: OpenS3, proxy: Proxy) -> S3Objects:
    """One that knows by now how the server answers to a range: rclone's first answer is thrown away."""
    objects = open_s3()
    objects.write("leases/range", b"content")
    objects.read_range("leases/range", 0, 1)
    objects.delete(["leases/range"])
    proxy.forget()
    return objects


@pytest.fixture
def remote(s3: S3Objects) -> Remote:
    return Remote(s3)


def make(folder: Path, sizes: dict[str, int], seed: int = 0) -> tuple[Store, Manifest]:
    """A store with an artifact of files of random bytes."""
    store, chance = Store(folder), random.Random(seed)
    with store.stage() as staged:
        for path, size in sizes.items():
            (staged / path).parent.mkdir(parents=True, exist_ok=True)
            (staged / path).write_bytes(chance.randbytes(size))
        return store, store.put(staged, kind="model")


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Manifest]:
    """A file of two parts, one of a middling size, and small ones. Not to be changed."""
    sizes = {"model.safetensors": 18 * MIB + 5, "tokenizer.model": MIB + 1, "config.json": 800, "empty.txt": 0}
    return make(tmp_path_factory.mktemp("large"), sizes)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Manifest]:
    return make(tmp_path_factory.mktemp("small"), {"config.json": 800, "model.safetensors": 200_000}, seed=1)


@pytest.fixture
def fresh(tmp_path: Path) -> Store:
    """A store with nothing in it."""
    return Store(tmp_path / "fresh")


@pytest.fixture
def contents() -> Callable[[Store, Manifest], dict[str, bytes]]:
    def read(store: Store, manifest: Manifest) -> dict[str, bytes]:
        return {entry.path: store.blobs.path(entry.sha256).read_bytes() for entry in manifest.files}

    return read


def open_files() -> set[str]:
    """What this process has open."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{link.name} {link.readlink()}")
        except FileNotFoundError:
            continue
    return found
