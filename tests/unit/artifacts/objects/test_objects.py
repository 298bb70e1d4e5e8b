"""Folders and S3 servers are the same to those who use them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from servers import Server

from llmopt.artifacts import Manifest, Store
from llmopt.artifacts.objects import PART_BYTES, GoneError, Objects, parts_of
from llmopt.artifacts.objects.disk import DiskObjects
from llmopt.artifacts.objects.s3 import S3Objects
from llmopt.artifacts.remote import Remote, transfer

ODD = [
    "a b",
    "a+b",
    "a%b",
    "a%20b",
    "a=b&c",
    "größe/日本.txt",
    "it's (1)~[2]{3}",
    'a"b<c>',
    "a:b@c!$,;",
    ".hidden",
    "a..b/c",
]


@pytest.fixture(params=["folder", "rclone", "ceph", "swift"])
def objects(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Objects:
    if request.param == "folder":
        return DiskObjects(tmp_path / "objects")
    server: Server = request.getfixturevalue(request.param)
    server.set_in(monkeypatch)
    return S3Objects.open(f"s3://{server.new_bucket()}/a prefix/store")


def keys(objects: Objects, prefix: str = "") -> list[str]:
    return [found.key for found in objects.list(prefix)]


def test_what_was_written_is_read(objects: Objects) -> None:
    objects.write("a/b", b"content")
    assert objects.read("a/b", most=100) == b"content"


def test_writing_replaces(objects: Objects) -> None:
    objects.write("a", b"first")
    objects.write("a", b"second")
    assert objects.read("a", most=100) == b"second"


def test_no_more_is_read_than_asked_for_and_one_byte(objects: Objects) -> None:
    objects.write("a", b"0123456789")
    assert objects.read("a", most=4) == b"01234"


def test_an_empty_object_is_one(objects: Objects) -> None:
    objects.write("a", b"")
    assert objects.read("a", most=10) == b""
    assert objects.find("a") is not None


@pytest.mark.parametrize("key", ["missing", "a/missing", "there/below", "a"])
def test_a_missing_object_is_none(objects: Objects, key: str) -> None:
    """Also where there is an object that would be its folder, or that is below it."""
    objects.write("there", b"content")
    objects.write("a/there", b"content")
    assert (objects.read(key, most=10), objects.read_tagged(key, most=10), objects.find(key)) == (None, None, None)


@pytest.mark.parametrize("key", ["missing", "a"])
def test_a_range_of_a_missing_object_is_an_error(objects: Objects, key: str) -> None:
    objects.write("a/there", b"content")
    with pytest.raises(GoneError):
        objects.read_range(key, 0, 5)


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [(0, 10, b"0123456789"), (2, 5, b"234"), (9, 10, b"9"), (5, 5, b""), (8, 20, b"89"), (10, 20, b""), (15, 20, b"")],
)
def test_a_range_is_those_bytes_as_far_as_there_are_any(
    objects: Objects, begin: int, end: int, expected: bytes
) -> None:
    objects.write("a", b"0123456789")
    assert bytes(objects.read_range("a", begin, end)) == expected


def test_a_key_in_which_a_number_looks_like_a_status_is_read(objects: Objects) -> None:
    with pytest.raises(GoneError):
        objects.read_range("blobs/sha256/41/4164040416", 0, 5)


def test_finds_size_and_time(objects: Objects) -> None:
    objects.write("a/b", b"content")
    found = objects.find("a/b")
    assert found is not None
    assert (found.key, found.size) == ("a/b", 7)
    assert abs(found.modified_s - time.time()) < 10


def test_swaps_the_version_it_was_told(objects: Objects) -> None:
    assert objects.swap("a", b"first", None)
    _, tag = objects.read_tagged("a", most=10) or (b"", None)
    assert objects.swap("a", b"second", tag)
    assert objects.read("a", most=10) == b"second"


def test_swaps_no_other_version_where_it_can_compare(objects: Objects) -> None:
    objects.swap("a", b"first", None)
    _, old = objects.read_tagged("a", most=10) or (b"", None)
    objects.write("a", b"second")
    swapped = [objects.swap("a", b"third", old), objects.swap("a", b"fourth", None)]
    assert swapped == ([False, False] if objects.swaps else [True, True])


def test_of_several_who_swap_one_wins_where_it_can_compare(objects: Objects) -> None:
    objects.write("a", b"first")
    _, tag = objects.read_tagged("a", most=10) or (b"", None)
    with ThreadPoolExecutor(8) as threads:
        won = sum(threads.map(lambda number: objects.swap("a", f"{number}".encode(), tag), range(8)))
    assert won == (1 if objects.swaps else 8)


def test_lists_in_the_order_of_keys(objects: Objects) -> None:
    for key in ("b/2", "a", "b/10", "b.txt", "c"):
        objects.write(key, b"")
    assert keys(objects) == ["a", "b.txt", "b/10", "b/2", "c"]


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [("b/", ["b/1", "b/2/3"]), ("b", ["b/1", "b/2/3", "bc"]), ("b/2", ["b/2/3"]), ("x", []), ("x/", []), ("b/1/", [])],
)
def test_lists_what_begins_so(objects: Objects, prefix: str, expected: list[str]) -> None:
    for key in ("a", "b/1", "b/2/3", "bc"):
        objects.write(key, b"content")
    assert keys(objects, prefix) == expected


def test_lists_nothing_where_nothing_is(objects: Objects) -> None:
    assert keys(objects) == []


def test_lists_more_than_one_answer_holds(objects: Objects) -> None:
    wanted = [f"many/{number:04}" for number in range(1100)]
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda key: objects.write(key, b""), wanted))
    assert keys(objects, "many/") == wanted


def test_lists_size_and_time(objects: Objects) -> None:
    objects.write("a", b"content")
    [found] = objects.list()
    assert found.size == 7
    assert abs(found.modified_s - time.time()) < 10


def test_deletes_those_that_are_there(objects: Objects) -> None:
    for key in ("a/1", "a/2", "b"):
        objects.write(key, b"content")
    objects.delete(["a/1", "missing", "b", "a/missing"])
    assert keys(objects) == ["a/2"]


def test_deletes_none(objects: Objects) -> None:
    objects.write("a", b"content")
    objects.delete([])
    assert keys(objects) == ["a"]


@pytest.mark.parametrize("key", ODD)
def test_keys_may_be_odd(objects: Objects, key: str) -> None:
    objects.write(key, b"content")
    assert keys(objects) == [key]
    assert objects.read(key, most=10) == b"content"
    assert bytes(objects.read_range(key, 1, 4)) == b"ont"
    assert (found := objects.find(key)) is not None
    assert found.key == key
    assert objects.read(f"{key}x", most=10) is None
    objects.delete([key])
    assert keys(objects) == []


@pytest.mark.parametrize("key", ["a b+c%20d", "größe/日本.txt"])
def test_a_large_file_of_an_odd_key_is_sent(objects: Objects, key: str) -> None:
    data = bytes(range(256)) * (PART_BYTES // 256) + b"more"
    sender = objects.sender(key, len(data), "0" * 64)
    for number, begin, end in reversed(list(sender.parts)):
        sender.send(number, data[begin:end])
    assert objects.find(key) is None
    sender.finish()
    assert bytes(objects.read_range(key, PART_BYTES - 2, PART_BYTES + 10)) == b"\xfe\xffmore"
    assert keys(objects) == [key]


def test_a_file_that_is_given_up_is_not_there(objects: Objects) -> None:
    sender = objects.sender("a", PART_BYTES + 1, "0" * 64)
    sender.send(1, bytes(PART_BYTES))
    sender.give_up()
    assert keys(objects) == []


def test_giving_up_twice_is_no_error(objects: Objects) -> None:
    sender = objects.sender("a", PART_BYTES + 1, "0" * 64)
    sender.give_up()
    sender.give_up()


def test_tells_the_time(objects: Objects) -> None:
    assert abs(objects.now() - time.time()) < 10
    assert keys(objects) == []


def test_parts_cover_the_file() -> None:
    for size in (1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES, 10_000 * PART_BYTES, 10_000 * PART_BYTES + 1):
        parts = parts_of(size)
        assert len(parts) <= 10_000
        assert [number for number, _, _ in parts] == list(range(1, len(parts) + 1))
        assert [begin for _, begin, _ in parts] == [0, *(end for _, _, end in parts[:-1])]
        assert parts[-1][2] == size


@pytest.fixture(params=["", "/", "/p", "/p/", "/p/q/"])
def url(request: pytest.FixtureRequest, s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    s3_server.set_in(monkeypatch)
    return f"s3://{s3_server.new_bucket()}{request.param}"


def test_any_prefix_will_do(url: str, s3_server: Server) -> None:
    objects = S3Objects.open(url)
    objects.write("a/b", b"content")
    assert keys(objects) == ["a/b"]
    assert keys(objects, "a/") == ["a/b"]
    path = url.removeprefix("s3:/").rstrip("/")
    assert s3_server.request("GET", f"{path}/a/b").body == b"content"


def test_the_folder_that_a_console_makes_is_no_object(s3: S3Objects, s3_server: Server, bucket: str) -> None:
    if s3_server.name == "rclone":
        pytest.skip("rclone makes a folder of it")
    assert s3_server.request("PUT", f"/{bucket}/store/").status == 200
    assert keys(s3) == []


def test_a_key_that_nobody_could_write_here_is_listed(s3: S3Objects, s3_server: Server, bucket: str) -> None:
    if s3_server.name == "rclone":
        pytest.skip("its keys are paths")
    assert s3_server.request("PUT", f"/{bucket}/store/a//b").status == 200
    assert keys(s3) == ["a//b"]


def test_a_store_on_s3_lies_as_on_disk(remote: Remote, large: tuple[Store, Manifest], tmp_path: Path) -> None:
    store, manifest = large
    folder = DiskObjects(tmp_path / "folder")
    transfer.push(store, manifest.id, remote)
    transfer.push(store, manifest.id, Remote(folder))
    assert list(_all(remote.objects)) == list(_all(folder))


def _all(objects: Objects) -> Iterator[tuple[str, int, bytes]]:
    for found in objects.list():
        data = objects.read(found.key, most=found.size)
        assert data is not None
        yield found.key, found.size, data
