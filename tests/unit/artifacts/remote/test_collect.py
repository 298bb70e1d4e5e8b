"""What nobody needs is removed, and nothing else, whoever writes meanwhile, in a folder and on S3."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from servers import Server
from servers.places import Place

from llmopt.artifacts import Action, FileEntry, Manifest, Store, layout
from llmopt.artifacts import remote as remote_module
from llmopt.artifacts.local import collect_local, evict
from llmopt.artifacts.objects.disk import DiskObjects
from llmopt.artifacts.remote import Lease, Remote, transfer
from llmopt.artifacts.remote import collect as collecting
from llmopt.artifacts.remote.collect import Collected, collect
from llmopt.errors import LlmoptError

Put = Callable[..., Manifest]
MakeAction = Callable[..., Action]
DAY_S = 24 * 3600.0


@pytest.fixture
def pushed(store: Store, put: Put, place: Place) -> Callable[..., Manifest]:
    """As `put`, and then there."""

    def push(files: dict[str, bytes], **about: Any) -> Manifest:
        made = put(files, **about)
        transfer.push(store, made.id, Remote.open(place.url))
        return made

    return push


def clean(place: Place, **how: Any) -> Collected:
    return collect(Remote.open(place.url), **{"older_than_s": 0, **how})


def assert_whole(place: Place, artifact: str, into: Path) -> None:
    fresh = Store(into / os.urandom(4).hex())
    transfer.pull(fresh, artifact, Remote.open(place.url))
    assert fresh.verify(artifact) == []


# -- mark


def test_what_is_named_stays_and_the_rest_goes_with_what_only_it_had(
    place: Place, pushed: Callable[..., Manifest], make_action: MakeAction, tmp_path: Path
) -> None:
    kept = pushed({"a": b"1", "both": b"2"}, action=make_action())
    gone = pushed({"both": b"2", "b": b"3"}, action=make_action(op_version=2), attestation=lambda made: {"of": made.id})
    Remote.open(place.url).set_name("best", kept.id)
    found = clean(place)
    assert (found.artifacts, found.blobs, found.bytes, found.kept) == ([gone.id], 1, 1, 1)
    assert not [key for key in place.all() if gone.hex in key]
    assert len(place.keys("blobs/")) == 2
    assert_whole(place, kept.id, tmp_path)
    assert Remote.open(place.url).results(make_action().key) == [kept.id]


def test_what_a_named_artifact_was_made_from_stays(
    place: Place, pushed: Callable[..., Manifest], make_action: MakeAction
) -> None:
    first = pushed({"a": b"1"})
    second = pushed({"a": b"2"}, action=make_action(inputs={"model": first.id}))
    third = pushed({"a": b"3"}, action=make_action(inputs={"model": second.id, "text": "sha256:" + "0" * 64}))
    Remote.open(place.url).set_name("best", third.id)
    assert clean(place).artifacts == []


def test_what_is_young_stays(place: Place, pushed: Callable[..., Manifest]) -> None:
    made = pushed({"a": b"1"})
    assert clean(place, older_than_s=60).artifacts == []
    assert clean(place).artifacts == [made.id]


def test_a_dry_run_says_what_would_go_and_changes_nothing(place: Place, pushed: Callable[..., Manifest]) -> None:
    made = pushed({"a": b"1"})
    before = place.all()
    found = clean(place, dry_run=True)
    assert (found.artifacts, found.blobs) == ([made.id], 1)
    assert place.all() == before
    assert clean(place).artifacts == [made.id]


@pytest.mark.parametrize("data", [b"rubbish", b"sha256:" + b"0" * 64 + b"\n"], ids=["no id", "nothing there"])
def test_a_damaged_name_stops_it_since_what_it_stood_for_is_not_known(
    place: Place, pushed: Callable[..., Manifest], data: bytes
) -> None:
    made = pushed({"a": b"1"})
    Remote.open(place.url).set_name("best", made.id)
    place.write("names/best", data)
    with pytest.raises(LlmoptError, match=r"nothing is removed.*`best`") as caught:
        clean(place)
    assert "store name" in str(caught.value.hint)
    Remote.open(place.url).set_name("best", made.id)
    assert clean(place).kept == 1


def test_an_artifact_whose_manifest_is_damaged_is_left_alone_and_told_of(
    place: Place, pushed: Callable[..., Manifest]
) -> None:
    damaged, gone = pushed({"a": b"1"}), pushed({"a": b"2"})
    place.write(layout.manifest(damaged.hex), b"{}")
    found = clean(place)
    assert (found.artifacts, found.damaged) == ([gone.id], 1)
    assert layout.blob(damaged.files[0].sha256) in place.all()


# -- strays


def test_a_blob_without_an_artifact_goes_after_a_day(
    place: Place, pushed: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pushed({"a": b"1"})
    Remote.open(place.url).set_name("best", made.id)
    stray = layout.blob("ab" * 32)
    place.write(stray, b"x")
    assert clean(place).blobs == 0
    monkeypatch.setattr(collecting, "STRAY_S", 0.0)
    assert clean(place).blobs == 1
    assert place.keys("blobs/") == [layout.blob(made.files[0].sha256)]


def test_what_is_said_of_an_artifact_that_is_gone_goes_after_a_day(
    place: Place, pushed: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch, make_action: MakeAction
) -> None:
    """A removal, or a writer, was killed."""
    made = pushed({"a": b"1"}, action=make_action(), attestation=lambda made: {"of": made.id})
    place.write(layout.chunks(made.hex), b"{}")
    place.delete(layout.manifest(made.hex))
    clean(place)
    assert len([key for key in place.all() if made.hex in key]) == 3
    monkeypatch.setattr(collecting, "STRAY_S", 0.0)
    clean(place)
    assert not [key for key in place.all() if made.hex in key]


def test_files_of_others_are_left_alone(
    place: Place, pushed: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pushed({"a": b"1"})
    monkeypatch.setattr(collecting, "STRAY_S", 0.0)
    foreign = [
        f"{folder}/{name}" for folder in ("blobs/sha256/zz", "actions", "chunks/sha256") for name in ("x", "y.json")
    ]
    for key in foreign:
        place.write(key, b"x")
    assert clean(place).artifacts == [made.id]
    assert set(foreign) <= set(place.all())


def test_parts_that_nobody_came_back_to_go_and_those_of_a_writer_at_work_stay(
    ceph: Server, s3_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ceph.set_in(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(s3_cache))
    remote = Remote.open(f"s3://{ceph.new_bucket()}/x")
    at_work, dead = "a" * 64, "b" * 64
    with remote.writing([at_work], ()):
        senders = [remote.objects.sender(layout.blob(sha256), 20 << 20, sha256) for sha256 in (at_work, dead)]
        for sender in senders:
            sender.send(1, b"x" * (16 << 20))
        assert collect(remote, older_than_s=0).uploads == 0
        monkeypatch.setattr(collecting, "STRAY_S", -5.0)
        assert collect(remote, older_than_s=0).uploads == 1
        senders[0].send(2, b"x" * (4 << 20))
        senders[0].finish()


# -- writers at work


def test_what_a_writer_at_work_needs_stays_though_it_sent_nothing_of_it(
    place: Place, store: Store, pushed: Callable[..., Manifest], tmp_path: Path, make_action: MakeAction
) -> None:
    """It found the manifest there, so there was nothing to send, and says that it is done."""
    base = pushed({"a": b"1"})
    made = pushed({"a": b"2"}, action=make_action(inputs={"model": base.id}))
    remote = Remote.open(place.url)
    real = remote.holds

    def slow(manifest: Manifest) -> bool:
        there = real(manifest)
        assert clean(place).artifacts == []
        return there

    remote.holds = slow  # type: ignore[method-assign]
    transfer.push(store, made.id, remote)
    assert_whole(place, made.id, tmp_path)


def test_a_blob_that_a_writer_at_work_found_there_stays(
    place: Place,
    store: Store,
    put: Put,
    pushed: Callable[..., Manifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pushed({"a": b"shared"})
    made = put({"a": b"shared", "b": b"own"})
    remote = Remote.open(place.url)
    real = remote.add

    def slow(key: str, data: bytes) -> None:
        if key.startswith("manifests/"):
            assert len(clean(place).artifacts) == 1
        real(key, data)

    monkeypatch.setattr(collecting, "STRAY_S", 0.0)
    remote.add = slow  # type: ignore[method-assign]
    transfer.push(store, made.id, remote)
    assert_whole(place, made.id, tmp_path)


def test_a_name_is_not_given_to_what_is_just_being_removed(place: Place, pushed: Callable[..., Manifest]) -> None:
    made = pushed({"a": b"1"})
    remote = Remote.open(place.url)
    real = remote.has

    def slow(artifact: str) -> bool:
        there = real(artifact)
        assert clean(place).artifacts == []
        return there

    remote.has = slow  # type: ignore[method-assign]
    remote.set_name("best", made.id)
    assert clean(place).kept == 1


def begin_push(store: Store, artifact: str, place: Place) -> tuple[threading.Thread, threading.Event]:
    """A push in a thread, and an event when it waits for a removal."""
    waits = threading.Event()

    def progress(line: str, **more: Any) -> None:
        if "waiting for `llmopt store gc`" in line:
            waits.set()

    thread = threading.Thread(target=transfer.push, args=(store, artifact, Remote.open(place.url), progress))
    thread.start()
    return thread, waits


def test_a_writer_waits_for_a_removal_at_work(
    place: Place, store: Store, put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "_LOOK_S", 0.05)
    made = put()
    with Remote.open(place.url).removing():
        thread, waits = begin_push(store, made.id, place)
        assert waits.wait(10)
        assert place.keys("blobs/") == []
    thread.join()
    assert_whole(place, made.id, tmp_path)


def test_a_writer_does_not_wait_for_a_removal_that_knows_of_it(
    place: Place, store: Store, put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that removals one after the other do not keep writers out for ever."""
    monkeypatch.setattr(remote_module, "_LOOK_S", 0.05)
    made, remote = put(), Remote.open(place.url)
    with remote.removing():
        thread, waits = begin_push(store, made.id, place)
        assert waits.wait(10)
        later = Lease(remote.objects, "remove", {})
    thread.join(20)
    assert not thread.is_alive()
    later.end()
    assert_whole(place, made.id, tmp_path)


def test_of_two_removals_the_second_is_refused_with_a_hint(place: Place) -> None:
    with Remote.open(place.url).removing(), pytest.raises(LlmoptError, match="another process is removing") as caught:
        clean(place)
    assert "5 min" in str(caught.value.hint)
    clean(place)


def test_the_lease_of_a_killed_removal_runs_out(
    place: Place, store: Store, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(remote_module.LEASE_S, "remove", 2.5)  # Swift counts whole seconds
    monkeypatch.setattr(remote_module, "_LOOK_S", 0.1)
    place.write("leases/remove-dead.json", b"{}")
    with pytest.raises(LlmoptError, match="another process is removing"):
        clean(place)
    transfer.push(store, put().id, Remote.open(place.url))
    assert len(clean(place).artifacts) == 1


def test_a_lease_is_kept_alive_as_long_as_its_process_works(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(remote_module.LEASE_S, "remove", 2.5)
    with Remote.open(place.url).removing():
        time.sleep(3)
        with pytest.raises(LlmoptError, match="another process is removing"):
            clean(place)


def test_a_writer_that_stood_still_for_too_long_publishes_nothing(
    place: Place, store: Store, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lease has run out, so what it found there may be gone."""
    made, remote = put(), Remote.open(place.url)
    real, clock_s = remote.objects.write, remote_module._clock_s

    def sleepy(key: str, data: bytes | memoryview) -> None:
        if key.startswith("blobs/"):
            monkeypatch.setattr(remote_module, "_clock_s", lambda: clock_s() + 3600)
        real(key, data)

    remote.objects.write = sleepy  # type: ignore[method-assign]
    with pytest.raises(LlmoptError, match="stood still for more than 48 minutes") as caught:
        transfer.push(store, made.id, remote)
    assert "again" in str(caught.value.hint)
    assert place.keys("manifests/") == []


def test_what_is_left_of_writers_that_were_killed_goes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("write-dead.json", "clock-dead", "probe-dead"):
        place.write(f"leases/{name}", b"{}")
    with suppress(LlmoptError):
        clean(place)
    monkeypatch.setattr(remote_module, "LEASE_S", {"write": -1.0, "remove": -1.0})
    monkeypatch.setattr(remote_module, "_MARGIN", -1e9)
    clean(place)
    assert not [key for key in place.keys("leases/") if "dead" in key]


def test_a_writer_whose_lease_cannot_be_read_stops_it(place: Place) -> None:
    place.write("leases/write-odd.json", b"{")
    with pytest.raises(LlmoptError, match=r"write-odd\.json` says cannot be read") as caught:
        clean(place)
    assert "try again later" in str(caught.value.hint)


@pytest.mark.parametrize("ahead_s", [-2 * DAY_S, 2 * DAY_S])
def test_the_clock_of_the_server_counts(
    s3_place: Place, store: Store, put: Put, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    made = put()
    transfer.push(store, made.id, Remote.open(s3_place.url))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + ahead_s)
    assert clean(s3_place, older_than_s=DAY_S).artifacts == []
    with Remote.open(s3_place.url).removing(), pytest.raises(LlmoptError, match="another process is removing"):
        clean(s3_place)
    assert clean(s3_place).artifacts == [made.id]


# -- a store on this disk

USER = """
import sys
from pathlib import Path
from llmopt.artifacts import Store
store = Store(Path(sys.argv[1]))
{code}
print(made, flush=True)
sys.stdin.read()
"""
USES = {
    "path": "made = store.ids()[0]; store.path(made)",
    "find": "made = store.find(store.root.joinpath('actions').iterdir().__next__().name).id",
    "put": """
with store.stage() as folder:
    (folder / "a").write_bytes(b"1")
    made = store.put(folder, kind="model").id
""",
}


@pytest.fixture
def user(store: Store) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """A process that uses the store until its stdin is closed."""
    begun: list[subprocess.Popen[str]] = []

    def begin(code: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", USER.format(code=code), str(store.root)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        begun.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("sha256:")
        return process

    yield begin
    for process in begun:
        process.kill()
        process.communicate()


@pytest.fixture
def other(tmp_path: Path) -> Store:
    """The same store as another process has it, which uses nothing of it."""
    return Store(tmp_path / "store")


def put_elsewhere(root: Path, files: dict[str, bytes], **about: Any) -> Manifest:
    """By an object that is gone at once, with its leases."""
    store = Store(root)
    with store.stage() as folder:
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return store.put(folder, **{"kind": "model", **about})


@pytest.mark.parametrize("use", list(USES))
def test_what_a_live_process_uses_stays_until_that_process_ends(
    other: Store, user: Callable[[str], subprocess.Popen[str]], use: str, make_action: MakeAction
) -> None:
    if use != "put":
        put_elsewhere(other.root, {"a": b"1"}, action=make_action())
    process = user(USES[use])
    assert collect_local(other, older_than_s=0).artifacts == []
    process.communicate()
    assert len(collect_local(other, older_than_s=0).artifacts) == 1
    assert list((other.root / "blobs").rglob("?" * 64)) == []


def test_what_was_used_lately_stays_though_it_is_old(other: Store) -> None:
    made = put_elsewhere(other.root, {"a": b"1"})
    os.utime(other.root / layout.manifest(made.hex), (0, 0))
    assert collect_local(other, older_than_s=DAY_S).artifacts == []
    os.utime(other.root / "leases" / made.hex, (0, 0))
    assert collect_local(other, older_than_s=DAY_S, dry_run=True).artifacts == [made.id]
    assert collect_local(other, older_than_s=DAY_S).artifacts == [made.id]


def test_asking_what_would_go_does_not_count_as_use(other: Store) -> None:
    made = put_elsewhere(other.root, {"a": b"1"})
    os.utime(other.root / layout.manifest(made.hex), (0, 0))
    other.leases.forget(made.hex)
    for _ in range(2):
        assert collect_local(other, older_than_s=DAY_S, dry_run=True).artifacts == [made.id]


def test_its_folder_its_lease_and_empty_folders_go_with_an_artifact(other: Store, make_action: MakeAction) -> None:
    made = put_elsewhere(
        other.root, {"a": b"1"}, action=make_action(), attestation=lambda made: {"subject": [{"name": made.id}]}
    )
    Store(other.root).path(made.id)
    collect_local(other, older_than_s=0)
    left = {path.relative_to(other.root).as_posix() for path in other.root.rglob("*") if path.is_file()}
    assert left <= {"verified", "leases/.writers", "leases/.gate"}
    assert [list((other.root / kind).iterdir()) for kind in ("actions", "attestations", "trees", "tmp")] == [[]] * 4
    assert (other.root / "verified").read_bytes() == b""


def test_what_a_killed_removal_left_of_an_artifact_goes(other: Store) -> None:
    made = put_elsewhere(other.root, {"a": b"1"})
    Store(other.root).path(made.id)
    (other.root / layout.manifest(made.hex)).unlink()
    collect_local(other, older_than_s=0)
    assert list((other.root / "trees").iterdir()) == []
    assert other.leases.digests() == []


def test_a_removal_makes_nobody_read_again(other: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its links go, which changes the times of what others have too."""
    kept = put_elsewhere(other.root, {"a": b"shared"})
    gone = put_elsewhere(other.root, {"a": b"shared", "b": b"2"})
    for made in (kept, gone):
        Store(other.root).path(made.id)
    other.set_name("best", kept.id)
    assert collect_local(other, older_than_s=0).artifacts == [gone.id]
    monkeypatch.setattr("llmopt.artifacts.blobs.sha256_file", lambda path: pytest.fail(f"{path} was read"))
    Store(other.root).path(kept.id)


def test_a_store_of_thousands_is_cleaned_with_few_open_files(other: Store) -> None:
    folder = other.root / layout.MANIFESTS
    folder.mkdir(parents=True)
    for number in range(1000):
        made = Manifest(kind="model", files=(FileEntry("a", 1, f"{number:064x}"),))
        (folder / f"{made.hex}.json").write_bytes(made.to_bytes())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, hard))
    try:
        assert len(collect_local(other, older_than_s=0).artifacts) == 1000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_folder_that_others_push_to_is_cleaned_by_their_leases(other: Store) -> None:
    made = put_elsewhere(other.root, {"a": b"1"})
    with Remote(DiskObjects(other.root)).writing((), [made.id]):
        assert collect_local(other, older_than_s=0).artifacts == []
    assert collect_local(other, older_than_s=0).artifacts == [made.id]


def test_a_store_with_files_of_others_is_cleaned(other: Store) -> None:
    made = put_elsewhere(other.root, {"a": b"1"})
    (other.root / "notes.txt").write_bytes(b"mine")
    assert collect_local(other, older_than_s=0).artifacts == [made.id]
    assert (other.root / "notes.txt").read_bytes() == b"mine"
    assert not (other.root / layout.MARKER).exists()


def test_what_an_early_end_left_goes_when_it_is_old(other: Store, make_action: MakeAction) -> None:
    key = make_action().key
    with suppress(RuntimeError), other.stage(key) as folder:
        (folder / "half").write_bytes(b"x")
        raise RuntimeError
    collect_local(other, older_than_s=60)
    assert (folder / "half").exists()
    collect_local(other, older_than_s=0)
    assert not folder.exists()


# -- a cache that has its limit


@pytest.fixture
def cached(other: Store, disk_place: Place) -> Callable[..., Manifest]:
    """An artifact of so many bytes, in the cache and in the store behind it."""

    def make(number: int, size: int, *, push: bool = True) -> Manifest:
        made = put_elsewhere(other.root, {"a": bytes([number]) * size})
        if push:
            transfer.push(Store(other.root), made.id, Remote.open(disk_place.url))
        os.utime(other.root / "leases" / made.hex, (number, number))
        os.utime(other.root / layout.manifest(made.hex), (number, number))
        return made

    return make


def test_what_was_used_longest_ago_leaves_a_full_cache(
    other: Store, disk_place: Place, cached: Callable[..., Manifest]
) -> None:
    made = [cached(number, 1000) for number in range(1, 6)]
    os.utime(other.root / "leases" / made[0].hex)
    found = evict(other, 3000, Remote.open(disk_place.url), keep=[made[4].hex])
    assert found.artifacts == sorted([made[1].id, made[2].id])
    assert sum(path.stat().st_size for path in (other.root / "blobs").rglob("?" * 64)) == 3000


def test_what_the_store_behind_it_lacks_stays(other: Store, disk_place: Place, cached: Callable[..., Manifest]) -> None:
    lacked, had = cached(1, 1000, push=False), cached(2, 1000)
    assert evict(other, 500, Remote.open(disk_place.url)).artifacts == [had.id]
    assert other.ids() == [lacked.id]


def test_what_is_in_use_or_has_just_come_stays(
    other: Store,
    disk_place: Place,
    cached: Callable[..., Manifest],
    user: Callable[[str], subprocess.Popen[str]],
) -> None:
    used = cached(1, 1000)
    user(USES["path"])
    new, old = cached(3, 1000), cached(2, 1000)
    assert evict(other, 0, Remote.open(disk_place.url), keep=[new.hex]).artifacts == [old.id]
    assert sorted(other.ids()) == sorted([used.id, new.id])


def test_a_process_that_makes_more_than_fits_keeps_what_it_has_looked_into(
    disk_place: Place, other: Store, put: Put
) -> None:
    made = []
    for number in range(4):
        made.append(put({"a": bytes([number]) * 1000}, into=other))
        transfer.push(other, made[-1].id, Remote.open(disk_place.url))
        if number == 0:
            other.path(made[0].id)
        evict(other, 2000, Remote.open(disk_place.url), keep=[made[-1].hex])
    assert sorted(other.ids()) == sorted([made[0].id, made[3].id])


def test_files_that_another_artifact_has_too_stay_and_free_nothing(other: Store, disk_place: Place) -> None:
    made = [put_elsewhere(other.root, {"a": b"x" * 1000, "b": bytes([n]) * 10}) for n in range(3)]
    for number, each in enumerate(made):
        transfer.push(Store(other.root), each.id, Remote.open(disk_place.url))
        os.utime(other.root / "leases" / each.hex, (number, number))
        os.utime(other.root / layout.manifest(each.hex), (number, number))
    assert evict(other, 1015, Remote.open(disk_place.url)).artifacts == sorted([made[0].id, made[1].id])
    assert other.verify(made[2].id) == []


def test_nothing_is_listed_as_long_as_there_is_room(
    other: Store, disk_place: Place, cached: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = Remote.open(disk_place.url)
    evict(other, 10_000, remote, keep=[cached(1, 1000).hex])
    more = cached(2, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(DiskObjects, "list", lambda *a: pytest.fail("the cache was listed"))
        evict(other, 10_000, remote, keep=[more.hex])
    assert evict(other, 1500, remote, keep=[more.hex]).bytes == 1000


@pytest.mark.parametrize("data", ["", "x y", "-5", "10 99999999999"])
def test_a_damaged_memory_of_the_size_is_made_anew(
    other: Store, disk_place: Place, cached: Callable[..., Manifest], data: str
) -> None:
    cached(1, 1000)
    (other.root / "size").write_text(data)
    evict(other, 10_000, Remote.open(disk_place.url))
    assert (other.root / "size").read_text().split()[0] == "1000"


def test_what_evict_tells_is_json(other: Store, disk_place: Place, cached: Callable[..., Manifest]) -> None:
    made = cached(1, 1000)
    assert json.loads(json.dumps(evict(other, 0, Remote.open(disk_place.url)).to_json()))["artifacts"] == [made.id]
