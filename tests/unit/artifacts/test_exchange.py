"""What was made elsewhere comes in whole and verified, or not at all."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from llmopt.artifacts import Action, Manifest, Store, describe, exchange, oci
from llmopt.artifacts.digest import seal
from llmopt.artifacts.manifest import FileEntry
from llmopt.artifacts.oci import layers as oci_layers
from llmopt.errors import CorruptError, LlmoptError, SettingsError

Put = Callable[..., Manifest]
MakeAction = Callable[..., Action]
WriteFiles = Callable[[Path, Mapping[str, bytes]], None]

IMAGE = "application/vnd.oci.image.manifest.v1+json"
MODEL = "application/vnd.cncf.model.manifest.v1+json"
CONFIG = "application/vnd.cncf.model.config.v1+json"
CHECKPOINT = {"config.json": b"{}", "model.safetensors": bytes(9000), "tokenizer.json": b"[]"}
Pack = Callable[[bytes], bytes]
PACKED: dict[str, Pack] = {
    "tar": bytes,
    "tar+gzip": gzip.compress,
    "tar+zstd": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}


class Foreign:
    """A layout as another tool would make it, one step at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blobs = folder / "blobs" / "sha256"
        self.blobs.mkdir(parents=True)
        (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self.manifests: list[dict[str, Any]] = []

    def blob(self, data: bytes, media_type: str, **annotations: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (self.blobs / digest).write_bytes(data)
        described = {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}
        return described | ({"annotations": annotations} if annotations else {})

    def raw(self, path: str, data: bytes, kind: str = "weight") -> dict[str, Any]:
        return self.blob(data, f"application/vnd.cncf.model.{kind}.v1.raw", **{"org.cncf.model.filepath": path})

    def tar(self, *members: tarfile.TarInfo | tuple[str, bytes], pack: str = "tar") -> dict[str, Any]:
        return self.blob(PACKED[pack](tar(*members)), f"application/vnd.cncf.model.weight.v1.{pack}")

    def add(self, layers: Any, *, tag: str | None = None, **changes: Any) -> dict[str, Any]:
        manifest: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": IMAGE,
            "artifactType": MODEL,
            "config": self.blob(b'{"descriptor": {}}', CONFIG),
            "layers": layers,
        }
        return self.list(self.blob(json.dumps(manifest | changes).encode(), IMAGE), tag)

    def list(self, described: dict[str, Any], tag: str | None = None) -> dict[str, Any]:
        if tag is not None:
            described = described | {"annotations": {"org.opencontainers.image.ref.name": tag}}
        self.manifests.append(described)
        index = {"schemaVersion": 2, "manifests": self.manifests}
        (self.folder / "index.json").write_text(json.dumps(index))
        return described

    def checkpoint(self, files: Mapping[str, bytes] = CHECKPOINT) -> list[dict[str, Any]]:
        return [self.raw(path, data) for path, data in files.items()]


def tar(*members: tarfile.TarInfo | tuple[str, bytes]) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as archive:
        for member in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member[0])
            data = b"" if isinstance(member, tarfile.TarInfo) else member[1]
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return written.getvalue()


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.fixture
def foreign(tmp_path: Path) -> Foreign:
    return Foreign(tmp_path / "foreign")


@pytest.fixture
def refused(store: Store, foreign: Foreign, tmp_path: Path) -> Callable[..., LlmoptError]:
    """The error of an import, after which nothing is in the store or beside it."""

    def take(source: str | None = None, error: type[LlmoptError] = CorruptError, **how: Any) -> LlmoptError:
        before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(store.root)}
        with pytest.raises(error) as caught:
            exchange.take(store, source or str(foreign.folder), **how)
        assert caught.value.hint
        assert caught.value.code == (4 if error is CorruptError else caught.value.code)
        assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(store.root)} == before
        assert [path for path in store.root.rglob("*") if path.is_file()] == []
        return caught.value

    return take


def folder_of(tmp_path: Path, files: Mapping[str, bytes], write_files: WriteFiles) -> Path:
    write_files(tmp_path / "checkpoint", files)
    return tmp_path / "checkpoint"


# -- plain folders


def test_a_checkpoint_has_the_id_that_its_folder_has(store: Store, tmp_path: Path, write_files: WriteFiles) -> None:
    files = {**CHECKPOINT, "LICENSE": b"mine", "README.md": b"#", "original/x.safetensors": b"1", "a.pt": b"2"}
    folder = folder_of(tmp_path, files, write_files)
    taken = exchange.take(store, str(folder))
    assert taken.manifest == describe(folder, "model")
    assert taken.manifest.action is None
    assert taken.left_out == ("README.md", "a.pt", "original")
    assert store.verify(taken.manifest.id) == []
    assert [path.name for path in folder.iterdir() if path.stat().st_nlink > 1 and path.is_file()] == []


def test_a_checkpoint_of_links_into_a_cache_comes_in_as_files(store: Store, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(bytes(9))
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blob")
    manifest = exchange.take(store, str(tmp_path / "snapshot")).manifest
    assert manifest == describe(tmp_path / "snapshot", "model")
    assert store.read(manifest, "model.safetensors") == bytes(9)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.gguf"])
def test_weights_that_are_not_read_make_no_checkpoint(
    tmp_path: Path, write_files: WriteFiles, refused: Callable[..., LlmoptError], name: str
) -> None:
    folder = folder_of(tmp_path, {"config.json": b"{}", name: b"weights"}, write_files)
    assert name in refused(str(folder), LlmoptError).message


def test_an_exported_folder_comes_back_as_the_same_artifact(
    store: Store, put: Put, make_action: MakeAction, tmp_path: Path
) -> None:
    made = put(action=make_action(), events=("rounded to nearest",), metrics={"kl": 0.5}, status="prepared")
    store.export(made.id, tmp_path / "out")
    other = Store(tmp_path / "other")
    assert exchange.take(other, str(tmp_path / "out")) == exchange.Taken(made)
    assert other.find(make_action().key) == made


@pytest.mark.parametrize("change", ["changed", "missing", "added", "manifest"])
def test_an_exported_folder_that_was_changed_is_refused(
    put: Put, tmp_path: Path, refused: Callable[..., LlmoptError], change: str
) -> None:
    other = Store(tmp_path / "other")
    folder = tmp_path / "out"
    other.export(put(into=other).id, folder)
    if change == "changed":
        (folder / "tokenizer" / "vocab.txt").write_bytes(b"A\nb\n")
    elif change == "missing":
        (folder / "tokenizer" / "vocab.txt").unlink()
    elif change == "added":
        (folder / "generation_config.json").write_bytes(b"{}")
    else:
        (folder / "llmopt.json").write_bytes(b"{}")
    refused(str(folder))


def test_a_source_that_changes_while_it_is_imported_is_stored_as_it_was_copied(
    tmp_path: Path, write_files: WriteFiles, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest is that of the copy, so what is in the store is whole whatever the source has become."""
    folder = folder_of(tmp_path, CHECKPOINT, write_files)
    before = describe(folder, "model")

    def late(path: Path, name: str) -> tuple[FileEntry, tuple[str, ...]]:
        (folder / "model.safetensors").write_bytes(b"others")
        return seal(path, name)

    monkeypatch.setattr(exchange, "seal", late)
    taken = exchange.take(store, str(folder)).manifest
    assert store.verify(taken.id) == []
    assert {entry.path for entry in taken.files} == {entry.path for entry in before.files}


@pytest.mark.parametrize("source", ["nowhere", "nowhere:v1", ":v1", ""])
def test_a_source_that_is_not_there_is_an_error(
    refused: Callable[..., LlmoptError], tmp_path: Path, source: str
) -> None:
    refused(str(tmp_path / source) if source.startswith("nowhere") else source or f"{tmp_path}/x", LlmoptError)


def test_a_tag_is_of_a_layout(tmp_path: Path, write_files: WriteFiles, refused: Callable[..., LlmoptError]) -> None:
    folder = folder_of(tmp_path, CHECKPOINT, write_files)
    refused(f"{folder}:v1", SettingsError)
    refused(str(folder), SettingsError, digest="sha256:" + "0" * 64)


# -- layouts of other tools


def test_raw_layers_become_the_model_that_their_folder_is(
    store: Store, foreign: Foreign, tmp_path: Path, write_files: WriteFiles
) -> None:
    files = {**CHECKPOINT, "README.md": b"#", "original/consolidated.bin": b"1"}
    foreign.add(foreign.checkpoint(files))
    taken = exchange.take(store, str(foreign.folder))
    assert taken.manifest == describe(folder_of(tmp_path, files, write_files), "model")
    assert taken.left_out == ("README.md", "original/consolidated.bin")


@pytest.mark.parametrize("pack", PACKED)
def test_archives_are_unpacked(
    store: Store, foreign: Foreign, tmp_path: Path, write_files: WriteFiles, pack: str
) -> None:
    first, second, third = CHECKPOINT.items()
    members = (special("./", tarfile.DIRTYPE), (f"./{first[0]}", first[1]), special("empty", tarfile.DIRTYPE), second)
    foreign.add([foreign.tar(*members, pack=pack), foreign.raw(*third)])
    manifest = exchange.take(store, str(foreign.folder)).manifest
    assert manifest == describe(folder_of(tmp_path, CHECKPOINT, write_files), "model")
    assert store.verify(manifest.id) == []


@pytest.mark.parametrize("pack", PACKED)
def test_an_exported_folder_that_another_tool_packed_is_still_that_artifact(
    store: Store, put: Put, make_action: MakeAction, foreign: Foreign, tmp_path: Path, pack: str
) -> None:
    made = put(action=make_action())
    store.export(made.id, tmp_path / "out")
    files = [(p.relative_to(tmp_path / "out").as_posix(), p.read_bytes()) for p in (tmp_path / "out").rglob("*.*")]
    foreign.add([foreign.tar(*files, pack=pack)])
    assert exchange.take(Store(tmp_path / "other"), str(foreign.folder)).manifest == made


def test_one_of_several_is_chosen_by_tag_or_by_digest(
    store: Store, foreign: Foreign, refused: Callable[..., LlmoptError]
) -> None:
    foreign.add(foreign.checkpoint({"a.safetensors": b"a"}), tag="a")
    foreign.add(foreign.checkpoint({"b.safetensors": b"b"}), tag="b:1")
    third = foreign.add(foreign.checkpoint({"c.safetensors": b"c"}))
    hint = str(refused(error=SettingsError).hint)
    assert all(f"`{choice}`" in hint for choice in (":a", ":b:1", f"--digest {third['digest']}"))
    refused(f"{foreign.folder}:c", SettingsError)
    refused(error=SettingsError, digest="sha256:" + "0" * 64)
    names = [
        exchange.take(store, f"{foreign.folder}{tag}", digest=digest).manifest.files[0].path
        for tag, digest in ((":a", None), (":b:1", None), ("", third["digest"]))
    ]
    assert names == ["a.safetensors", "b.safetensors", "c.safetensors"]


def test_what_a_layout_says_cannot_write_to_the_terminal(foreign: Foreign, refused: Callable[..., LlmoptError]) -> None:
    for tag in ("\x1b[2J", "\x1b[0m"):
        foreign.add(foreign.checkpoint({f"{len(foreign.manifests)}.safetensors": b""}), tag=tag)
    for source in (str(foreign.folder), f"{foreign.folder}:c"):
        assert "\x1b" not in str(refused(source, SettingsError).hint)


def test_two_tags_of_one_manifest_need_no_choice(store: Store, foreign: Foreign) -> None:
    described = foreign.add(foreign.checkpoint(), tag="a")
    foreign.list(described, "b")
    assert exchange.take(store, str(foreign.folder)).manifest.kind == "model"


def test_what_is_about_the_model_is_not_the_model(store: Store, foreign: Foreign) -> None:
    described = foreign.add(foreign.checkpoint(), tag="a")
    foreign.add([foreign.blob(b"signature", "text/plain")], artifactType="text/plain", subject=described)
    assert exchange.take(store, str(foreign.folder)).attestations == 0


@pytest.mark.parametrize(
    "statement", [b"not JSON", b"{}", b"[]", b'{"_type": "https://in-toto.io/Statement/v1", "subject": [3]}', b'"x"']
)
def test_a_statement_about_something_else_is_not_kept(store: Store, foreign: Foreign, statement: bytes) -> None:
    described = foreign.add(foreign.checkpoint(), tag="a")
    in_toto = "application/vnd.in-toto+json"
    foreign.add([foreign.blob(statement, in_toto)], artifactType=in_toto, subject=described)
    taken = exchange.take(store, str(foreign.folder))
    assert taken.attestations == 0
    assert store.attestations(taken.manifest.id) == []


def test_a_container_image_is_not_a_model(foreign: Foreign, refused: Callable[..., LlmoptError]) -> None:
    config = foreign.blob(b"{}", "application/vnd.oci.image.config.v1+json")
    foreign.add(foreign.checkpoint(), config=config, artifactType=None)
    assert "is not a model" in refused(error=LlmoptError).message


def test_a_layer_of_an_unknown_kind_is_an_error(foreign: Foreign, refused: Callable[..., LlmoptError]) -> None:
    foreign.add([*foreign.checkpoint(), foreign.blob(b"1", "application/vnd.docker.image.rootfs.diff.tar")])
    assert "rootfs" in refused(error=LlmoptError).message


# -- layouts that are not whole, or not honest


OUTSIDE = ["../x.json", "/x.json", "a/../../x.json", "a//b", "C:x", "a\\b"]
#: What is in order in an archive (`tar -C FOLDER .` writes it), or cannot be written in one.
OUTSIDE_RAW = ["./x.json", "", "\0"]


@pytest.mark.parametrize("path", OUTSIDE + OUTSIDE_RAW)
def test_a_layer_whose_path_leads_out_of_the_folder_is_refused(
    foreign: Foreign, refused: Callable[..., LlmoptError], path: str
) -> None:
    foreign.add([*foreign.checkpoint(), foreign.raw(path, b"1")])
    refused()


@pytest.mark.parametrize("path", OUTSIDE)
def test_an_archive_with_a_path_out_of_the_folder_is_refused(
    foreign: Foreign, refused: Callable[..., LlmoptError], path: str
) -> None:
    foreign.add([*foreign.checkpoint(), foreign.tar((path, b"1"))])
    refused()


@pytest.mark.parametrize(
    "member",
    [
        special("config.json", tarfile.SYMTYPE, "/etc/passwd"),
        special("config.json", tarfile.LNKTYPE, "tokenizer.json"),
        special("config.json", tarfile.CHRTYPE),
        special("config.json", tarfile.BLKTYPE),
        special("config.json", tarfile.FIFOTYPE),
        special("../config", tarfile.DIRTYPE),
        special("/config", tarfile.DIRTYPE),
    ],
    ids=["symlink", "hard link", "character device", "block device", "pipe", "folder above", "absolute folder"],
)
def test_an_archive_has_plain_files_only(
    foreign: Foreign, refused: Callable[..., LlmoptError], member: tarfile.TarInfo
) -> None:
    foreign.add([*foreign.checkpoint({"model.safetensors": b"1"}), foreign.tar(member)])
    refused()


@pytest.mark.parametrize("again", ["config.json", "CONFIG.json", "config.json/x.json", "LLMOPT.json"])
@pytest.mark.parametrize("pack", ["raw", "tar", "one tar"])
def test_two_files_of_one_name_are_refused(
    foreign: Foreign, refused: Callable[..., LlmoptError], again: str, pack: str
) -> None:
    files = [("config.json", b"{}"), (again, b"2")]
    if pack == "one tar":
        layers = [foreign.tar(*files)]
    else:
        layers = [foreign.raw(*file) if pack == "raw" else foreign.tar(file) for file in files]
    foreign.add(layers)
    refused()


def test_two_manifests_of_ours_are_refused(foreign: Foreign, refused: Callable[..., LlmoptError]) -> None:
    foreign.add([*foreign.checkpoint(), foreign.raw("llmopt.json", b"{}"), foreign.raw("llmopt.json", b"[]")])
    refused()


@pytest.mark.parametrize("change", ["changed", "missing", "added", "no manifest"])
def test_layers_that_are_not_those_of_our_manifest_are_refused(
    put: Put, tmp_path: Path, foreign: Foreign, refused: Callable[..., LlmoptError], change: str
) -> None:
    made = put({"config.json": b"{}", "a": b"1"}, into=Store(tmp_path / "other"))
    files = {"config.json": b"{}", "a": b"1", "llmopt.json": made.to_bytes()}
    if change == "missing":
        del files["a"]
    else:
        name, data = {"changed": ("a", b"2"), "added": ("b", b"1"), "no manifest": ("llmopt.json", b"{}")}[change]
        files[name] = data
    foreign.add(foreign.checkpoint(files))
    refused()


@pytest.mark.parametrize("which", ["layer", "config", "manifest"])
@pytest.mark.parametrize("damage", ["missing", "cut short", "grown", "changed", "folder", "pipe", "dangling link"])
def test_a_blob_that_is_not_what_its_digest_says_is_found(
    foreign: Foreign, refused: Callable[..., LlmoptError], which: str, damage: str
) -> None:
    layers = foreign.checkpoint()
    described = foreign.add(layers)
    digest = {"layer": layers[1]["digest"], "manifest": described["digest"]}.get(which)
    digest = digest or json.loads((foreign.blobs / described["digest"][7:]).read_bytes())["config"]["digest"]
    blob = foreign.blobs / digest[7:]
    data = blob.read_bytes()
    blob.unlink()
    if damage == "folder":
        blob.mkdir()
    elif damage == "pipe":
        os.mkfifo(blob)
    elif damage == "dangling link":
        blob.symlink_to("nowhere")
    elif damage != "missing":
        blob.write_bytes({"cut short": data[:-1], "grown": data + b"1", "changed": data[:-1] + b"?"}[damage])
    assert digest[7:] in refused().message


@pytest.mark.parametrize("pack", PACKED)
@pytest.mark.parametrize("damage", ["a byte", "another archive"])
def test_an_archive_whose_bytes_are_not_those_of_its_digest_is_found(
    foreign: Foreign, refused: Callable[..., LlmoptError], pack: str, damage: str
) -> None:
    layer = foreign.tar(("config.json", os.urandom(5000)), pack=pack)
    foreign.add([layer])
    blob = foreign.blobs / layer["digest"][7:]
    data = bytearray(blob.read_bytes())
    data[3000] ^= 1
    if damage == "another archive":
        data = bytearray(PACKED[pack](tar(("config.json", os.urandom(5000)))))[: len(data)].ljust(len(data), b"\0")
    blob.write_bytes(data)
    assert layer["digest"] in refused().message


@pytest.mark.parametrize("pack", PACKED)
@pytest.mark.parametrize("data", [b"", b"x" * 600, tar(("config.json", bytes(9000)))[:5000]], ids=["none", "x", "cut"])
def test_what_is_no_archive_is_refused(
    foreign: Foreign, refused: Callable[..., LlmoptError], pack: str, data: bytes
) -> None:
    packed = data if pack == "tar" or len(data) == 600 else PACKED[pack](data)
    foreign.add([foreign.blob(packed, f"application/vnd.cncf.model.weight.v1.{pack}")])
    refused()


@pytest.mark.parametrize("pack", ["tar+gzip", "tar+zstd"])
def test_an_archive_that_unpacks_to_far_more_than_a_model_is_refused(
    foreign: Foreign, refused: Callable[..., LlmoptError], pack: str
) -> None:
    foreign.add([foreign.tar(("model.safetensors", bytes(64 << 20)), pack=pack)])
    assert "100 times" in refused().message


def test_too_many_files_are_refused(
    foreign: Foreign, refused: Callable[..., LlmoptError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oci_layers, "_MAX_FILES", 2)
    foreign.add(foreign.checkpoint())
    refused()
    foreign.add([foreign.tar(*CHECKPOINT.items())], tag="tar")
    refused(f"{foreign.folder}:tar")


def test_a_document_that_is_too_large_is_not_read(foreign: Foreign, refused: Callable[..., LlmoptError]) -> None:
    foreign.list({"mediaType": IMAGE, "digest": "sha256:" + "0" * 64, "size": oci.MAX_DOCUMENT_BYTES + 1})
    assert "too many" in refused().message
    with (foreign.folder / "index.json").open("ab") as index:
        index.truncate(oci.MAX_DOCUMENT_BYTES + 1)
    assert "more than" in refused().message


@pytest.mark.parametrize(
    "index", [b"", b"[]", b"{}", b'{"manifests": [3]}', b'{"manifests": {}}', b'{"manifests": []}', b"[" * 100000]
)
def test_an_index_that_lists_nothing_is_refused(
    foreign: Foreign, refused: Callable[..., LlmoptError], index: bytes
) -> None:
    (foreign.folder / "index.json").write_bytes(index)
    refused()


def test_a_layout_without_an_index_is_refused(refused: Callable[..., LlmoptError]) -> None:
    refused()


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "sha256:../../../etc/passwd"},
        {"digest": "sha256:" + "A" * 64},
        {"digest": 3},
        {"size": -1},
        {"size": "9"},
        {"size": True},
        {"mediaType": None},
        {"mediaType": "a/\x1b[2Jb"},
        {"annotations": []},
        {"annotations": {"org.cncf.model.filepath": 3}},
    ],
    ids=str,
)
def test_a_descriptor_out_of_shape_is_refused(
    foreign: Foreign, refused: Callable[..., LlmoptError], change: dict[str, Any]
) -> None:
    first, *others = foreign.checkpoint()
    foreign.add([*others, first | change])
    refused()


@pytest.mark.parametrize(
    "change", [{"layers": {}}, {"layers": None}, {"config": None}, {"schemaVersion": 1}, {"subject": 3}], ids=str
)
def test_a_manifest_out_of_shape_is_refused(
    foreign: Foreign, refused: Callable[..., LlmoptError], change: dict[str, Any]
) -> None:
    foreign.add(**{"layers": foreign.checkpoint()} | change)
    refused()


def test_a_layer_without_a_path_is_refused(foreign: Foreign, refused: Callable[..., LlmoptError]) -> None:
    foreign.add([foreign.blob(b"1", "application/vnd.cncf.model.weight.v1.raw")])
    refused()


def test_layers_of_which_nothing_is_read_are_an_error(foreign: Foreign, refused: Callable[..., LlmoptError]) -> None:
    foreign.add([foreign.raw("README.md", b"#")])
    refused(error=LlmoptError)


def test_a_later_layout_is_an_error(foreign: Foreign, refused: Callable[..., LlmoptError]) -> None:
    foreign.add(foreign.checkpoint())
    (foreign.folder / "oci-layout").write_text('{"imageLayoutVersion": "2.0.0"}')
    refused(error=LlmoptError)


def test_an_index_within_the_index_is_an_error(foreign: Foreign, refused: Callable[..., LlmoptError]) -> None:
    foreign.list(foreign.blob(b"{}", "application/vnd.oci.image.index.v1+json"))
    refused(error=LlmoptError)


def test_a_full_disk_under_the_store_is_told(
    foreign: Foreign, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(5 << 20)
    foreign.add([foreign.raw("model.safetensors", data)], tag="raw")
    foreign.add([foreign.tar(("model.safetensors", data))], tag="tar")
    for tag in ("raw", "tar"):
        with pytest.raises(LlmoptError, match="too little space on the disk of the store"):
            exchange.take(Store(small_disk / "store"), f"{foreign.folder}:{tag}")
        assert [path for path in small_disk.rglob("*") if path.is_file()] == []
