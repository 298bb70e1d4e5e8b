"""What servers differ in when a connection breaks: cuts, replies that are lost after the effect, bytes that change.

The result is right, and nothing that is not whole is ever to be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from servers import SLOW_DOWN, Answer, Cut, Exchange, Flip, LoseReply, Proxy, Server
from unit.artifacts.objects.matching import (
    MIB,
    a_begin,
    a_chunk,
    a_listing,
    a_manifest,
    a_part,
    a_range,
    a_small_put,
    an_end,
)

from llmopt.artifacts import Manifest, Store, layout
from llmopt.artifacts.objects.s3 import S3Objects
from llmopt.artifacts.remote import Remote, transfer
from llmopt.errors import CorruptError, LlmoptError

Contents = Callable[[Store, Manifest], dict[str, bytes]]


PASSING: dict[str, tuple[Callable[[Exchange], bool], Any, int]] = {
    "a part is cut": (a_part, Cut(after_request_bytes=2 * MIB), 2),
    "a small put is cut": (a_small_put, Cut(after_request_bytes=300), 2),
    "a put of a manifest is cut": (a_manifest, Cut(after_request_bytes=100), 2),
    "the reply to a small put is lost": (a_small_put, LoseReply(), 2),
    "the reply to a part is lost": (a_part, LoseReply(), 2),
    "the reply to the end of an upload is lost": (an_end, LoseReply(), 1),
    "the reply to the beginning of an upload is lost": (a_begin, LoseReply(), 1),
    "the reply to the manifest is lost": (a_manifest, LoseReply(), 1),
    "a listing is cut": (a_listing, Cut(after_response_bytes=10), 2),
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
    "a range is cut": (a_range, Cut(after_response_bytes=MIB), 2),
    "a byte within a large file is flipped": (a_chunk, Flip(response_byte=12 * MIB), 1),
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


def test_of_a_cut_part_that_part_is_sent_again_and_no_other(
    remote: Remote, large: tuple[Store, Manifest], proxy: Proxy
) -> None:
    store, manifest = large
    proxy.fail(match=a_part, with_=Cut(after_request_bytes=7 * MIB))
    transfer.push(store, manifest.id, remote)
    sent = sum(exchange.request_bytes for exchange in proxy.exchanges if a_part(exchange))
    [size] = [entry.size for entry in manifest.files if entry.size > 16 * MIB]
    assert size < sent <= size + 16 * MIB


def test_of_a_flipped_chunk_that_chunk_is_fetched_again_and_no_other(
    remote: Remote, large: tuple[Store, Manifest], fresh: Store, proxy: Proxy
) -> None:
    store, manifest = large
    transfer.push(store, manifest.id, remote)
    proxy.forget()
    proxy.fail(match=a_chunk, with_=Flip(response_byte=12 * MIB))
    said: list[str] = []
    transfer.pull(fresh, manifest.id, remote, lambda line, **more: said.append(line))
    received = sum(exchange.response_bytes for exchange in proxy.exchanges if a_range(exchange))
    assert received == sum(entry.size for entry in manifest.files) + 16 * MIB
    assert any("came damaged, and is fetched again" in line for line in said)


def test_a_chunk_that_was_cut_goes_on_where_it_was(
    remote: Remote, s3_server: Server, large: tuple[Store, Manifest], fresh: Store, proxy: Proxy
) -> None:
    if s3_server.name == "rclone":
        pytest.skip("its ranges are not streamed: it says that each is the whole")
    store, manifest = large
    transfer.push(store, manifest.id, remote)
    proxy.forget()
    rule = proxy.fail(match=a_chunk, with_=Cut(after_response_bytes=12 * MIB))
    transfer.pull(fresh, manifest.id, remote)
    received = sum(exchange.response_bytes for exchange in proxy.exchanges if a_range(exchange))
    assert rule.hits == 1
    assert received < sum(entry.size for entry in manifest.files) + 8 * MIB  # what had not been read is lost
    assert fresh.verify(manifest.id) == []


@pytest.mark.parametrize("what", ["a part", "a small put"])
def test_bytes_that_change_on_the_way_there_are_sent_again_or_found_later(
    what: str, remote: Remote, large: tuple[Store, Manifest], fresh: Store, proxy: Proxy, contents: Contents
) -> None:
    store, manifest = large
    match = {"a part": a_part, "a small put": a_small_put}[what]
    rule = proxy.fail(
        match=lambda request: match(request) and int(request.headers["content-length"]) > 400,  # not the empty file
        with_=Flip(request_byte=400),
    )
    transfer.push(store, manifest.id, remote)
    assert rule.hits == 1
    if proxy.upstream.name == "rclone":  # it compares nothing
        with pytest.raises(CorruptError, match="is damaged"):
            transfer.pull(fresh, manifest.id, remote)
        assert not fresh.has(manifest.id)
        return
    transfer.pull(fresh, manifest.id, remote)
    assert contents(fresh, manifest) == contents(store, manifest)


class TestNames:
    @pytest.fixture
    def pushed(self, remote: Remote, small: tuple[Store, Manifest], proxy: Proxy) -> str:
        store, manifest = small
        transfer.push(store, manifest.id, remote)
        _ = remote.objects.swaps  # found out before anything breaks
        proxy.forget()
        return manifest.id

    @pytest.mark.parametrize("with_", [LoseReply(), Cut(after_request_bytes=10), SLOW_DOWN, Answer()])
    def test_a_move_succeeds_though(self, remote: Remote, pushed: str, proxy: Proxy, with_: Any) -> None:
        rule = proxy.fail(
            match=lambda request: request.method == "PUT" and f"/{layout.NAMES}/" in request.path, with_=with_
        )
        remote.set_name("best", pushed)
        assert rule.hits == 1
        assert remote.names() == {"best": pushed}

    def test_a_move_that_fails_leaves_the_name(self, remote: Remote, pushed: str, proxy: Proxy) -> None:
        remote.objects.write(layout.name("best"), f"sha256:{'0' * 64}\n".encode())
        proxy.fail(match=lambda request: request.method == "PUT", with_=SLOW_DOWN, times=None)
        with pytest.raises(LlmoptError, match="SlowDown"):
            remote.set_name("best", pushed)
        proxy.heal()
        assert remote.names() == {"best": f"sha256:{'0' * 64}"}


def test_deleting_what_a_lost_reply_has_deleted_is_no_error(s3: S3Objects, proxy: Proxy) -> None:
    s3.write("a", b"")
    rule = proxy.fail(match=lambda request: "delete" in request.query, with_=LoseReply())
    s3.delete(["a"])
    assert rule.hits == 1
    assert s3.find("a") is None
