"""Killed or interrupted in the middle of a large file, the same command goes on where it stopped."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from servers import Exchange, Hang, Proxy, Server, Slow
from unit.artifacts.objects.conftest import make

from llmopt.artifacts import Manifest, Store, layout
from llmopt.artifacts.objects import parts_of
from llmopt.artifacts.objects.multipart import Wire, abort_old
from llmopt.artifacts.objects.s3 import S3Objects
from llmopt.artifacts.remote import Remote
from llmopt.artifacts.remote.collect import collect

PART = 16 << 20
SIZE = 150_000_000  # nine parts

#: The command in a process of its own, begun.
Begin = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Manifest]:
    return make(tmp_path_factory.mktemp("huge"), {"model.safetensors": SIZE, "config.json": 800}, seed=2)


@pytest.fixture
def begin(s3: S3Objects) -> Begin:
    """begin("store", "push", ...), with the proxy as the server."""

    def run(*arguments: object) -> subprocess.Popen[str]:
        program = "import sys; from llmopt.cli.app import main; sys.exit(main())"
        command = [sys.executable, "-c", program, *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return run


def finish(process: subprocess.Popen[str], timeout_s: float = 60) -> tuple[int, str]:
    _, said = process.communicate(timeout=timeout_s)
    return process.returncode, said


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def parts(proxy: Proxy) -> list[Exchange]:
    return [each for each in list(proxy.exchanges) if each.method == "PUT" and "partNumber" in each.query]


def later_part(request: Exchange) -> bool:
    return request.method == "PUT" and int(request.query.get("partNumber", 0)) > 4


def chunk(request: Exchange) -> int | None:
    found = re.match(r"bytes=(\d+)-", request.headers.get("range", ""))
    is_blob = request.method == "GET" and f"/{layout.BLOBS}/" in request.path
    return int(found[1]) // PART if found and is_blob and request.headers["range"] != "bytes=0-799" else None


def later_chunk(request: Exchange) -> bool:
    return (chunk(request) or 0) >= 4


def done(proxy: Proxy) -> set[str]:
    return {each.query["partNumber"] for each in parts(proxy) if each.status == 200}


def check_there(store: Store, manifest: Manifest, objects: S3Objects, fresh: Store) -> None:
    from llmopt.artifacts.remote import transfer

    transfer.pull(fresh, manifest.id, Remote(objects))
    assert fresh.verify(manifest.id) == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_push_goes_on_where_it_stopped(
    how: signal.Signals, huge: tuple[Store, Manifest], begin: Begin, proxy: Proxy, s3: S3Objects, fresh: Store
) -> None:
    store, manifest = huge
    command = ("store", "push", manifest.id, s3.url, "--store", store.root)
    proxy.fail(match=later_part, with_=Slow(request_bytes_per_s=5e5), times=None)
    process = begin(*command)
    wait_for(lambda: done(proxy) >= {"1", "2", "3", "4"}, process)
    process.send_signal(how)
    code, said = finish(process, 10)
    assert code == (-how if how == signal.SIGKILL else 130)
    assert "Traceback" not in said
    assert not Remote(s3).has(manifest.id)
    there = done(proxy)
    proxy.heal()
    proxy.forget()
    code, said = finish(begin(*command))
    assert (code, "Traceback" in said) == (0, False)
    assert {each.query["partNumber"] for each in parts(proxy)} == {str(n) for n in range(1, 10)} - there
    assert sum(each.request_bytes for each in parts(proxy)) == sum(
        end - begin for number, begin, end in parts_of(SIZE) if str(number) not in there
    )
    check_there(store, manifest, s3, fresh)


@pytest.mark.parametrize("how", [signal.SIGKILL])
def test_a_pull_goes_on_where_it_stopped(
    how: signal.Signals, huge: tuple[Store, Manifest], begin: Begin, proxy: Proxy, s3: S3Objects, fresh: Store
) -> None:
    from llmopt.artifacts.remote import transfer

    store, manifest = huge
    transfer.push(store, manifest.id, Remote(s3))
    command = ("store", "pull", manifest.id, s3.url, "--store", fresh.root)
    proxy.fail(match=later_chunk, with_=Slow(response_bytes_per_s=5e5), times=None)
    target = fresh.root / "begun" / manifest.hex / max(manifest.files, key=lambda entry: entry.size).sha256
    process = begin(*command)
    wait_for(lambda: target.exists() and target.stat().st_blocks * 512 >= 4 * PART, process)
    process.send_signal(how)
    code, said = finish(process, 10)
    assert code == (-how if how == signal.SIGKILL else 130)
    assert "Traceback" not in said
    assert not fresh.has(manifest.id)
    proxy.heal()
    proxy.forget()
    code, said = finish(begin(*command))
    assert code == 0, said
    assert {chunk(each) for each in proxy.exchanges if chunk(each) is not None} == set(range(4, 9))
    assert Store(fresh.root).verify(manifest.id) == []
    assert not target.exists()


def begun_upload(objects: S3Objects, sha256: str) -> None:
    objects.sender(layout.blob(sha256), 2 * PART, sha256).send(1, b"x" * PART)


def test_uploads_that_nobody_came_back_to_are_removed(s3: S3Objects) -> None:
    begun_upload(s3, "ab" * 32)
    assert len(list(Wire.of(s3).uploads(f"{layout.BLOBS}/"))) == 1
    assert abort_old(s3, f"{layout.BLOBS}/", time.time() - 3600) == 0
    assert abort_old(s3, f"{layout.BLOBS}/", time.time() + 3600, except_for=["ab" * 32]) == 0
    assert abort_old(s3, f"{layout.BLOBS}/", time.time() + 3600) == 1
    assert list(Wire.of(s3).uploads(f"{layout.BLOBS}/")) == []


def test_collecting_removes_them_but_for_those_of_who_is_at_work(
    s3: S3Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = Remote(s3)
    begun_upload(s3, "ab" * 32)
    begun_upload(s3, "cd" * 32)
    time.sleep(1.1)  # their age is told in whole seconds
    monkeypatch.setattr("llmopt.artifacts.remote.collect.STRAY_S", 0.0)
    with Remote(s3).writing(["ab" * 32], []):
        assert collect(remote, older_than_s=0).uploads == 1
    [left] = Wire.of(s3).uploads(f"{layout.BLOBS}/")
    assert any(child.text and child.text.endswith("ab" * 32) for child in left)


def test_an_upload_that_was_removed_meanwhile_is_begun_anew(
    large: tuple[Store, Manifest], proxy: Proxy, s3: S3Objects, fresh: Store
) -> None:
    from llmopt.artifacts.remote import transfer

    store, manifest = large
    removed: list[int] = []
    once = threading.RLock()

    other = S3Objects.open(s3.url)
    original = Wire.request

    def request(wire: Wire, method: str, key: str | None, query: dict[str, str], *rest: object, **more: object):  # type: ignore[no-untyped-def]
        with once:
            if wire.objects is s3 and "partNumber" in query and not removed:
                removed.append(abort_old(other, f"{layout.BLOBS}/", time.time() + 3600))
        return original(wire, method, key, query, *rest, **more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Wire, "request", request)
        transfer.push(store, manifest.id, Remote(s3))
    assert removed == [1]
    check_there(store, manifest, s3, fresh)


def test_of_a_file_that_is_no_blob_nothing_is_left(s3: S3Objects, tmp_path: Path) -> None:
    """Its parts could not be gone on with."""
    sender = s3.sender("model.safetensors", 2 * PART, "ab" * 32)
    sender.send(1, b"x" * PART)
    sender.give_up()
    assert list(Wire.of(s3).uploads("model")) == []


class TestCtrlCWhileAServerIsSilent:
    """Our side of it: one server will do."""

    @pytest.fixture
    def s3_server(self, rclone: Server) -> Server:
        return rclone

    @pytest.mark.parametrize(
        "where",
        [
            lambda request: "partNumber" in request.query,
            lambda request: "list-type" in request.query,
            lambda request: request.method == "HEAD",
            lambda request: True,
        ],
        ids=["a part", "a listing", "a look", "all"],
    )
    def test_ends_a_push(
        self,
        where: Callable[[Exchange], bool],
        large: tuple[Store, Manifest],
        begin: Begin,
        proxy: Proxy,
        s3: S3Objects,
    ) -> None:
        store, manifest = large
        rule = proxy.fail(match=where, with_=Hang(), times=None)
        process = begin("store", "push", manifest.id, s3.url, "--store", store.root)
        wait_for(lambda: rule.hits > 0, process)
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        code, said = finish(process, 30)
        assert (code, said) == (130, "error: interrupted; nothing half-written is left\n")
        assert time.monotonic() - begun < 6

    def test_ends_a_pull(
        self, large: tuple[Store, Manifest], begin: Begin, proxy: Proxy, s3: S3Objects, fresh: Store
    ) -> None:
        from llmopt.artifacts.remote import transfer

        store, manifest = large
        transfer.push(store, manifest.id, Remote(s3))
        rule = proxy.fail(match=lambda request: chunk(request) is not None, with_=Hang(), times=None)
        process = begin("store", "pull", manifest.id, s3.url, "--store", fresh.root)
        wait_for(lambda: rule.hits > 1, process)
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        code, said = finish(process, 30)
        assert (code, said) == (130, "error: interrupted; nothing half-written is left\n")
        assert time.monotonic() - begun < 6
