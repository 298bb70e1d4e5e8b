"""A store in a temporary folder, and a short way to put files into it."""

from __future__ import annotations

import gc
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from servers import Server
from servers.fixtures import NAMES
from servers.places import Place

from llmopt.artifacts import Action, Manifest, Store

Put = Callable[..., Manifest]

FILES: Mapping[str, bytes] = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 40,
    "tokenizer/vocab.txt": b"a\nb\n",
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"))


@pytest.fixture
def put(store: Store) -> Put:
    """put({"name": b"bytes"}, action=..., ...) -> Manifest; by default three small files of kind `model`."""

    def do(files: Mapping[str, bytes] = FILES, *, into: Store = store, **about: Any) -> Manifest:
        with into.stage() as folder:
            write(folder, files)
            return into.put(folder, **{"kind": "model", **about})

    return do


@pytest.fixture(scope="session")
def s3_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what is known of the servers lies, so that they are asked once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def s3_buckets() -> dict[str, str]:
    """By the names of servers: one on each, since it is found out of each bucket what its server can."""
    return {}


@pytest.fixture
def s3_place(s3_server: Server, new_s3_place: Callable[[Server], Place]) -> Place:
    """An empty prefix on each server that the tests run on."""
    return new_s3_place(s3_server)


@pytest.fixture
def new_s3_place(
    s3_buckets: dict[str, str], s3_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Server], Place]:
    """An empty prefix on a server, which this process and those that it starts see from now on."""

    def make(server: Server) -> Place:
        server.set_in(monkeypatch)
        monkeypatch.setenv("XDG_CACHE_HOME", str(s3_cache))
        bucket = s3_buckets.get(server.name) or s3_buckets.setdefault(server.name, server.new_bucket())
        return Place(url=f"s3://{bucket}/{uuid.uuid4().hex[:12]}", server=server)

    return make


@pytest.fixture
def disk_place(tmp_path: Path) -> Place:
    """An empty folder."""
    return Place(url=str(tmp_path / "there"))


@pytest.fixture(params=["disk", *NAMES])
def place(request: pytest.FixtureRequest, disk_place: Place) -> Place:
    """An empty folder, and an empty prefix on each server that the tests run on."""
    if request.param == "disk":
        return disk_place
    make: Callable[[Server], Place] = request.getfixturevalue("new_s3_place")
    return make(request.getfixturevalue(request.param))


@pytest.fixture
def make_action() -> Callable[..., Action]:
    def make(**changes: Any) -> Action:
        fields: dict[str, Any] = {
            "op": "quantize.gptq",
            "op_version": 1,
            "inputs": {"model": "sha256:" + "0" * 64},
            "settings": {"bits": 4, "symmetric": True},
            "code": "sha256:" + "1" * 64,
            "deps": {"torch": "2.13.0"},
            "target": {"arch": "x86_64"},
        }
        return Action(**{**fields, **changes})

    return make


@pytest.fixture
def write_files() -> Callable[[Path, Mapping[str, bytes]], None]:
    return write


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    _mount(folder, "size=4m")
    yield folder
    gc.collect()  # a store that an error's traceback still holds has its leases open
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that not even root can write to."""
    folder = tmp_path / "disk"
    folder.mkdir()
    _mount(folder, "size=1m,ro")
    yield folder
    subprocess.run(["umount", folder], check=True)


def _mount(folder: Path, options: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
