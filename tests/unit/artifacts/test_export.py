"""A copy for the user: all of it or nothing, and never over what is theirs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llmopt.artifacts import Manifest, Store, check_out, disk
from llmopt.errors import CorruptError, LlmoptError, SettingsError

Put = Callable[..., Manifest]


@pytest.fixture
def made(put: Put) -> Manifest:
    return put()


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    """Nothing yet, in a folder that has nothing else."""
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine" / "out"


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_copy_has_the_files_and_the_manifest_and_is_the_users_own(store: Store, made: Manifest, dest: Path) -> None:
    store.export(made.id, dest)
    assert names(dest) == {"config.json", "model.safetensors", "tokenizer/vocab.txt", "llmopt.json"}
    assert (dest / "llmopt.json").read_bytes() == made.to_bytes()
    (dest / "model.safetensors").write_bytes(b"changed")
    assert store.verify(made.id) == []
    assert [p.name for p in dest.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("before", ["absent", "empty", "folders missing", "link to an empty folder"])
def test_the_folder_may_be_absent_or_empty(store: Store, made: Manifest, dest: Path, before: str) -> None:
    if before == "empty":
        dest.mkdir()
    elif before == "folders missing":
        dest = dest / "a" / "b"
    elif before == "link to an empty folder":
        (dest.parent / "real").mkdir()
        dest.symlink_to("real")
    check_out(dest)
    store.export(made.id, dest)
    assert len(names(dest)) == 4


def test_exporting_the_same_again_does_nothing(store: Store, made: Manifest, dest: Path) -> None:
    store.export(made.id, dest)
    before = (dest / "config.json").stat()
    check_out(dest)
    store.export(made.id, dest)
    assert (dest / "config.json").stat() == before


@pytest.mark.parametrize("change", ["added", "changed", "missing", "another artifact"])
def test_what_is_not_exactly_this_artifact_is_not_touched(
    store: Store, put: Put, made: Manifest, dest: Path, change: str
) -> None:
    store.export(put({"a": b"other"}).id if change == "another artifact" else made.id, dest)
    if change == "added":
        (dest / "notes.md").write_bytes(b"mine")
    elif change == "changed":
        (dest / "config.json").write_bytes(b"mine")
    elif change == "missing":
        (dest / "config.json").unlink()
    before = {path: (dest / path).read_bytes() for path in names(dest)}
    check_out(dest)  # it is an export of something: only the work can tell of what
    with pytest.raises(SettingsError, match="is not empty, and not this artifact"):
        store.export(made.id, dest)
    assert {path: (dest / path).read_bytes() for path in names(dest)} == before


def test_a_folder_of_the_users_is_refused_before_the_work(store: Store, made: Manifest, dest: Path) -> None:
    dest.mkdir()
    (dest / "thesis.tex").write_bytes(b"years of work")
    for attempt in (lambda: check_out(dest), lambda: store.export(made.id, dest)):
        with pytest.raises(SettingsError, match="is not empty") as caught:
            attempt()
        assert caught.value.hint
    assert names(dest) == {"thesis.tex"}


@pytest.mark.parametrize("place", ["file", "file/out"])
def test_a_file_in_the_way_is_refused_before_the_work(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SettingsError, match="is not a folder, or lies under a file"):
        check_out(tmp_path / place)


def test_the_current_folder_is_not_replaced(dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dest.mkdir()
    monkeypatch.chdir(dest)
    with pytest.raises(SettingsError, match="cannot be replaced"):
        check_out(Path())


def test_a_disk_itself_is_not_replaced(small_disk: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be replaced"):
        check_out(small_disk)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc")
def test_a_place_that_cannot_be_written_is_found_before_the_work() -> None:
    with pytest.raises(LlmoptError, match="cannot be written") as caught:
        check_out(Path("/proc/llmopt/out"))
    assert "--out" in str(caught.value.hint)


def test_a_read_only_disk_is_found_before_the_work(read_only_disk: Path) -> None:
    with pytest.raises(LlmoptError, match=r"cannot be written: Read-only file system"):
        check_out(read_only_disk / "a" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_found_before_the_work(dest: Path) -> None:
    dest.parent.chmod(0o555)
    with pytest.raises(LlmoptError, match="cannot be written"):
        check_out(dest)


def test_checking_leaves_nothing_behind(dest: Path) -> None:
    check_out(dest / "deep" / "er")
    assert list(dest.parent.iterdir()) == []


def test_a_copy_that_comes_out_wrong_is_not_delivered(
    store: Store, made: Manifest, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = disk.copy_file

    def bad_disk(source: Path, target: Path) -> None:
        real(source, target)
        if target.name == "vocab.txt":
            target.write_bytes(b"A\nb\n")

    monkeypatch.setattr(disk, "copy_file", bad_disk)
    with pytest.raises(CorruptError, match="came out wrong"):
        store.export(made.id, dest)
    assert list(dest.parent.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_export_cut_short_leaves_nothing(
    store: Store, made: Manifest, dest: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    real, seen = disk.copy_file, []

    def stop(source: Path, target: Path) -> None:
        seen.append(target)
        if len(seen) == 3:
            raise error
        real(source, target)

    monkeypatch.setattr(disk, "copy_file", stop)
    with pytest.raises(error):
        store.export(made.id, dest)
    assert list(dest.parent.iterdir()) == []


def test_files_of_others_beside_an_export_stay(store: Store, made: Manifest, dest: Path) -> None:
    mine = [dest.parent / name for name in (".llmopt-.lock", ".llmopt-1.lock", ".llmopt-notes.lock", "x.lock")]
    for file in mine:
        file.write_bytes(b"mine")
    store.export(made.id, dest)
    assert all(file.read_bytes() == b"mine" for file in mine)


def test_an_artifact_that_is_not_there_is_an_error(store: Store, dest: Path) -> None:
    with pytest.raises(LlmoptError, match="no artifact"):
        store.export("sha256:" + "0" * 64, dest)
    assert not dest.exists()


def test_a_file_is_copied_whole_where_the_kernel_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "a").write_bytes(data)
    real, calls = os.copy_file_range, []

    def stops_halfway(source: int, target: int, count: int) -> int:
        calls.append(count)
        if len(calls) > 1:
            raise OSError(18, "Invalid cross-device link")
        return real(source, target, 1_000_000)

    monkeypatch.setattr(os, "copy_file_range", stops_halfway)
    disk.copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == data
