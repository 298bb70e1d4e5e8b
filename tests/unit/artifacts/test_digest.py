"""An input's digest is that of what stages read of it, and of nothing else."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from llmopt.artifacts import Manifest, Store, describe, sha256_file
from llmopt.errors import CorruptError, LlmoptError

Put = Callable[..., Manifest]
WriteFiles = Callable[[Path, Mapping[str, bytes]], None]

MODEL = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.model": b"t", "LICENSE": b"mine"}


@pytest.fixture
def model(tmp_path: Path, write_files: WriteFiles) -> Path:
    folder = tmp_path / "model"
    write_files(folder, MODEL)
    return folder


@pytest.mark.parametrize("data", [b"", b"x", os.urandom(1 << 20)])
def test_the_digest_of_a_file_is_its_sha256(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_a_folder_is_its_files(model: Path) -> None:
    found = describe(model, "model")
    assert found.kind == "model"
    assert {entry.path: entry.size for entry in found.files} == {path: len(data) for path, data in MODEL.items()}


def test_time_order_and_place_change_no_id(model: Path, tmp_path: Path, write_files: WriteFiles) -> None:
    other = tmp_path / "elsewhere" / "copy"
    write_files(other, dict(reversed(MODEL.items())))
    os.utime(other / "config.json", (1, 1))
    (other / "config.json").chmod(0o600)
    assert describe(other, "model").id == describe(model, "model").id


@pytest.mark.parametrize("path", sorted(MODEL))
def test_every_byte_changes_the_id(model: Path, path: str) -> None:
    before = describe(model, "model").id
    (model / path).write_bytes(MODEL[path] + b"\0")
    assert describe(model, "model").id != before


@pytest.mark.parametrize(
    "path", [".cache/x.json", ".gitattributes", "sub/config.json", "pytorch_model.bin", "README.md"]
)
def test_what_no_stage_reads_changes_nothing(model: Path, path: str, write_files: WriteFiles) -> None:
    before = describe(model, "model").id
    write_files(model, {path: b"x"})
    assert describe(model, "model").id == before


def test_an_engine_has_its_network_and_weights(tmp_path: Path, write_files: WriteFiles) -> None:
    write_files(tmp_path, {"openvino_model.xml": b"<net/>", "openvino_model.bin": b"w", "engine.json": b"{}"})
    assert len(describe(tmp_path, "engine").files) == 3


def test_links_to_files_are_followed(model: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in MODEL:
        (snapshot / path).symlink_to(model / path)
    assert describe(snapshot, "model").id == describe(model, "model").id


def test_a_link_to_a_file_that_is_gone_is_an_error(model: Path) -> None:
    (model / "model-2.safetensors").symlink_to(model / "gone")
    with pytest.raises(LlmoptError, match=r"model-2.safetensors` is a link to a file that is gone"):
        describe(model, "model")


def test_a_pipe_among_the_files_is_an_error_and_not_waited_for(model: Path) -> None:
    os.mkfifo(model / "odd.json")
    with pytest.raises(LlmoptError, match="not a regular file"):
        describe(model, "model")


def test_a_text_is_its_bytes_whatever_its_name(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md"):
        (tmp_path / name).write_bytes(b"some text")
    assert describe(tmp_path / "a.txt", "calibration").id == describe(tmp_path / "b.md", "calibration").id
    (tmp_path / "a.txt").write_bytes(b"some other text")
    assert describe(tmp_path / "a.txt", "calibration").id != describe(tmp_path / "b.md", "calibration").id


@pytest.mark.parametrize("place", ["nowhere", "file/under", "empty"])
def test_nothing_to_describe_is_an_error_with_a_hint(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LlmoptError) as caught:
        describe(tmp_path / place, "model")
    assert str(tmp_path / place) in caught.value.message
    assert caught.value.hint


class TestAnExportedArtifact:
    @pytest.fixture
    def stored(self, put: Put) -> Manifest:
        return put(kind="quantized-model", metrics={"kl": 0.5})

    @pytest.fixture
    def exported(self, stored: Manifest, store: Store, tmp_path: Path) -> Path:
        store.export(stored.id, tmp_path / "out")
        return tmp_path / "out"

    def test_is_that_artifact(self, stored: Manifest, exported: Path) -> None:
        assert describe(exported, "model") == stored

    def test_is_that_artifact_in_the_store_too(self, stored: Manifest, store: Store) -> None:
        assert describe(store.path(stored.id), "model") == stored

    def test_with_a_changed_file_is_corrupt(self, exported: Path) -> None:
        (exported / "config.json").write_bytes(b'{"model_type": "gemma"}')
        with pytest.raises(CorruptError, match=r"config.json` is not the file"):
            describe(exported, "model")

    def test_without_a_file_is_corrupt(self, exported: Path) -> None:
        (exported / "tokenizer" / "vocab.txt").unlink()
        with pytest.raises(CorruptError, match=r"vocab.txt` is missing"):
            describe(exported, "model")

    def test_with_another_file_that_a_stage_would_read_is_corrupt(self, exported: Path) -> None:
        (exported / "chat_template.jinja").write_bytes(b"{{ messages }}")
        with pytest.raises(CorruptError, match=r"chat_template.jinja` is not in"):
            describe(exported, "model")

    def test_with_notes_beside_it_is_still_that_artifact(self, stored: Manifest, exported: Path) -> None:
        (exported / "notes.md").write_bytes(b"good")
        assert describe(exported, "model") == stored

    def test_without_its_manifest_is_a_plain_folder(self, stored: Manifest, exported: Path) -> None:
        (exported / "llmopt.json").unlink()
        assert describe(exported, "model").id != stored.id

    def test_with_a_manifest_that_is_none_is_corrupt(self, exported: Path) -> None:
        (exported / "llmopt.json").write_bytes(b"{}")
        with pytest.raises(CorruptError, match=r"llmopt.json`: not a manifest") as caught:
            describe(exported, "model")
        assert "delete its `llmopt.json`" in str(caught.value.hint)
