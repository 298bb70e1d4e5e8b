"""Many processes at one store, in a folder and on S3: no error, one result, and nothing that is told twice."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from servers import Server
from servers.places import Place, faults

from llmopt.artifacts import FileEntry, Manifest, Store, layout
from llmopt.artifacts.local import collect_local
from llmopt.artifacts.remote import Remote
from llmopt.artifacts.remote.collect import collect
from llmopt.artifacts.remote.shared import told_of_name

RACES = Path(__file__).with_name("races.py")


def begin(job: str, root: Path, url: str, count: int, turns: int) -> list[subprocess.Popen[str]]:
    root.mkdir(exist_ok=True)
    command = [sys.executable, RACES, job, root, url]
    workers = [
        subprocess.Popen([*command, str(number), str(turns)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for number in range(count)
    ]
    while len(list(root.glob(f"ready-{job}-*"))) < count and all(worker.poll() is None for worker in workers):
        time.sleep(0.01)
    return workers


def end(workers: list[subprocess.Popen[str]]) -> list[Any]:
    said = [worker.communicate() for worker in workers]
    assert [error for _, error in said if error] == []
    return [json.loads(output) for output, _ in said]


def at_once(job: str, root: Path, url: str, count: int, turns: int) -> list[Any]:
    workers = begin(job, root, url, count, turns)
    (root / "go").touch()
    return end(workers)


def assert_one_result(place: Place, ids: list[list[str]]) -> None:
    assert len({id_ for each in ids for id_ in each}) == 1
    assert faults(place) == []
    assert len(place.keys("manifests/")) == len(place.keys("actions/")) == 1
    assert len(place.keys("blobs/")) == 2
    assert [key for key in place.all() if key.startswith(("tmp/", "leases/write"))] == []


# -- the same, from many


def test_sixteen_processes_put_the_same_a_hundred_times_each(tmp_path: Path) -> None:
    ids = at_once("same", tmp_path, "-", 16, 100)
    assert_one_result(Place(url=str(tmp_path / "store")), ids)


def test_sixteen_processes_push_the_same_a_hundred_times_each(place: Place, tmp_path: Path) -> None:
    """On rclone's server and Swift, which are slow, fewer."""
    turns = 100 if place.server is None or place.server.name == "ceph" else 8
    ids = at_once("same", tmp_path / "work", place.url, 16, turns)
    assert_one_result(place, ids)


# -- names


def some_artifacts(place: Place, root: Path, count: int) -> list[str]:
    """Of a size of their own, whose manifests are there; what they list is not."""
    made = [Manifest(kind="model", files=(FileEntry("a", n, f"{n:064x}"),)) for n in range(count)]
    for each in made:
        place.write(layout.manifest(each.hex), each.to_bytes())
    root.mkdir(exist_ok=True)
    (root / "artifacts").write_text(json.dumps([each.id for each in made]))
    return [each.id for each in made]


def assert_one_chain(moves: list[tuple[str, str | None]], last: str | None) -> None:
    """Each move replaced what the one before it had set."""
    before = dict(moves)
    assert len(before) == len(moves)
    chain: list[str] = []
    while last is not None:
        chain.append(last)
        last = before[last]
    assert sorted(chain) == sorted(before)


def test_sixteen_processes_move_a_name_in_a_store_on_disk_in_one_chain(tmp_path: Path) -> None:
    some_artifacts(Place(url=str(tmp_path / "store")), tmp_path, 16 * 5)
    told = at_once("name", tmp_path, "-", 16, 5)
    assert_one_chain([tuple(move) for each in told for move in each], Store(tmp_path / "store").names()["best"])


def test_sixteen_processes_move_a_name_elsewhere_and_none_is_lost_unseen(place: Place, tmp_path: Path) -> None:
    """Where the server cannot compare, the last one wins, and a user is told so."""
    made = some_artifacts(place, tmp_path / "work", 16 * 4)
    told = at_once("name", tmp_path / "work", place.url, 16, 4)
    remote = Remote.open(place.url)
    last = remote.named("best")
    if remote.objects.swaps:
        assert_one_chain([tuple(move) for each in told for move in each], last)
        assert list(told_of_name(remote, "best", None)) == []
    else:
        assert last in made
        [warning] = told_of_name(remote, "best", None)
        assert "the last would win" in warning


def test_a_name_whose_answer_was_lost_is_told_what_it_replaced(ceph: Server, new_s3_place: Any, tmp_path: Path) -> None:
    place = new_s3_place(ceph)
    first, second = some_artifacts(place, tmp_path / "work", 2)
    remote = Remote.open(place.url)
    assert remote.set_name("best", first) is None
    real = remote.objects.swap

    def lost(key: str, data: bytes, tag: str | None) -> bool:
        assert real(key, data, tag)
        return real(key, data, tag)

    remote.objects.swap = lost  # type: ignore[method-assign]
    assert remote.set_name("best", second) == first


# -- beside a removal


def race_a_removal(root: Path, place: Place, url: str, writers: int, turns: int) -> dict[str, int]:
    cleaner = begin("clean", root, url, 1, 0)
    workers = begin("write", root, url, writers, turns)
    (root / "go").touch()
    try:
        end(workers)
    finally:
        (root / "stop").touch()
    [report] = end(cleaner)
    assert faults(place) == []
    found: dict[str, int] = report
    return found


def assert_only_what_is_named_is_left(place: Place, writers: int) -> None:
    assert faults(place) == []
    assert len(place.keys("names/")) == len(place.keys("manifests/")) == len(place.keys("actions/")) == 2 * writers
    assert len(place.keys("blobs/")) <= 2 * writers + 3
    assert place.keys("leases/write") == place.keys("leases/remove") == place.keys("tmp/") == []


def test_a_removal_in_a_store_on_disk_harms_no_writer(tmp_path: Path) -> None:
    place = Place(url=str(tmp_path / "store"))
    report = race_a_removal(tmp_path, place, "-", 4, 20)
    assert report["removed"] > 20
    collect_local(Store(tmp_path / "store"), older_than_s=0)
    assert_only_what_is_named_is_left(place, 4)


def test_a_removal_elsewhere_harms_no_writer(place: Place, tmp_path: Path) -> None:
    report = race_a_removal(tmp_path / "work", place, place.url, 3, 10)
    assert report["removed"] > 5
    collect(Remote.open(place.url), older_than_s=0)
    assert_only_what_is_named_is_left(place, 3)


@pytest.mark.bench
def test_a_removal_harms_no_writer_for_long(place: Place, tmp_path: Path) -> None:
    report = race_a_removal(tmp_path / "work", place, place.url, 6, 100)
    where = "disk" if place.server is None else place.server.name
    print(f"\n6 writers x 100 pushes to {where} beside gc --older-than 0s: {report}, no fault")
    collect(Remote.open(place.url), older_than_s=0)
    assert_only_what_is_named_is_left(place, 6)
