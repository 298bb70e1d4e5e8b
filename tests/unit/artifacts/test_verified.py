"""A hit reads no stored file, and a file that may have changed is read again, whoever else works on the store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llmopt.artifacts import Action, Manifest, Store
from llmopt.artifacts import verified as verified_module
from llmopt.artifacts.verified import Verified
from llmopt.errors import CorruptError

Put = Callable[..., Manifest]
MakeAction = Callable[..., Action]

#: Prints how often a blob was opened while the code ran, and what the code left in `made`.
COUNT = """
import json, os, sys
from pathlib import Path
from llmopt.artifacts import Action, Store
opened, made = [], None
def hook(event, args):
    if event == "open" and "/blobs/" in str(args[0]):
        opened.append(str(args[0]))
root, rest = Path(sys.argv[1]), sys.argv[2:]
store = Store(root)
sys.addaudithook(hook)
{code}
print(json.dumps({{"opened": len(opened), "made": made}}))
"""
HIT = "found = store.find(rest[0]); store.path(found.id); made = found.id"
PUT = """
with store.stage() as folder:
    for number in range(5):
        (folder / str(number)).write_bytes(str(number).encode() * 1000)
    action = Action(op="x", op_version=1, inputs={}, settings={}, code="", deps={}, target={})
    store.put(folder, kind="model", action=action)
opened.clear()
made = action.key
"""
LINK = "store.path(store.find(made).id)"


def run(store: Store, code: str, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-c", COUNT.format(code=code), str(store.root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    return report["opened"], report["made"]


# -- what is not read


def test_the_first_hit_after_a_put_reads_no_blob(store: Store) -> None:
    _, key = run(store, PUT)
    assert run(store, "store.find(rest[0])", key)[0] == 0


def test_the_process_that_put_reads_no_blob_to_use_it(store: Store) -> None:
    opened, _ = run(store, PUT + LINK)
    assert opened == 0


def test_a_hit_after_another_process_put_and_linked_reads_no_blob(store: Store) -> None:
    _, key = run(store, PUT + LINK)
    assert run(store, HIT, key)[0] == 0


def test_a_hit_that_links_reads_no_blob_and_nor_does_the_next(store: Store) -> None:
    _, key = run(store, PUT)
    assert run(store, HIT, key)[0] == 0
    assert run(store, HIT, key)[0] == 0


def test_an_open_store_reads_no_blob_that_another_process_has_linked_meanwhile(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, key = run(store, PUT)
    assert store.find(key) is not None
    run(store, HIT, key)
    monkeypatch.setattr("llmopt.artifacts.blobs.sha256_file", lambda path: pytest.fail(f"{path} was read"))
    assert store.find(key) is not None


def test_links_that_others_make_cost_one_reading(store: Store, tmp_path: Path) -> None:
    _, key = run(store, PUT + LINK)
    blob = next(path for path in (store.root / "blobs").rglob("?" * 64))
    os.link(blob, tmp_path / "link")
    assert run(store, HIT, key)[0] == 1
    assert run(store, HIT, key)[0] == 0


def test_with_full_verification_a_hit_reads_every_blob(store: Store) -> None:
    _, key = run(store, PUT + LINK)
    assert run(store, "store = Store(root, verify_full=True)\n" + HIT, key)[0] == 5


def test_a_hit_on_a_disk_that_is_read_only_reads_no_blob(small_disk: Path, put: Put, make_action: MakeAction) -> None:
    store, action = Store(small_disk / "store"), make_action()
    store.path(put(action=action, into=store).id)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert run(store, HIT, action.key)[0] == 0


def test_putting_the_same_again_leaves_nothing_to_be_read(store: Store) -> None:
    run(store, PUT + LINK)
    _, key = run(store, PUT)
    assert run(store, HIT, key)[0] == 0


# -- what is read


def blob_of(store: Store, manifest: Manifest, path: str = "config.json") -> Path:
    return store.blobs.path(next(entry.sha256 for entry in manifest.files if entry.path == path))


def spoil(blob: Path) -> None:
    """Other bytes of the same length, under the same time of the last change."""
    times = blob.stat()
    blob.chmod(0o644)
    blob.write_bytes(b"x" * times.st_size)
    os.utime(blob, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("turn", range(30))
def test_a_change_right_after_the_put_is_found(put: Put, store: Store, turn: int) -> None:
    made = put({"config.json": str(turn).encode() * 100})
    spoil(blob_of(store, made))
    for reader in (store, Store(store.root)):
        with pytest.raises(CorruptError, match=r"config\.json"):
            reader.path(made.id)


def test_nothing_is_recorded_before_a_change_would_show(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "file"
    for _ in range(20):
        file.write_bytes(b"1")
        Verified(tmp_path / "log").record({"a" * 64: file.stat()})
        before = file.stat().st_ctime_ns
        file.write_bytes(b"2")
        assert file.stat().st_ctime_ns > before


def test_a_blob_replaced_by_another_file_is_read(store: Store, put: Put, tmp_path: Path) -> None:
    made = put()
    store.path(made.id)
    blob = blob_of(store, made)
    times = blob.stat()
    (tmp_path / "other").write_bytes(b"x" * times.st_size)
    os.utime(tmp_path / "other", ns=(times.st_atime_ns, times.st_mtime_ns))
    (tmp_path / "other").replace(blob)
    with pytest.raises(CorruptError, match=r"config\.json"):
        Store(store.root).path(made.id)


def coarse(file: Path, seconds_ago: float) -> os.stat_result:
    """The file as a disk shows it that counts whole seconds."""
    found, at_s = list(file.stat()), int(time.time() - seconds_ago)
    times = {"st_mtime_ns": at_s * 10**9, "st_ctime_ns": at_s * 10**9}
    return os.stat_result(found, times)


@pytest.mark.parametrize(("seconds_ago", "trusted"), [(0, False), (2, False), (5, True)])
def test_whole_seconds_are_trusted_once_they_are_over(tmp_path: Path, seconds_ago: float, trusted: bool) -> None:
    (tmp_path / "file").write_bytes(b"1")
    found = coarse(tmp_path / "file", seconds_ago)
    verified = Verified(tmp_path / "log")
    verified.record({"a" * 64: found})
    assert verified.holds("a" * 64, found) is trusted
    assert Verified(tmp_path / "log").holds("a" * 64, found) is trusted


def test_times_in_the_future_are_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"1")
    found = (tmp_path / "file").stat()
    monkeypatch.setattr(verified_module.time, "time_ns", lambda: found.st_ctime_ns - 10**9)
    verified = Verified(tmp_path / "log")
    verified.record({"a" * 64: found})
    assert not verified.holds("a" * 64, found)


def test_what_verify_found_damaged_is_read_before_it_is_used_though_it_looks_as_it_did(
    store: Store, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a disk fails: nothing about the file tells of it."""
    made = put()
    store.path(made.id)
    blob = blob_of(store, made)
    looks = blob.lstat()
    spoil(blob)
    real = Path.lstat
    monkeypatch.setattr(Path, "lstat", lambda path: looks if path == blob else real(path))
    assert Store(store.root).path(made.id)
    assert len(Store(store.root).verify(made.id)) == 1
    with pytest.raises(CorruptError, match=r"config\.json"):
        Store(store.root).path(made.id)


# -- the log

GARBAGE = [b"", b"\n", b"\0" * 5000, b"\xff\xfe\n" * 100, "² ² ² ² ²\n".encode(), b"a" * 64 + b" 1 2 3\n", b"x" * 10**6]


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("where", ["before", "after", "instead"])
def test_garbage_in_the_log_costs_at_most_a_reading(store: Store, where: str, garbage: bytes) -> None:
    _, key = run(store, PUT + LINK)
    log = store.root / "verified"
    good = log.read_bytes()
    log.write_bytes({"before": garbage + b"\n" + good, "after": good + garbage, "instead": garbage}[where])
    found = store.find(key)
    assert found is not None
    assert store.verify(found.id) == []
    assert run(store, HIT, key)[0] == 0


def test_a_log_cut_off_anywhere_costs_at_most_a_reading(store: Store, put: Put, make_action: MakeAction) -> None:
    action = make_action()
    made = put(action=action)
    log = store.root / "verified"
    good = log.read_bytes()
    for size in range(0, len(good), 7):
        log.write_bytes(good[:size])
        assert Store(store.root).find(action.key) == made
        spoil(blob := blob_of(store, made))
        with pytest.raises(CorruptError):
            Store(store.root).find(action.key)
        blob.write_bytes(b'{"model_type": "llama"}')


def test_a_line_that_is_being_written_is_read_when_it_is_whole(store: Store, put: Put) -> None:
    made = put()
    log = store.root / "verified"
    good = log.read_bytes()
    log.write_bytes(good[:-3])
    reader, entry = Verified(log), next(e for e in made.files if e.sha256.encode() in good.splitlines()[-1])
    found = store.blobs.path(entry.sha256).lstat()
    assert not reader.holds(entry.sha256, found)
    log.write_bytes(good)
    assert reader.holds(entry.sha256, found)


def test_a_log_written_anew_is_read_anew(store: Store, put: Put) -> None:
    made = put()
    reader, entry = Verified(store.root / "verified"), made.files[0]
    found = store.blobs.path(entry.sha256).lstat()
    assert reader.holds(entry.sha256, found)
    reader.forget(entry.sha256)
    for _ in range(50):
        Verified(store.root / "verified").record({"b" * 64: found})
    Store(store.root).blobs.compact()
    assert reader.holds(entry.sha256, found)


GROW = """
import sys
from pathlib import Path
from llmopt.artifacts import Store
store = Store(Path(sys.argv[1]))
artifact = store.ids()[0]
for _ in range(150):
    store.verify(artifact)
"""


def test_the_log_stays_small_however_many_processes_read(
    store: Store, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import llmopt.artifacts.verified as v; v._MOST_BYTES = 20_000\n" + GROW
    made = put({str(n): str(n).encode() for n in range(5)})
    workers = [subprocess.Popen([sys.executable, "-c", code, str(store.root)]) for _ in range(4)]
    assert [worker.wait() for worker in workers] == [0] * 4
    written = 4 * 150 * 5 * 100
    monkeypatch.setattr(verified_module, "_MOST_BYTES", 20_000)
    Store(store.root).path(made.id)
    size = (store.root / "verified").stat().st_size
    assert size < 60_000 < written
    assert Store(store.root).path(made.id).is_dir()
    assert [path.name for path in (store.root / "tmp").iterdir()] == []
