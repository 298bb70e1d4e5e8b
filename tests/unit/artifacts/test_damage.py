"""Bytes that are not those that were stored are found, named, never delivered, and made good by putting them again."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from llmopt.artifacts import Action, Manifest, Store, canonical_json, sha256_file
from llmopt.errors import CorruptError

Put = Callable[..., Manifest]
MakeAction = Callable[..., Action]


@pytest.fixture
def action(make_action: MakeAction) -> Action:
    return make_action()


@pytest.fixture
def made(put: Put, action: Action) -> Manifest:
    return put(action=action)


def blob(store: Store, manifest: Manifest, path: str) -> Path:
    sha256 = next(entry.sha256 for entry in manifest.files if entry.path == path)
    return store.root / "blobs" / "sha256" / sha256[:2] / sha256


def overwrite(file: Path, data: bytes) -> None:
    """Change a file in place, as a failing disk would: same inode, same times."""
    times = file.stat()
    file.chmod(0o644)
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    file.chmod(0o444)


def assert_found(store: Store, manifest: Manifest, action: Action, path: str, tmp_path: Path) -> None:
    """By every way to get at the artifact, from a process that has not seen it before."""
    for use in (
        lambda fresh: fresh.find(action.key),
        lambda fresh: fresh.path(manifest.id),
        lambda fresh: fresh.export(manifest.id, tmp_path / "out"),
    ):
        with pytest.raises(CorruptError) as caught:
            use(Store(store.root))
        assert manifest.id in caught.value.message
        assert path in caught.value.message
        assert caught.value.code == 4
    assert [problem for problem in Store(store.root).verify(manifest.id) if path in problem]
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_anywhere_is_found_though_the_times_are_unchanged(
    store: Store, made: Manifest, action: Action, tmp_path: Path
) -> None:
    chance = random.Random(7)
    for _ in range(60):
        entry = chance.choice(made.files)
        file = blob(store, made, entry.path)
        good = file.read_bytes()
        bad = bytearray(good)
        bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
        overwrite(file, bytes(bad))
        assert_found(store, made, action, entry.path, tmp_path)
        overwrite(file, good)
        assert Store(store.root).find(action.key) == made
        assert Store(store.root).verify(made.id) == []


def test_a_flipped_bit_is_found_behind_a_folder_that_was_right(
    store: Store, made: Manifest, action: Action, tmp_path: Path
) -> None:
    file = store.path(made.id) / "model.safetensors"
    overwrite(file, b"\xff" + file.read_bytes()[1:])
    assert_found(store, made, action, "model.safetensors", tmp_path)


@pytest.mark.parametrize("size", [0, 1, 5000, 10239, 10241])
def test_a_file_cut_short_or_grown_is_found(
    store: Store, made: Manifest, action: Action, tmp_path: Path, size: int
) -> None:
    file = blob(store, made, "model.safetensors")
    overwrite(file, (file.read_bytes() + b"\0")[:size])
    assert_found(store, made, action, "model.safetensors", tmp_path)


def test_a_missing_file_is_found(store: Store, made: Manifest, action: Action, tmp_path: Path) -> None:
    blob(store, made, "tokenizer/vocab.txt").unlink()
    assert_found(store, made, action, "tokenizer/vocab.txt", tmp_path)


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_something_else_in_place_of_a_file_is_found(
    store: Store, made: Manifest, action: Action, tmp_path: Path, kind: str
) -> None:
    file = blob(store, made, "config.json")
    file.rename(tmp_path / "moved")
    {"folder": file.mkdir, "link": lambda: file.symlink_to(tmp_path / "moved"), "pipe": lambda: os.mkfifo(file)}[kind]()
    assert_found(store, made, action, "config.json", tmp_path)


def test_every_other_manifest_is_found_out(store: Store, made: Manifest, action: Action) -> None:
    file = store.root / "manifests" / "sha256" / f"{made.hex}.json"
    good = file.read_bytes()
    attack = canonical_json({"schema": "llmopt.artifact/1", "files": [{"path": "../../x"}]})
    for bad in (b"", good[:-1], good.replace(b"config", b"konfig"), good + b" ", attack, good.replace(b"1", b"2")):
        overwrite(file, bad)
        for use in (lambda s: s.get(made.id), lambda s: s.find(action.key), lambda s: s.path(made.id)):
            with pytest.raises(CorruptError, match=made.id):
                use(Store(store.root))
        assert len(Store(store.root).verify(made.id)) == 1
        assert store.ls() == []
        assert store.ids() == [made.id]


def test_a_manifest_that_is_gone_is_found_by_its_action(store: Store, made: Manifest, action: Action) -> None:
    (store.root / "manifests" / "sha256" / f"{made.hex}.json").unlink()
    with pytest.raises(CorruptError, match=r"manifest of .* is missing"):
        store.find(action.key)


def test_a_result_put_under_another_action_is_found(
    store: Store, made: Manifest, action: Action, make_action: MakeAction
) -> None:
    other = make_action(settings={"bits": 3})
    (store.root / "actions" / action.key).rename(store.root / "actions" / other.key)
    with pytest.raises(CorruptError, match="no result of the action"):
        store.find(other.key)


def test_a_name_for_something_that_is_no_id_is_found(store: Store, made: Manifest) -> None:
    store.set_name("best", made.id)
    overwrite(store.root / "names" / "best", b"../../etc/passwd\n")
    with pytest.raises(CorruptError, match="`best`"):
        store.resolve("best")
    assert store.names() == {}


# -- the folder of an artifact


@pytest.mark.parametrize("path", ["config.json", "tokenizer/vocab.txt", "llmopt.json"])
def test_a_file_that_the_user_replaced_is_put_right(store: Store, made: Manifest, path: str) -> None:
    tree = store.path(made.id)
    good = (tree / path).read_bytes()
    (tree / path).unlink()
    (tree / path).write_bytes(b"mine")
    assert len(store.verify(made.id)) == 1
    assert (Store(store.root).path(made.id) / path).read_bytes() == good
    assert store.verify(made.id) == []


@pytest.mark.parametrize("change", ["delete", "add", "add folder", "link", "file to folder", "folder to file", "all"])
def test_whatever_was_done_to_the_folder_it_holds_the_artifact_again(
    store: Store, made: Manifest, tmp_path: Path, change: str
) -> None:
    tree = store.path(made.id)
    wanted = {p.relative_to(tree): p.read_bytes() for p in tree.rglob("*") if p.is_file()}
    config, vocab = tree / "config.json", tree / "tokenizer" / "vocab.txt"
    if change == "delete":
        config.unlink()
    elif change == "add":
        (tree / "chat_template.jinja").write_bytes(b"")
    elif change == "add folder":
        (tree / "cache" / "deep").mkdir(parents=True)
        (tree / "cache" / "deep" / "x").write_bytes(b"x")
    elif change == "link":
        config.rename(tmp_path / "config.json")
        config.symlink_to(tmp_path / "config.json")
    elif change == "file to folder":
        config.unlink()
        config.mkdir()
    elif change == "folder to file":
        vocab.unlink()
        vocab.parent.rmdir()
        vocab.parent.write_bytes(b"x")
    else:
        tree.rename(tmp_path / "tree")
        tree.symlink_to(tmp_path / "tree")
    assert store.verify(made.id) != []
    assert store.path(made.id) == tree
    assert {p.relative_to(tree): p.read_bytes() for p in tree.rglob("*") if p.is_file()} == wanted
    assert not any(p.is_symlink() for p in (tree, *tree.rglob("*")))
    assert store.verify(made.id) == []


def test_with_full_verification_a_file_is_read_once_in_a_process(
    store: Store, made: Manifest, action: Action, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def count(path: Path) -> str:
        read.append(path)
        return sha256_file(path)

    monkeypatch.setattr("llmopt.artifacts.blobs.sha256_file", count)
    fresh = Store(store.root, verify_full=True)
    fresh.find(action.key)
    assert len(read) == len(made.files)
    fresh.find(action.key)
    fresh.path(made.id)
    fresh.path(made.id)
    assert len(read) == len(made.files)
    fresh.verify(made.id)
    assert len(read) == 2 * len(made.files)


# -- healing


@pytest.mark.parametrize("damage", [b"", b"\0" * 10240, None])
def test_putting_the_same_again_heals(
    store: Store, put: Put, made: Manifest, action: Action, damage: bytes | None
) -> None:
    store.path(made.id)
    file = blob(store, made, "model.safetensors")
    if damage is None:
        file.unlink()
    else:
        overwrite(file, damage)
    assert put(action=action).id == made.id
    fresh = Store(store.root)
    assert fresh.find(action.key) == made
    assert (fresh.path(made.id) / "model.safetensors").read_bytes() == bytes(range(256)) * 40
    assert fresh.verify(made.id) == []


def test_putting_the_same_again_heals_its_manifest(store: Store, put: Put, made: Manifest, action: Action) -> None:
    overwrite(store.root / "manifests" / "sha256" / f"{made.hex}.json", b"{}")
    put(action=action)
    assert Store(store.root).find(action.key) == made


def test_a_newer_result_that_is_damaged_does_not_hide_the_one_made_again(
    store: Store, put: Put, action: Action
) -> None:
    put({"a": b"1"}, action=action)
    bad = put({"a": b"2"}, action=action)
    overwrite(blob(store, bad, "a"), b"3")
    with pytest.raises(CorruptError):
        Store(store.root).find(action.key)
    again = put({"a": b"1"}, action=action)
    assert Store(store.root).find(action.key) == again
