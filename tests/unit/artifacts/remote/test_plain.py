"""Artifacts and checkpoints as plain files below a prefix: written whole or not at all, and read as a folder is."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from servers import Answer, Proxy, Server
from servers.places import Place

from llmopt.artifacts import Action, Manifest, Store, canonical_json
from llmopt.artifacts.digest import describe
from llmopt.artifacts.manifest import MAX_MANIFEST_BYTES
from llmopt.artifacts.objects import PART_BYTES
from llmopt.artifacts.remote import plain
from llmopt.artifacts.remote.plain import Prefix
from llmopt.artifacts.remote.shared import open_store
from llmopt.errors import CorruptError, LlmoptError, SettingsError

Put = Callable[..., Manifest]
MakeAction = Callable[..., Action]

CHECKPOINT: Mapping[str, bytes] = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 40,
    "tokenizer.json": b"{}",
    "README.md": b"---\nlicense: gemma\n---\n",
    "LICENSE": b"MIT License",
}


@pytest.fixture
def proxy(rclone: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with Proxy(rclone) as between:
        between.server.set_in(monkeypatch)
        yield between


@pytest.fixture
def watched(proxy: Proxy, new_s3_place: Callable[[Server], Place]) -> Place:
    """A place behind the proxy; what a test does there itself does not pass it."""
    return replace(new_s3_place(proxy.server), server=proxy.upstream)


def upload(place: Place, files: Mapping[str, bytes] = CHECKPOINT) -> None:
    for name, data in files.items():
        place.write(name, data)


def read(store: Store, place: Place) -> str:
    return plain.read(store, Prefix.open(place.url))


def folder_of(tmp_path: Path, files: Mapping[str, bytes] = CHECKPOINT) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


# -- a checkpoint


def test_a_checkpoint_has_the_id_of_a_folder_with_the_same_files(s3_place: Place, store: Store, tmp_path: Path) -> None:
    upload(s3_place, {**CHECKPOINT, "weights.bin": b"x", ".hidden.json": b"{}", "below/config.json": b"{}"})
    found = read(store, s3_place)
    assert found == describe(folder_of(tmp_path), "model").id
    assert (store.path(found) / "model.safetensors").read_bytes() == CHECKPOINT["model.safetensors"]


def test_a_prefix_states_the_licences_that_a_folder_does(s3_place: Place, tmp_path: Path) -> None:
    from llmopt.artifacts import licenses

    upload(s3_place)
    assert Prefix.open(s3_place.url).licenses() == licenses.of_folder(folder_of(tmp_path)) != ()


def test_what_was_read_before_and_has_not_changed_is_not_fetched_again(
    watched: Place, proxy: Proxy, store: Store
) -> None:
    upload(watched)
    first = read(store, watched)
    proxy.forget()
    assert read(Store(store.root), watched) == first
    assert [method for method, path, _, _ in proxy.log() if path.endswith((".safetensors", ".json"))] == []
    assert proxy.count() == 1  # the listing


def test_what_has_changed_there_is_fetched_again(s3_place: Place, store: Store) -> None:
    upload(s3_place)
    first = read(store, s3_place)
    s3_place.write("tokenizer.json", b'{"a": 1}')
    second = read(store, s3_place)
    assert second != first
    assert (store.path(second) / "tokenizer.json").read_bytes() == b'{"a": 1}'


def test_what_is_damaged_on_this_disk_is_fetched_again(s3_place: Place, store: Store) -> None:
    upload(s3_place)
    found = read(store, s3_place)
    blob = store.blobs.path(hashlib.sha256(CHECKPOINT["model.safetensors"]).hexdigest())
    blob.chmod(0o644)
    blob.write_bytes(b"x")
    again = Store(store.root)
    assert read(again, s3_place) == found
    assert again.verify(found) == []


def test_a_read_that_was_cut_off_goes_on_with_the_files_that_it_lacks(
    watched: Place, proxy: Proxy, store: Store, tmp_path: Path
) -> None:
    upload(watched)
    last = lambda request: request.path.endswith("model.safetensors") and request.method == "GET"  # noqa: E731
    rule = proxy.fail(match=last, with_=Answer(status=403, code="AccessDenied"), times=None)
    with pytest.raises(LlmoptError):
        read(store, watched)
    assert rule.hits
    assert store.ids() == []
    proxy.heal()
    proxy.forget()
    assert read(store, watched) == describe(folder_of(tmp_path), "model").id
    fetched = {path.rpartition("/")[2] for method, path, _, _ in proxy.log() if method == "GET"}
    assert "model.safetensors" in fetched


def test_a_killed_read_is_gone_on_with(watched: Place, proxy: Proxy, store: Store, tmp_path: Path) -> None:
    big = {**CHECKPOINT, "model-2.safetensors": os.urandom(PART_BYTES + 1000)}
    upload(watched, big)
    code = (
        "import os, sys\n"
        "from llmopt.artifacts import Store; from llmopt.artifacts.remote import plain\n"
        "from llmopt.artifacts.remote.receiving import _Incoming\n"
        "_Incoming._chunk = lambda *a: os._exit(9)\n"
        "plain.read(Store.open(sys.argv[1]), plain.Prefix.open(sys.argv[2]))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(store.root), watched.url], timeout=60, check=False)
    assert ran.returncode == 9
    assert store.ids() == []
    proxy.forget()
    assert read(store, watched) == describe(folder_of(tmp_path, big), "model").id
    fetched = {path.rpartition("/")[2] for method, path, _, _ in proxy.log() if method == "GET"}
    assert fetched & set(big) == {"model-2.safetensors"}


def test_a_read_that_is_begun_again_after_a_change_begins_anew(
    watched: Place, proxy: Proxy, store: Store, tmp_path: Path
) -> None:
    upload(watched)
    slow = lambda request: request.path.endswith("model.safetensors")  # noqa: E731
    proxy.fail(match=slow, with_=Answer(status=403, code="AccessDenied"), times=None)
    with pytest.raises(LlmoptError):
        read(store, watched)
    proxy.heal()
    changed = {**CHECKPOINT, "config.json": b'{"model_type": "qwen3"}'}
    upload(watched, {"config.json": changed["config.json"]})
    assert read(store, watched) == describe(folder_of(tmp_path, changed), "model").id


def test_a_checkpoint_that_changes_while_it_is_read_is_refused(
    s3_place: Place, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(s3_place)
    receive = plain.receive

    def meanwhile(*args: Any, **more: Any) -> Any:
        found = receive(*args, **more)
        s3_place.write("config.json", b'{"model_type": "qwen3"}')
        return found

    monkeypatch.setattr(plain, "receive", meanwhile)
    with pytest.raises(LlmoptError, match="was changed while it was read"):
        read(store, s3_place)
    assert store.ids() == []


def test_a_checkpoint_is_no_part_of_a_store_on_s3(
    s3_place: Place, new_s3_place: Callable[[Server], Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies on S3 already, and stays in the cache."""
    assert s3_place.server is not None
    own = new_s3_place(s3_place.server)
    monkeypatch.setattr("llmopt.artifacts.remote.shared.cache_home", lambda: tmp_path / "machine")
    store = open_store(own.url)
    upload(s3_place)
    found = read(store, s3_place)
    assert store.path(found).is_dir()
    assert own.all() == []


def test_a_cache_that_is_full_lets_go_of_checkpoints_too(
    s3_place: Place, new_s3_place: Callable[[Server], Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert s3_place.server is not None
    own, other = new_s3_place(s3_place.server), new_s3_place(s3_place.server)
    monkeypatch.setattr("llmopt.artifacts.remote.shared.cache_home", lambda: tmp_path / "machine")
    upload(s3_place)
    upload(other, {**CHECKPOINT, "model.safetensors": b"other" * 4000})
    first = read(open_store(own.url, cache_bytes=25_000), s3_place)
    store = open_store(own.url, cache_bytes=25_000)
    second = read(store, other)
    assert (store.has(first), store.has(second)) == (False, True)
    assert read(store, s3_place) == first


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "nothing lies at"),
        ({"below/config.json": b"{}"}, "nothing lies at"),
        ({"model.safetensors": b"x"}, "no `config.json` lies at"),
        ({"config.json": b"{}"}, r"no `\*.safetensors` lies at"),
        ({"engine.json": b"{}", "model.xml": b""}, "has no `llmopt.json`"),
        ({"config.json": b"{}", "a.safetensors": b"", "A.safetensors": b""}, "are the same file where case"),
        ({"config.json": b"{}", "a\\b.safetensors": b"x"}, "is not a plain relative path"),
    ],
    ids=["nothing", "below", "no config", "no weights", "engine", "case", "backslash"],
)
def test_what_is_no_checkpoint_is_told(s3_place: Place, store: Store, files: dict[str, bytes], message: str) -> None:
    upload(s3_place, files)
    with pytest.raises(LlmoptError, match=message):
        read(store, s3_place)
    assert store.ids() == []


# -- an artifact


def test_what_is_written_is_read_again_as_the_same_artifact(
    s3_place: Place, store: Store, put: Put, make_action: MakeAction, tmp_path: Path
) -> None:
    made = put(action=make_action())
    moved = plain.write(store, made.id, s3_place.url)
    assert moved.bytes == made.size
    assert s3_place.all() == sorted(["llmopt.json", *(entry.path for entry in made.files)])
    assert s3_place.read("llmopt.json") == made.to_bytes()
    other = Store(tmp_path / "other")
    assert read(other, s3_place) == made.id
    assert other.find(make_action().key) == made
    assert other.verify(made.id) == []


def test_writing_it_again_moves_nothing(watched: Place, proxy: Proxy, store: Store, put: Put) -> None:
    made = put()
    plain.write(store, made.id, watched.url)
    proxy.forget()
    assert plain.write(store, made.id, watched.url).bytes == 0
    assert proxy.count("PUT", "POST", "DELETE") == 0


def test_reading_it_again_fetches_only_the_manifest(
    watched: Place, proxy: Proxy, store: Store, put: Put, tmp_path: Path
) -> None:
    made = put()
    plain.write(store, made.id, watched.url)
    other = Store(tmp_path / "other")
    read(other, watched)
    proxy.forget()
    assert read(Store(other.root), watched) == made.id
    objects = [path.rpartition("/")[2] for method, path, query, _ in proxy.log() if "list-type" not in query]
    assert objects == ["llmopt.json"]


def test_a_write_that_was_cut_off_goes_on_and_nobody_reads_half_of_it(
    watched: Place, proxy: Proxy, store: Store, put: Put, tmp_path: Path
) -> None:
    made = put({f"{n}.safetensors": bytes([n]) * 1000 for n in range(6)} | {"config.json": b"{}"})
    denied = Answer(status=403, code="AccessDenied")
    proxy.fail(match=lambda request: request.method == "PUT" and "3.safe" in request.path, with_=denied, times=None)
    with pytest.raises(LlmoptError):
        plain.write(store, made.id, watched.url)
    with pytest.raises(LlmoptError, match="is not complete: it is being written, or that was cut off"):
        read(Store(tmp_path / "other"), watched)
    plain.check_out(watched.url)
    proxy.heal()
    proxy.forget()
    plain.write(store, made.id, watched.url)
    assert proxy.sent_bytes("PUT") < made.size
    assert read(Store(tmp_path / "other"), watched) == made.id


def test_a_killed_write_goes_on_with_the_files_that_are_not_there(
    watched: Place, proxy: Proxy, store: Store, put: Put
) -> None:
    made = put({"a.safetensors": os.urandom(100_000), "b.safetensors": os.urandom(2 * PART_BYTES)})
    code = (
        "import os, sys\n"
        "from llmopt.artifacts import Store; from llmopt.artifacts.remote import plain\n"
        "from llmopt.artifacts.objects.multipart import Upload\n"
        "Upload.finish = lambda *a: os._exit(9)\n"
        "plain.write(Store.open(sys.argv[1]), *sys.argv[2:])\n"
    )
    command = [sys.executable, "-c", code, str(store.root), made.id, watched.url]
    assert subprocess.run(command, timeout=60, check=False).returncode == 9
    proxy.forget()
    plain.write(store, made.id, watched.url)
    assert 2 * PART_BYTES < proxy.sent_bytes("PUT") < 2 * PART_BYTES + 10_000
    for entry in made.files:
        assert watched.read(entry.path) == store.blobs.path(entry.sha256).read_bytes()


def test_what_another_artifact_had_begun_is_not_taken_for_ones_own(
    watched: Place, proxy: Proxy, store: Store, put: Put, tmp_path: Path
) -> None:
    """The same names and sizes, other bytes."""
    first = put({"config.json": b"{}", "a.safetensors": b"1" * 100, "b.safetensors": b"1", "only": b"1"})
    second = put({"config.json": b"{}", "a.safetensors": b"2" * 100, "b.safetensors": b"2"})
    denied = Answer(status=403, code="AccessDenied")
    proxy.fail(match=lambda request: request.method == "PUT" and "b.safe" in request.path, with_=denied, times=None)
    with pytest.raises(LlmoptError):
        plain.write(store, first.id, watched.url)
    proxy.heal()
    plain.write(store, second.id, watched.url)
    assert watched.all() == ["a.safetensors", "b.safetensors", "config.json", "llmopt.json"]
    assert read(Store(tmp_path / "other"), watched) == second.id


@pytest.mark.parametrize("files", [{"holiday.jpg": b"x"}, {"config.json": b"{}"}, {"deep/down": b"x"}], ids=str)
def test_a_prefix_with_something_else_is_refused(
    s3_place: Place, store: Store, put: Put, files: dict[str, bytes]
) -> None:
    upload(s3_place, files)
    for use in (lambda: plain.check_out(s3_place.url), lambda: plain.write(store, put().id, s3_place.url)):
        with pytest.raises(SettingsError, match="is not empty: it holds"):
            use()
    assert s3_place.all() == list(files)


def test_something_else_beside_an_artifact_is_refused(s3_place: Place, store: Store, put: Put) -> None:
    made = put()
    plain.write(store, made.id, s3_place.url)
    upload(s3_place, {"holiday.jpg": b"x"})
    with pytest.raises(SettingsError, match=r"it holds `holiday\.jpg`"):
        plain.write(store, made.id, s3_place.url)


def test_a_prefix_with_another_artifact_is_refused(s3_place: Place, store: Store, put: Put) -> None:
    plain.write(store, put({"a": b"1"}).id, s3_place.url)
    plain.check_out(s3_place.url)
    with pytest.raises(SettingsError, match="is not empty"):
        plain.check_out(s3_place.url, anew=True)
    with pytest.raises(SettingsError, match="holds another artifact"):
        plain.write(store, put({"a": b"2"}).id, s3_place.url)
    assert s3_place.read("a") == b"1"


def test_a_prefix_that_cannot_be_written_to_is_found_before_any_work(watched: Place, proxy: Proxy) -> None:
    denied = Answer(status=403, code="AccessDenied")
    proxy.fail(match=lambda request: request.method == "PUT", with_=denied, times=None)
    with pytest.raises(LlmoptError, match="does not allow writing"):
        plain.check_out(watched.url)


def test_an_empty_prefix_stays_empty_when_it_is_checked(s3_place: Place) -> None:
    plain.check_out(s3_place.url)
    assert s3_place.all() == []


def test_a_file_that_is_not_what_the_manifest_lists_is_refused(
    s3_place: Place, store: Store, put: Put, tmp_path: Path
) -> None:
    made = put()
    plain.write(store, made.id, s3_place.url)
    data = s3_place.read("model.safetensors")
    s3_place.write("model.safetensors", data[:-1] + b"\0")
    other = Store(tmp_path / "other")
    with pytest.raises(CorruptError, match=r"model.safetensors` is damaged"):
        read(other, s3_place)
    assert other.ids() == []


def test_a_file_that_the_manifest_lists_and_is_gone_is_told(
    s3_place: Place, store: Store, put: Put, tmp_path: Path
) -> None:
    made = put()
    plain.write(store, made.id, s3_place.url)
    s3_place.delete("model.safetensors")
    with pytest.raises(LlmoptError, match=r"model.safetensors` is missing"):
        read(Store(tmp_path / "other"), s3_place)


def listing(*paths: str) -> bytes:
    """A manifest, in canonical form, as someone else could have written it."""
    files = [{"path": path, "size": 1, "sha256": hashlib.sha256(b"x").hexdigest()} for path in paths]
    return canonical_json(
        {
            "schema": "llmopt.artifact/1",
            "kind": "model",
            "files": files,
            "action": None,
            "status": "complete",
            "events": [],
            "metrics": {},
        }
    )


@pytest.mark.parametrize(
    "data",
    [
        listing("../x"),
        listing("a/../../x"),
        listing("/tmp/x"),
        listing("a//b"),
        listing("C:x"),
        listing("a\\b"),
        listing("a\nb"),
        listing("llmopt.json"),
        listing("A", "a"),
        listing("a", "a"),
        listing("a", "a/b"),
        listing("x" * 300),
        listing("b", "a"),  # not sorted
        listing("a") + b" ",
        listing("a").replace(b'"size":1', b'"size":-1'),
        listing("a")[:-1] + b',"more":1}',
        b"[" * 100_000,
        b"\xff",
        b"",
        b" " * (MAX_MANIFEST_BYTES + 1),
    ],
    ids=lambda data: repr(data[105:125]) if len(data) < 1000 else str(len(data)),
)
def test_a_dishonest_manifest_is_refused_and_nothing_is_written(
    s3_place: Place, store: Store, tmp_path: Path, data: bytes
) -> None:
    upload(s3_place, {"llmopt.json": data, "a": b"x", "config.json": b"{}", "a.safetensors": b"x"})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CorruptError) as caught:
        read(store, s3_place)
    assert caught.value.code == 4
    assert f"{s3_place.url}/llmopt.json`: not a manifest" in caught.value.message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_manifest_of_a_later_version_is_told(s3_place: Place, store: Store) -> None:
    later = json.dumps({"schema": "llmopt.artifact/2"}).encode()
    upload(s3_place, {"llmopt.json": later})
    with pytest.raises(LlmoptError, match=r"has the schema `llmopt\.artifact/2`") as caught:
        read(store, s3_place)
    assert caught.value.hint == "upgrade llmopt"


def test_files_of_the_same_bytes_are_all_written_and_read(
    s3_place: Place, store: Store, put: Put, tmp_path: Path
) -> None:
    made = put({"a.json": b"{}", "b/c.json": b"{}", "empty": b""})
    plain.write(store, made.id, s3_place.url)
    other = Store(tmp_path / "other")
    assert read(other, s3_place) == made.id
    assert sorted(path.name for path in other.path(made.id).rglob("*")) == [
        "a.json",
        "b",
        "c.json",
        "empty",
        "llmopt.json",
    ]


def test_what_is_in_a_store_on_s3_only_can_be_written_elsewhere(
    s3_place: Place,
    new_s3_place: Callable[[Server], Place],
    put: Put,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert s3_place.server is not None
    own = new_s3_place(s3_place.server)
    monkeypatch.setattr("llmopt.artifacts.remote.shared.cache_home", lambda: tmp_path / "1")
    made = put(into=open_store(own.url))
    monkeypatch.setattr("llmopt.artifacts.remote.shared.cache_home", lambda: tmp_path / "2")
    plain.write(open_store(own.url), made.id, s3_place.url)
    assert s3_place.read("config.json") == b'{"model_type": "llama"}'


# -- a single file


def test_a_single_file_is_fetched_once_under_its_own_name(watched: Place, proxy: Proxy, store: Store) -> None:
    upload(watched, {"texts/calib.jsonl": b"{}\n", "texts/other.jsonl": b"[]\n"})
    url = f"{watched.url}/texts/calib.jsonl"
    file = plain.read_file(store, url)
    assert file is not None
    assert (file.name, file.read_bytes()) == ("calib.jsonl", b"{}\n")
    proxy.forget()
    assert plain.read_file(store, url) == file
    assert proxy.count("GET") == 0
    upload(watched, {"texts/calib.jsonl": b"{}\n{}\n"})
    again = plain.read_file(store, url)
    assert again is not None
    assert again.read_bytes() == b"{}\n{}\n"
    assert plain.read_file(store, f"{watched.url}/texts/none.jsonl") is None
