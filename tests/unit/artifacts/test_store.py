"""What goes in comes out, under its id, its action and its names."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from llmopt.artifacts import Action, Manifest, Store
from llmopt.errors import LlmoptError, SettingsError

Put = Callable[..., Manifest]
MakeAction = Callable[..., Action]


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- files


def test_what_is_put_is_what_is_found(store: Store, put: Put, make_action: MakeAction) -> None:
    files = {"a": b"1", "b/c": b"22", "empty": b""}
    action = make_action()
    made = put(files, kind="engine", action=action, status="prepared", events=["x"], metrics={"kl": 0.25})
    again = Store(store.root)
    assert again.find(action.key) == made
    assert again.get(made.id) == made
    assert content(again.path(made.id)) == {**files, "llmopt.json": made.to_bytes()}
    assert (made.kind, made.status, made.events, made.metrics) == ("engine", "prepared", ("x",), {"kl": 0.25})


def test_the_same_content_has_the_same_id_whenever_and_wherever_it_is_put(put: Put, tmp_path: Path) -> None:
    here = put({"a": b"1", "b": b"2"})
    there = put({"b": b"2", "a": b"1"}, into=Store(tmp_path / "other"))
    assert here.id == there.id


def test_equal_files_are_stored_once(store: Store, put: Put) -> None:
    put({"a": b"same", "b": b"same"})
    put({"c": b"same"})
    assert len([p for p in (store.root / "blobs").rglob("*") if p.is_file()]) == 1


def test_stored_files_are_read_only(store: Store, put: Put) -> None:
    made = put()
    for file in [*(store.root / "blobs").rglob("*"), *(store.root / "manifests").rglob("*")]:
        assert file.is_dir() or file.stat().st_mode & 0o777 == 0o444
    assert (store.path(made.id) / "config.json").stat().st_mode & 0o222 == 0


def test_files_are_moved_and_not_copied(store: Store) -> None:
    with store.stage() as folder:
        (folder / "a").write_bytes(b"x" * 100)
        inode = (folder / "a").stat().st_ino
        made = store.put(folder, kind="model")
        assert list(folder.iterdir()) == []
    assert (store.path(made.id) / "a").stat().st_ino == inode


def test_a_staged_link_to_a_file_of_the_users_leaves_that_file_alone(store: Store, tmp_path: Path) -> None:
    own = tmp_path / "LICENSE"
    own.write_bytes(b"mine")
    own.chmod(0o644)
    with store.stage() as folder:
        os.link(own, folder / "LICENSE")
        made = store.put(folder, kind="model")
    own.write_bytes(b"changed")
    assert own.stat().st_mode & 0o777 == 0o644
    assert store.verify(made.id) == []


@pytest.mark.parametrize(
    "make", [lambda path: path.symlink_to("/etc/hostname"), lambda path: path.symlink_to("/etc"), os.mkfifo]
)
def test_a_staged_file_that_is_no_plain_file_is_refused(store: Store, make: Callable[[Path], None]) -> None:
    with store.stage() as folder:
        (folder / "a").write_bytes(b"")
        make(folder / "odd")
        with pytest.raises(LlmoptError, match="`odd` cannot be stored"):
            store.put(folder, kind="model")
    assert store.ids() == []


def test_nothing_staged_is_an_error(store: Store) -> None:
    with pytest.raises(LlmoptError, match="nothing to store"), store.stage() as folder:
        store.put(folder, kind="model")


def test_what_could_not_be_read_back_is_not_written(store: Store, put: Put) -> None:
    with pytest.raises(LlmoptError):
        put(kind="Not A Word")
    with pytest.raises(LlmoptError, match="nan"):
        put(metrics={"kl": float("nan")})
    assert store.ids() == []


def test_files_can_be_staged_on_another_disk(store: Store, small_disk: Path) -> None:
    (small_disk / "a").write_bytes(b"x")
    made = store.put(small_disk, kind="model")
    assert (store.path(made.id) / "a").read_bytes() == b"x"


def test_a_disk_without_links_gets_copies(store: Store, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    made = put()
    tree = store.path(made.id)
    assert (tree / "config.json").stat().st_nlink == 1
    assert store.verify(made.id) == []
    (tree / "config.json").chmod(0o644)
    (tree / "config.json").write_bytes(b"changed")
    assert store.verify(made.id) != []
    assert (store.path(made.id) / "config.json").read_bytes().startswith(b"{")


# -- actions


def test_an_action_that_was_never_done_has_no_result(store: Store, put: Put, make_action: MakeAction) -> None:
    put(action=make_action())
    assert store.find(make_action(op_version=2).key) is None
    assert store.results("0" * 64) == []


def test_different_results_of_one_action_are_all_kept_and_the_newest_is_found(
    store: Store, put: Put, make_action: MakeAction
) -> None:
    action = make_action()
    first, second = (put({"a": data}, action=action) for data in (b"1", b"2"))
    assert store.results(action.key) == [first.id, second.id]
    assert store.find(action.key) == second
    put({"a": b"1"}, action=action)
    assert store.results(action.key) == [second.id, first.id]


def test_the_stored_actions_of_an_operation_are_listed(store: Store, put: Put, make_action: MakeAction) -> None:
    ours = [make_action(settings={"bits": bits}) for bits in (3, 4)]
    for action in [*ours, make_action(op="compile.openvino")]:
        put(action=action)
        put({"other": b"result"}, action=action)
    assert {action.key for action in store.actions("quantize.gptq")} == {action.key for action in ours}
    assert list(store.actions("eval")) == []


def test_an_action_file_that_cannot_be_read_is_passed_over(store: Store, put: Put, make_action: MakeAction) -> None:
    action = make_action()
    made = put(action=action)
    file = store.root / "actions" / action.key / f"{made.hex}.json"
    file.chmod(0o644)
    file.write_bytes(b'{"action": {"op"')
    assert list(store.actions(action.op)) == []
    assert store.find(action.key) == made


@pytest.mark.parametrize("key", ["", "../names", "x" * 64, "A" * 64, "0" * 63])
def test_only_a_digest_is_a_key(store: Store, key: str) -> None:
    with pytest.raises(SettingsError):
        store.find(key)


# -- references


def test_an_artifact_goes_by_its_id_by_its_first_digits_and_by_its_name(store: Store, put: Put) -> None:
    made = put()
    store.set_name("demo-w4", made.id)
    for reference in (made.id, made.hex, made.hex[:8], f"sha256:{made.hex[:12]}", made.hex[:9].upper(), "demo-w4"):
        assert store.resolve(reference) == made.id


@pytest.mark.parametrize("reference", ["nothing", "demo/model", "./x", "/etc", "", "..", "s3://bucket/x", "0" * 64])
def test_a_reference_to_nothing_in_the_store_is_none(store: Store, put: Put, reference: str) -> None:
    put()
    assert store.resolve(reference) is None


@pytest.mark.parametrize("reference", ["sha256:", "sha256:abc", "sha256:xyzxyzxyz", "sha256:../../etc"])
def test_a_malformed_id_is_an_error(store: Store, reference: str) -> None:
    with pytest.raises(SettingsError, match="not an artifact's id"):
        store.resolve(reference)


def test_digits_that_fit_two_artifacts_are_an_error_that_lists_both(store: Store) -> None:
    folder = store.root / "manifests" / "sha256"
    folder.mkdir(parents=True)
    for last in "01":
        (folder / f"{'ab' * 31}a{last}.json").write_bytes(b"{}")
    with pytest.raises(SettingsError, match="fits 2 artifacts") as caught:
        store.resolve("abababab")
    assert all(f"sha256:{'ab' * 31}a{last}" in str(caught.value.hint) for last in "01")


def test_a_name_moves_to_another_artifact(store: Store, put: Put) -> None:
    first, second = put({"a": b"1"}), put({"a": b"2"})
    store.set_name("best", first.id)
    store.set_name("best", second.id)
    store.set_name("V1.0_x-y", first.id)
    assert store.names() == {"best": second.id, "V1.0_x-y": first.id}


@pytest.mark.parametrize("name", ["", ".", "..", "-x", "_x", "a/b", "a b", "a\n", "ä", "x" * 129, "sha256:x", "../x"])
def test_an_illegal_name_is_an_error(store: Store, put: Put, name: str) -> None:
    with pytest.raises(SettingsError, match="cannot be a name"):
        store.set_name(name, put().id)


@pytest.mark.parametrize("name", ["deadbeef", "0" * 64, "12345678", "CAFEBABE"])
def test_a_name_that_looks_like_a_digest_is_an_error(store: Store, put: Put, name: str) -> None:
    with pytest.raises(SettingsError, match="looks like a digest"):
        store.set_name(name, put().id)


def test_only_an_artifact_of_the_store_gets_a_name(store: Store) -> None:
    with pytest.raises(LlmoptError, match="no artifact"):
        store.set_name("best", "sha256:" + "0" * 64)
    assert store.names() == {}


def test_artifacts_are_listed_newest_first_with_the_time_of_their_first_put(store: Store, put: Put) -> None:
    made = [put({"a": bytes([n])}) for n in range(3)]
    before = {manifest.id: created for manifest, created in store.ls()}
    put({"a": bytes([0])})
    assert [manifest.id for manifest, _ in store.ls()] == [manifest.id for manifest in reversed(made)]
    assert {manifest.id: created for manifest, created in store.ls()} == before


def test_files_of_others_in_the_store_are_passed_over(store: Store, put: Put, write_files: Callable[..., None]) -> None:
    made = put()
    foreign: Mapping[str, bytes] = {
        f"{folder}/{name}": b"junk"
        for folder in ("manifests/sha256", "names", f"actions/{'0' * 64}", "tmp", "blobs/sha256/zz", ".")
        for name in (".DS_Store", "notes.txt", f"{'0' * 64}.json.bak")
    }
    write_files(store.root, foreign)
    assert [manifest.id for manifest, _ in store.ls()] == [made.id]
    assert store.names() == {}
    assert store.results("0" * 64) == []
    put({"a": b"next"})
    assert all((store.root / path).read_bytes() == b"junk" for path in foreign)


def test_a_store_that_is_not_there_is_empty_and_is_not_made_by_looking(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "none"))
    assert (store.ls(), store.names(), store.ids(), store.resolve("x")) == ([], {}, [], None)
    assert store.find("0" * 64) is None
    assert list(store.actions("x")) == []
    assert store.verify("sha256:" + "0" * 64) != []
    assert not store.root.exists()


# -- where it is


def test_the_store_is_where_the_flag_says_else_the_environment_else_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LLMOPT_STORE", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert Store.open().root == tmp_path / "home/.local/share/llmopt"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")  # not allowed by the XDG specification, so not heeded
    assert Store.open().root == tmp_path / "home/.local/share/llmopt"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert Store.open().root == tmp_path / "data/llmopt"
    monkeypatch.setenv("LLMOPT_STORE", str(tmp_path / "env"))
    assert Store.open().root == tmp_path / "env"
    assert Store.open(str(tmp_path / "flag")).root == tmp_path / "flag"


def test_a_store_can_be_a_file_url_or_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Store.open(f"file://{tmp_path}/a%20b").root == tmp_path / "a b"
    assert Store.open("here").root == tmp_path / "here"
    assert Store.open("~/there").root == tmp_path / "home/there"


@pytest.mark.parametrize("url", ["s3://bucket/prefix", "https://host/x", "file://host/x", "file://"])
def test_a_store_elsewhere_is_an_error_that_says_what_can_be_one(url: str) -> None:
    with pytest.raises(SettingsError, match="a store is a folder, `file:///FOLDER` or `s3://BUCKET/PREFIX`") as caught:
        Store.open(url)
    assert url in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("place", ["file", "file/store"])
def test_a_store_in_place_of_a_file_is_an_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SettingsError, match=r"file` is no folder"):
        Store.open(str(tmp_path / place))


def test_importing_it_loads_nothing_heavy() -> None:
    heavy = ["torch", "numpy", "transformers", "openvino", "yaml", "rich", "logging", "subprocess", "asyncio", "shutil"]
    code = f"import sys, llmopt.artifacts; print(sorted(set({heavy}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
