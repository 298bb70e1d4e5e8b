"""Servers that are busy, broken, slow or silent: a transfer comes to the right result or to a clear error, in bounded
time, and can be run again. Our side of it, so one server will do."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from servers import SLOW_DOWN, Answer, Cut, Exchange, Flip, Hang, Proxy, Server, Slow, Truncate
from unit.artifacts.objects.conftest import open_files
from unit.artifacts.objects.matching import (
    MIB,
    a_listing,
    a_look,
    a_manifest,
    a_part,
    a_range,
    a_small_put,
    an_end,
    anything,
)

from llmopt.artifacts import Manifest, Store, layout
from llmopt.artifacts.objects import retries
from llmopt.artifacts.objects.s3 import S3Objects
from llmopt.artifacts.remote import Remote, transfer
from llmopt.errors import CorruptError, Exit, LlmoptError

Contents = Callable[[Store, Manifest], dict[str, bytes]]


@pytest.fixture
def s3_server(rclone: Server) -> Server:
    return rclone


PASSING: dict[str, tuple[Callable[[Exchange], bool], Any, int]] = {
    "a part is busy": (a_part, SLOW_DOWN, 5),
    "a small put is busy": (a_small_put, SLOW_DOWN, 5),
    "a part is an internal error": (a_part, Answer(), 5),
    "all is busy": (anything, SLOW_DOWN, 7),
    "all is an internal error": (anything, Answer(), 7),
    "a gateway is gone": (anything, Answer(status=502, code="BadGateway"), 7),
    "a look is cut": (a_look, Cut(after_response_bytes=0), 3),
    "a listing is truncated": (a_listing, Truncate(after_response_bytes=30), 2),
    "the end of an upload is busy": (an_end, SLOW_DOWN, 3),
    "deleting is busy": (lambda request: "delete" in request.query or request.method == "DELETE", SLOW_DOWN, 3),
}


@pytest.mark.parametrize("fault", PASSING)
def test_a_push_goes_on_when(
    fault: str, remote: Remote, large: tuple[Store, Manifest], fresh: Store, proxy: Proxy, contents: Contents
) -> None:
    match, with_, times = PASSING[fault]
    store, manifest = large
    rule = proxy.fail(match=match, with_=with_, times=times)
    transfer.push(store, manifest.id, remote)
    assert rule.hits == times
    proxy.heal()
    transfer.pull(fresh, manifest.id, remote)
    assert contents(fresh, manifest) == contents(store, manifest)
    assert list(remote.objects.list(f"{layout.LEASES}/")) == []


PULL_PASSING: dict[str, tuple[Callable[[Exchange], bool], Any, int]] = {
    "a range is cut at its head": (a_range, Cut(after_response_bytes=0), 2),
    "a range is truncated": (a_range, Truncate(after_response_bytes=MIB), 2),
    "a small object is truncated": (
        lambda request: request.method == "GET" and f"/{layout.MANIFESTS}/" in request.path,
        Truncate(after_response_bytes=20),
        2,
    ),
    "ranges are busy": (a_range, SLOW_DOWN, 6),
    "ranges are internal errors": (a_range, Answer(), 6),
    "all is busy": (anything, SLOW_DOWN, 6),
    "a byte of a range is flipped": (a_range, Flip(response_byte=700), 2),
}


@pytest.mark.parametrize("fault", PULL_PASSING)
def test_a_pull_goes_on_when(
    fault: str, remote: Remote, large: tuple[Store, Manifest], fresh: Store, proxy: Proxy, contents: Contents
) -> None:
    match, with_, times = PULL_PASSING[fault]
    store, manifest = large
    transfer.push(store, manifest.id, remote)
    rule = proxy.fail(match=match, with_=with_, times=times)
    transfer.pull(fresh, manifest.id, remote)
    assert rule.hits == times
    assert contents(fresh, manifest) == contents(store, manifest)


FOR_GOOD: dict[str, tuple[Callable[[Exchange], bool], Any, str]] = {
    "parts are busy": (a_part, SLOW_DOWN, "kept answering 503 SlowDown"),
    "parts are internal errors": (a_part, Answer(), "kept answering 500 InternalError"),
    "small puts are busy": (a_small_put, SLOW_DOWN, "kept answering 503 SlowDown"),
    "parts are cut": (a_part, Cut(after_request_bytes=MIB), "keeps breaking"),
    "small puts are cut": (a_small_put, Cut(after_request_bytes=100), "keeps breaking"),
    "the end of the upload is an error": (an_end, Answer(), "kept answering 500 InternalError"),
    "all is busy": (anything, SLOW_DOWN, "kept answering 503 SlowDown"),
    "nothing is answered": (anything, Cut(after_request_bytes=0), "keeps breaking"),
    "the disk of the server is full": (
        a_part,
        Answer(status=507, code="InsufficientStorage", message="No space."),
        "answered 507 InsufficientStorage",
    ),
    "the quota is used up": (a_part, Answer(status=403, code="QuotaExceeded", message="Quota."), "is full"),
}


@pytest.mark.parametrize("fault", FOR_GOOD)
def test_a_push_ends_with_a_clear_error_when_for_good(
    fault: str, remote: Remote, large: tuple[Store, Manifest], fresh: Store, proxy: Proxy, contents: Contents
) -> None:
    match, with_, expected = FOR_GOOD[fault]
    store, manifest = large
    proxy.fail(match=match, with_=with_, times=None)
    with pytest.raises(LlmoptError, match=expected) as caught:
        transfer.push(store, manifest.id, remote)
    assert caught.value.code == Exit.ERROR
    assert caught.value.hint
    proxy.heal()
    assert not Remote(remote.objects).has(manifest.id)
    assert remote.objects.find(layout.blob(max(manifest.files, key=lambda entry: entry.size).sha256)) is None
    transfer.push(store, manifest.id, Remote(S3Objects.open(remote.url)))
    transfer.pull(fresh, manifest.id, remote)
    assert contents(fresh, manifest) == contents(store, manifest)


PULL_FOR_GOOD: dict[str, tuple[Callable[[Exchange], bool], Any, str]] = {
    "ranges are busy": (a_range, SLOW_DOWN, "kept answering 503 SlowDown"),
    "ranges are cut": (a_range, Cut(after_response_bytes=300), "keeps breaking"),
    "ranges are truncated": (a_range, Truncate(after_response_bytes=300), "keeps breaking"),
    "an object is gone": (a_range, Answer(status=404, code="NoSuchKey"), "is missing"),
}


@pytest.mark.parametrize("fault", PULL_FOR_GOOD)
def test_a_pull_ends_with_a_clear_error_when_for_good(
    fault: str, remote: Remote, large: tuple[Store, Manifest], fresh: Store, proxy: Proxy, contents: Contents
) -> None:
    match, with_, expected = PULL_FOR_GOOD[fault]
    store, manifest = large
    transfer.push(store, manifest.id, remote)
    proxy.fail(match=match, with_=with_, times=None)
    with pytest.raises(LlmoptError, match=expected) as caught:
        transfer.pull(fresh, manifest.id, remote)
    assert caught.value.code == Exit.ERROR
    assert not fresh.has(manifest.id)
    proxy.heal()
    transfer.pull(fresh, manifest.id, remote)
    assert contents(fresh, manifest) == contents(store, manifest)


@pytest.mark.parametrize("place", [700, 12 * MIB])
def test_bytes_that_stay_wrong_are_not_taken(
    place: int, remote: Remote, large: tuple[Store, Manifest], fresh: Store, proxy: Proxy, contents: Contents
) -> None:
    store, manifest = large
    transfer.push(store, manifest.id, remote)
    proxy.fail(match=a_range, with_=Flip(response_byte=place), times=None)
    with pytest.raises(CorruptError, match="is damaged") as caught:
        transfer.pull(fresh, manifest.id, remote)
    assert caught.value.code == Exit.VERIFICATION_FAILED
    assert not fresh.has(manifest.id)
    assert not any(fresh.blobs.path(entry.sha256).exists() for entry in manifest.files)
    proxy.heal()
    transfer.pull(fresh, manifest.id, remote)
    assert contents(fresh, manifest) == contents(store, manifest)


def test_a_manifest_that_comes_wrong_is_not_taken(
    remote: Remote, small: tuple[Store, Manifest], fresh: Store, proxy: Proxy
) -> None:
    store, manifest = small
    transfer.push(store, manifest.id, remote)
    proxy.fail(match=lambda request: f"/{layout.MANIFESTS}/" in request.path, with_=Flip(response_byte=30), times=None)
    with pytest.raises(CorruptError, match="manifest"):
        transfer.pull(fresh, manifest.id, remote)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("match", "forward"),
    [(a_part, False), (a_small_put, False), (a_listing, False), (an_end, True), (a_manifest, True)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_silence_is_broken_off(
    match: Callable[[Exchange], bool], forward: bool, bucket: str, proxy: Proxy, large: tuple[Store, Manifest],
    fresh: Store, contents: Contents, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    proxy.server.set_in(monkeypatch)
    remote = Remote(S3Objects.open(f"s3://{bucket}/store"))
    store, manifest = large
    rule = proxy.fail(match=match, with_=Hang(forward=forward))
    transfer.push(store, manifest.id, remote)
    assert rule.hits == 1
    transfer.pull(fresh, manifest.id, remote)
    assert contents(fresh, manifest) == contents(store, manifest)


@pytest.mark.usefixtures("impatient")
def test_silence_for_good_is_a_clear_error(
    bucket: str, proxy: Proxy, small: tuple[Store, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.server.set_in(monkeypatch)
    monkeypatch.setattr(retries, "GIVE_UP_S", 2.0)
    store, manifest = small
    proxy.fail(match=a_small_put, with_=Hang(), times=None)
    begin = time.monotonic()
    with pytest.raises(LlmoptError, match="does not answer: it has been silent"):
        transfer.push(store, manifest.id, Remote(S3Objects.open(f"s3://{bucket}/store")))
    assert time.monotonic() - begin < 10


@pytest.mark.usefixtures("impatient")
def test_a_slow_line_is_no_error(
    bucket: str, proxy: Proxy, small: tuple[Store, Manifest], fresh: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.server.set_in(monkeypatch)
    remote = Remote(S3Objects.open(f"s3://{bucket}/store"))
    store, manifest = small
    slow = [
        proxy.fail(match=a_small_put, with_=Slow(request_bytes_per_s=100_000), times=2),
        proxy.fail(match=a_range, with_=Slow(response_bytes_per_s=100_000), times=2),
    ]
    transfer.push(store, manifest.id, remote)
    transfer.pull(fresh, manifest.id, remote)
    assert fresh.verify(manifest.id) == []
    assert [rule.hits for rule in slow] == [2, 2]


def test_nothing_stays_open_after_errors(
    bucket: str, proxy: Proxy, large: tuple[Store, Manifest], fresh: Store, s3: S3Objects
) -> None:
    store, manifest = large
    transfer.push(store, manifest.id, Remote(s3))
    before, threads = open_files(), threading.active_count()
    for match in (a_range, lambda request: a_range(request) and "bytes=1" in request.headers.get("range", "")):
        proxy.fail(match=match, with_=Answer(status=403, code="AccessDenied"), times=None)
        with pytest.raises(LlmoptError):
            transfer.pull(fresh, manifest.id, Remote(s3))
        proxy.heal()
    gc.collect()
    assert {name for name in open_files() - before if "socket:" not in name} == set()
    assert threading.active_count() <= threads + 30  # the proxy's connections
