"""What is pushed comes back as it was, and nothing goes over the wire that is there already."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from servers import Exchange, Proxy

from llmopt.artifacts import Manifest, Store, attest, chunks, layout
from llmopt.artifacts.objects.s3 import S3Objects
from llmopt.artifacts.remote import Remote, transfer
from llmopt.artifacts.trust.keys import generate, read_private
from llmopt.artifacts.trust.signing import sign
from llmopt.errors import CorruptError

Contents = Callable[[Store, Manifest], dict[str, bytes]]
MIB = 1 << 20


def blobs(proxy: Proxy, *methods: str) -> list[Exchange]:
    """The requests about blobs that moved any bytes."""
    return [
        exchange
        for exchange in proxy.exchanges
        if f"/{layout.BLOBS}/" in exchange.path
        and exchange.method in methods
        and "uploads" not in exchange.query
        and (exchange.method != "POST" or "uploadId" not in exchange.query)
    ]


def sent(proxy: Proxy) -> int:
    return sum(exchange.request_bytes for exchange in blobs(proxy, "PUT", "POST"))


def received(proxy: Proxy) -> int:
    return sum(exchange.response_bytes for exchange in blobs(proxy, "GET"))


def size(manifest: Manifest) -> int:
    return sum(entry.size for entry in manifest.files)


def another(store: Store, manifest: Manifest, **more: bytes) -> Manifest:
    """With the same files and more."""
    with store.stage() as staged:
        for entry in manifest.files:
            (staged / entry.path).write_bytes(store.blobs.path(entry.sha256).read_bytes())
        for path, data in more.items():
            (staged / path).write_bytes(data)
        return store.put(staged, kind="model")


def attested(folder: Path) -> tuple[Store, Manifest]:
    store = Store(folder)
    with store.stage() as staged:
        (staged / "file").write_bytes(b"content")
        return store, store.put(
            staged, kind="model", attestation=lambda manifest: attest(manifest, started=1, finished=2)
        )


def test_comes_back_as_it_was(
    remote: Remote, large: tuple[Store, Manifest], fresh: Store, contents: Contents, proxy: Proxy
) -> None:
    store, manifest = large
    moved = transfer.push(store, manifest.id, remote)
    assert (moved.files, moved.bytes, sent(proxy)) == (4, size(manifest), size(manifest))
    moved = transfer.pull(fresh, manifest.id, remote)
    assert (moved.files, moved.bytes, received(proxy)) == (4, size(manifest), size(manifest))
    assert fresh.get(manifest.id).to_bytes() == manifest.to_bytes()
    assert contents(fresh, manifest) == contents(store, manifest)
    assert fresh.verify(manifest.id) == []


def test_a_second_push_sends_nothing(remote: Remote, large: tuple[Store, Manifest], proxy: Proxy) -> None:
    store, manifest = large
    transfer.push(store, manifest.id, remote)
    proxy.forget()
    moved = transfer.push(store, manifest.id, Remote(remote.objects))
    assert (moved.files, moved.bytes) == (0, 0)
    written = [exchange.path.rpartition("/")[2] for exchange in proxy.exchanges if exchange.request_bytes]
    assert all(name.startswith("write-") for name in written if name != remote.objects.url.split("/")[2]), written


def test_a_second_pull_fetches_nothing(
    remote: Remote, large: tuple[Store, Manifest], fresh: Store, proxy: Proxy
) -> None:
    store, manifest = large
    transfer.push(store, manifest.id, remote)
    transfer.pull(fresh, manifest.id, remote)
    proxy.forget()
    transfer.pull(fresh, manifest.id, remote)
    assert received(proxy) == 0


def test_only_what_is_not_there_is_sent_and_fetched(
    remote: Remote, large: tuple[Store, Manifest], fresh: Store, proxy: Proxy
) -> None:
    store, first = large
    second = another(store, first, new=b"new bytes")
    transfer.push(store, first.id, remote)
    transfer.pull(fresh, first.id, remote)
    proxy.forget()
    assert transfer.push(store, second.id, remote).bytes == 9
    assert sent(proxy) == 9
    assert transfer.pull(fresh, second.id, remote).bytes == 9
    assert received(proxy) == 9
    assert fresh.verify(second.id) == []


def test_a_file_twice_in_an_artifact_is_sent_once(remote: Remote, fresh: Store, proxy: Proxy) -> None:
    with fresh.stage() as staged:
        (staged / "a").write_bytes(b"content")
        (staged / "b").write_bytes(b"content")
        manifest = fresh.put(staged, kind="model")
    transfer.push(fresh, manifest.id, remote)
    assert sent(proxy) == 7


def test_what_was_cut_short_there_is_sent_again(remote: Remote, small: tuple[Store, Manifest], fresh: Store) -> None:
    """A server that keeps what came of a request that broke."""
    store, manifest = small
    for entry in manifest.files:
        remote.objects.write(layout.blob(entry.sha256), b"part")
    transfer.push(store, manifest.id, remote)
    transfer.pull(fresh, manifest.id, remote)
    assert fresh.verify(manifest.id) == []


def test_statements_and_envelopes_go_along(remote: Remote, fresh: Store, tmp_path: Path) -> None:
    store, manifest = attested(tmp_path / "store")
    generate(tmp_path / "key")
    store.attach(manifest.id, sign(attest(manifest, started=1, finished=2), read_private(tmp_path / "key")))
    transfer.push(store, manifest.id, remote)
    transfer.pull(fresh, manifest.id, remote)
    here, there = fresh.statements(manifest.id), store.statements(manifest.id)
    assert len(here) == len(there) == 2
    assert all(statement in there for statement in here)
    assert len(fresh.envelopes(manifest.id)) == 1


def test_a_statement_made_later_goes_with_the_next_push(remote: Remote, fresh: Store, tmp_path: Path) -> None:
    store, manifest = attested(tmp_path / "store")
    transfer.push(store, manifest.id, remote)
    transfer.pull(fresh, manifest.id, remote)
    later = attest(manifest, started=3, finished=4)
    store.attach(manifest.id, later)
    transfer.push(store, manifest.id, remote)
    transfer.pull(fresh, manifest.id, remote)
    assert later in fresh.statements(manifest.id)


def test_the_digests_of_chunks_go_along(remote: Remote, large: tuple[Store, Manifest], fresh: Store) -> None:
    store, manifest = large
    transfer.push(store, manifest.id, remote)
    transfer.pull(fresh, manifest.id, remote)
    assert fresh.chunks(manifest) == store.chunks(manifest) != {}


def test_digests_of_chunks_that_are_wrong_there_do_not_matter(
    remote: Remote, large: tuple[Store, Manifest], fresh: Store
) -> None:
    store, manifest = large
    transfer.push(store, manifest.id, remote)
    [(sha256, digests)] = store.chunks(manifest).items()
    remote.objects.write(layout.chunks(manifest.hex), chunks.to_bytes({sha256: ("0" * 32, *digests[1:])}))
    transfer.pull(fresh, manifest.id, remote)
    assert fresh.verify(manifest.id) == []
    assert fresh.chunks(manifest) == store.chunks(manifest)


def test_without_digests_of_chunks_it_comes_too(remote: Remote, large: tuple[Store, Manifest], fresh: Store) -> None:
    store, manifest = large
    transfer.push(store, manifest.id, remote)
    remote.objects.delete([layout.chunks(manifest.hex)])
    transfer.pull(fresh, manifest.id, remote)
    assert fresh.verify(manifest.id) == []
    assert fresh.chunks(manifest) == store.chunks(manifest)


def test_the_action_goes_along(
    remote: Remote, fresh: Store, tmp_path: Path, make_action: Callable[..., object]
) -> None:
    store = Store(tmp_path / "store")
    with store.stage() as staged:
        (staged / "file").write_bytes(b"content")
        manifest = store.put(staged, kind="model", action=make_action())
    assert manifest.action is not None
    transfer.push(store, manifest.id, remote)
    assert remote.results(manifest.action.key) == [manifest.id]
    transfer.pull(fresh, manifest.id, remote)
    found = fresh.find(manifest.action.key)
    assert found is not None
    assert found.id == manifest.id


def test_what_is_damaged_here_is_not_sent(remote: Remote, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with store.stage() as staged:
        (staged / "large").write_bytes(bytes(20 * MIB))
        manifest = store.put(staged, kind="model")
    [entry] = manifest.files
    blob = store.blobs.path(entry.sha256)
    blob.chmod(0o644)
    with blob.open("r+b") as file:
        file.seek(19 * MIB)
        file.write(b"x")
    with pytest.raises(CorruptError, match="is not sent"):
        transfer.push(Store(store.root), manifest.id, remote)
    assert remote.objects.find(layout.blob(entry.sha256)) is None
    assert not remote.has(manifest.id)


def test_nobody_sees_an_artifact_before_all_of_it_is_there(
    remote: Remote, large: tuple[Store, Manifest], proxy: Proxy
) -> None:
    store, manifest = large
    transfer.push(store, manifest.id, remote)
    done = [exchange.path for exchange in proxy.exchanges if exchange.method in ("PUT", "POST")]
    last_blob = max(number for number, path in enumerate(done) if f"/{layout.BLOBS}/" in path)
    first_manifest = min(number for number, path in enumerate(done) if f"/{layout.MANIFESTS}/" in path)
    assert last_blob < first_manifest


def test_no_lease_is_left(remote: Remote, small: tuple[Store, Manifest]) -> None:
    store, manifest = small
    transfer.push(store, manifest.id, remote)
    assert list(remote.objects.list(f"{layout.LEASES}/")) == []


def test_a_part_of_an_artifact_is_fetched(
    remote: Remote, large: tuple[Store, Manifest], tmp_path: Path, proxy: Proxy
) -> None:
    store, manifest = large
    transfer.push(store, manifest.id, remote)
    proxy.forget()
    transfer.pull_part(manifest.id, remote, tmp_path / "part", ["*.json"])
    assert [path.name for path in (tmp_path / "part").iterdir()] == ["config.json"]
    assert received(proxy) == 800


def test_a_first_push_asks_nothing_of_the_server_that_it_need_not_know(
    remote: Remote, small: tuple[Store, Manifest], proxy: Proxy
) -> None:
    store, manifest = small
    transfer.push(store, manifest.id, remote)
    assert not [exchange for exchange in proxy.exchanges if "probe-" in exchange.path]


def test_two_who_send_the_same_at_once_both_succeed(s3: S3Objects, large: tuple[Store, Manifest], fresh: Store) -> None:
    from concurrent.futures import ThreadPoolExecutor

    store, manifest = large
    with ThreadPoolExecutor(2) as threads:
        list(
            threads.map(
                lambda objects: transfer.push(store, manifest.id, Remote(objects)), [s3, S3Objects.open(s3.url)]
            )
        )
    transfer.pull(fresh, manifest.id, Remote(s3))
    assert fresh.verify(manifest.id) == []
