"""However a process ends, and however many work at once, what can be found is whole and the next one succeeds."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmopt.artifacts import Manifest, Store
from llmopt.errors import LlmoptError

Put = Callable[..., Manifest]
CRASH = Path(__file__).with_name("crash.py")


def crash(root: Path, kind: str, count: int, job: str = "put", every: int = 1) -> dict[str, Any]:
    command = [sys.executable, CRASH, root, kind, str(count), job, str(every)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("kind", ["kill", "interrupt", "full"])
def test_ended_before_any_change_of_the_disk_nothing_partial_is_found(tmp_path: Path, kind: str) -> None:
    report = crash(tmp_path / "store", kind, 300)
    assert report["last"] == 0, "every point up to the end of the job was tried"
    assert report["early"] >= 30
    assert report["left"] == []


@pytest.mark.slow
@pytest.mark.parametrize(("job", "every"), [("pull", 2), ("push", 3), ("gc", 4), ("evict", 4)])
def test_killed_before_a_change_of_the_disk_what_can_be_found_is_whole_and_nothing_is_left(
    tmp_path: Path, job: str, every: int
) -> None:
    report = crash(tmp_path / "store", "kill", 400, job, every)
    assert report["last"] == 0, "points up to the end of the job were tried"
    assert report["early"] >= 20
    assert report["left"] == []


@pytest.mark.bench
def test_killed_before_every_change_of_the_disk_what_can_be_found_is_whole_and_nothing_is_left(tmp_path: Path) -> None:
    points = {}
    for job in ("put", "pull", "push", "gc", "evict"):
        (tmp_path / job).mkdir()
        report = crash(tmp_path / job / "store", "kill", 400, job)
        assert (report["last"], report["left"]) == (0, [])
        points[job] = report["early"]
    print(f"\nkill -9 before each change of the disk, {sum(points.values())} in all, nothing partial: {points}")


def test_killed_at_random_times_nothing_partial_is_found(tmp_path: Path) -> None:
    report = crash(tmp_path / "store", "random", 40)
    assert report["early"] == 40
    assert report["left"] == []


START = """
import sys, time
from pathlib import Path
from llmopt.artifacts import Action, Store
root, number = Path(sys.argv[1]), sys.argv[2]
store = Store(root / "store")
(root / f"ready-{number}").touch()
while not (root / "go").exists():
    time.sleep(0.001)
"""
PUT = """
for turn in range(6):
    for own in ("all", number):
        with store.stage() as folder:
            (folder / "common").write_bytes(b"c" * 1000)
            (folder / "file").write_bytes(f"{turn} {own}".encode() * 1000)
            action = Action(op="x", op_version=turn, inputs={}, settings={"own": own}, code="", deps={}, target={})
            made = store.put(folder, kind="model", action=action)
        store.set_name(f"turn-{turn}", made.id)
        path = Store(store.root).path(made.id)
        assert (path / "file").read_bytes() == f"{turn} {own}".encode() * 1000
        assert Store(store.root).find(action.key).id == made.id
        assert not store.verify(made.id)
"""
PATH = """
for artifact in sorted(store.ids()):
    path = store.path(artifact)
    for entry in store.get(artifact).files:
        assert len((path / entry.path).read_bytes()) == entry.size
"""


def at_once(root: Path, code: str) -> list[str]:
    """Run the code in eight processes that start together; what each said on stderr."""
    command = [sys.executable, "-c", START + code, str(root)]
    workers = [subprocess.Popen([*command, str(n)], stderr=subprocess.PIPE, text=True) for n in range(8)]
    while len(list(root.glob("ready-*"))) < 8 and all(worker.poll() is None for worker in workers):
        time.sleep(0.01)
    (root / "go").touch()
    return [worker.communicate()[1] for worker in workers]


def test_eight_processes_put_the_same_and_different_artifacts_at_once(tmp_path: Path) -> None:
    assert at_once(tmp_path, PUT) == [""] * 8
    store = Store(tmp_path / "store")
    assert len(store.ids()) == 6 + 6 * 8
    assert all(store.verify(artifact) == [] for artifact in store.ids())
    assert all(len(store.results(folder.name)) == 1 for folder in (store.root / "actions").iterdir())
    assert len(list((store.root / "blobs").rglob("?" * 64))) == 1 + 6 + 6 * 8
    assert list((store.root / "tmp").iterdir()) == []


def test_eight_processes_make_the_folders_of_the_same_artifacts_at_once(tmp_path: Path, put: Put) -> None:
    store = Store(tmp_path / "store")
    for number in range(25):
        put({f"{part}/{number}": f"{part} {number}".encode() for part in "abcd"}, into=store)
    assert at_once(tmp_path, PATH) == [""] * 8
    assert all(store.verify(artifact) == [] for artifact in store.ids())
    assert list((store.root / "tmp").iterdir()) == []


# -- staging


def test_a_stage_is_empty_and_on_the_disk_of_the_store(store: Store) -> None:
    with store.stage() as folder:
        assert list(folder.iterdir()) == []
        assert folder.is_relative_to(store.root)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, GeneratorExit])
def test_a_stage_is_gone_however_its_work_ends(store: Store, error: type[BaseException]) -> None:
    def work(folder: Path) -> None:
        (folder / "deep" / "er").mkdir(parents=True)
        (folder / "deep" / "er" / "file").write_bytes(b"x")
        (folder / "deep" / "er" / "file").chmod(0)
        raise error

    with pytest.raises(error), store.stage() as folder:
        work(folder)
    assert list((store.root / "tmp").iterdir()) == []


@pytest.fixture
def other_stage(store: Store) -> Iterator[subprocess.Popen[str]]:
    """A process that stays within a stage, with a file in it, until it is ended."""
    code = (
        "import sys, time; from llmopt.artifacts import Store\n"
        "with Store.open(sys.argv[1]).stage() as folder:\n"
        "    (folder / 'file').write_bytes(b'x'); print(folder, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(store.root)], stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def test_the_stage_of_a_killed_process_is_removed_by_the_next_and_that_of_a_live_one_is_not(
    store: Store, other_stage: subprocess.Popen[str]
) -> None:
    assert other_stage.stdout is not None
    folder = Path(other_stage.stdout.readline().strip())
    with store.stage() as mine, store.stage():
        assert mine.is_dir()
        assert (folder / "file").is_file()
    other_stage.kill()
    other_stage.wait()
    assert (folder / "file").is_file()
    with store.stage():
        assert not folder.exists()
    assert list((store.root / "tmp").iterdir()) == []


def test_a_disk_without_locks_will_do(store: Store, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with store.stage() as first:
        put()
        assert first.is_dir()
    assert list((store.root / "tmp").iterdir()) == []


# -- disks that cannot be written to


def test_a_disk_that_fills_up_in_the_work_is_an_error_with_what_is_free(store: Store) -> None:
    with (
        pytest.raises(LlmoptError, match=r"too little space on the disk of the store .* free") as caught,
        store.stage(),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "--store" in str(caught.value.hint)


def test_other_errors_in_the_work_stay_what_they_are(store: Store) -> None:
    for error in (FileNotFoundError(errno.ENOENT, "no"), ValueError("no"), LlmoptError("no")):
        with pytest.raises(type(error)) as caught, store.stage():
            raise error
        assert caught.value is error


def test_a_disk_that_is_full_leaves_nothing(small_disk: Path, put: Put) -> None:
    store = Store(small_disk / "store")
    made = put({"a": os.urandom(1 << 20)}, into=store)
    with pytest.raises(LlmoptError, match="too little space"):
        put({"a": b"", "b": os.urandom(1 << 20), "c": os.urandom(3 << 20)}, into=store)
    assert store.ids() == [made.id]
    assert list((store.root / "tmp").iterdir()) == []
    assert Store(store.root).verify(made.id) == []
    put({"b": os.urandom(1 << 20)}, into=store)


def test_a_full_disk_is_known_also_by_the_error_of_a_library(small_disk: Path) -> None:
    numpy, safetensors = pytest.importorskip("numpy"), pytest.importorskip("safetensors.numpy")
    store = Store(small_disk / "store")
    with pytest.raises(LlmoptError, match="too little space"), store.stage() as folder:
        safetensors.save_file({"x": numpy.zeros(8 << 20, numpy.uint8)}, folder / "model.safetensors")
    assert list((store.root / "tmp").iterdir()) == []


def test_files_that_do_not_fit_are_named_by_their_size(
    small_disk: Path, store: Store, tmp_path: Path, put: Put
) -> None:
    made = put({"a": os.urandom(5 << 20)})
    with pytest.raises(LlmoptError, match=r"4.0 MiB free, 5.0 MiB needed"):
        store.export(made.id, small_disk / "out")
    assert list(small_disk.iterdir()) == []


def assert_not_writable(store: Store) -> None:
    with pytest.raises(LlmoptError, match=r"the store .* cannot be written") as caught, store.stage():
        pytest.fail("a stage was given")
    assert "--store" in str(caught.value.hint)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc")
def test_a_place_where_no_folder_can_be_made_is_an_error() -> None:
    assert_not_writable(Store.open("/proc/llmopt/store"))


def test_a_file_where_a_folder_of_the_store_should_be_is_an_error(store: Store) -> None:
    store.root.mkdir()
    (store.root / "tmp").write_bytes(b"")
    assert_not_writable(store)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_an_error(store: Store) -> None:
    store.root.mkdir(mode=0o555)
    assert_not_writable(store)


def test_a_disk_mounted_read_only_is_an_error(read_only_disk: Path) -> None:
    assert_not_writable(Store(read_only_disk / "store"))


def test_a_store_on_a_disk_turned_read_only_can_still_be_read(small_disk: Path, put: Put) -> None:
    store = Store(small_disk / "store")
    made = put(into=store)
    store.path(made.id)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    fresh = Store(store.root)
    assert (fresh.path(made.id) / "config.json").is_file()
    assert fresh.verify(made.id) == []
    assert_not_writable(fresh)
