"""An artifact as an OCI layout: as the specifications ask, the same for the same artifact, all of it or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmopt.artifacts import Action, Manifest, Store, attest, disk, exchange, oci
from llmopt.errors import CorruptError, LlmoptError, SettingsError

Put = Callable[..., Manifest]
MakeAction = Callable[..., Action]

FILES = {
    "config.json": b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}',
    "model.safetensors": bytes(range(256)) * 40,
    "sub/same.safetensors": bytes(range(256)) * 40,
    "empty.txt": b"",
    "LICENSE.txt": b"Do as you like",
    "README.md": b"# Model",
    "run.sh": b"true",
    "rows.parquet": b"PAR1",
    "what.is-it": b"?",
}
needs_skopeo = pytest.mark.skipif(shutil.which("skopeo") is None, reason="no skopeo: Debian has it")


@pytest.fixture
def made(put: Put, make_action: MakeAction) -> Manifest:
    """Quantized from a model of the hub, twice, with other words about each run."""
    inputs = {"model": "sha256:" + "0" * 64, "model_source": "hf:org/name@abc", "model_license": "mit AND apache-2.0"}
    action = make_action(inputs=inputs | {"calibration_license": "cc-by-4.0"})
    for started in (1.0, 2.0):
        manifest = put(FILES, kind="quantized-model", action=action, attestation=statement_from(started))
    return manifest


def statement_from(started: float) -> Callable[[Manifest], dict[str, Any]]:
    return lambda manifest: attest(manifest, started=started, finished=9.0, command=["llmopt"], folder=Path("/"))


@pytest.fixture
def layout(store: Store, made: Manifest, tmp_path: Path) -> Path:
    oci.export(store, made.id, tmp_path / "layout", tag="v1")
    return tmp_path / "layout"


def load(layout: Path, digest: str) -> Any:
    return json.loads((layout / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes())


def listed(layout: Path) -> list[dict[str, Any]]:
    found = json.loads((layout / "index.json").read_bytes())["manifests"]
    assert isinstance(found, list)
    return found


def document(layout: Path) -> dict[str, Any]:
    found = load(layout, listed(layout)[0]["digest"])
    assert isinstance(found, dict)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def skopeo(*arguments: object) -> bytes:
    command = ["skopeo", "--insecure-policy", *(str(argument) for argument in arguments)]
    return subprocess.run(command, check=True, capture_output=True, timeout=60).stdout


# -- what is written


def test_every_blob_is_named_by_its_bytes_and_every_descriptor_tells_its_size(layout: Path) -> None:
    blobs = {path.name: path.read_bytes() for path in (layout / "blobs" / "sha256").iterdir()}
    assert all(hashlib.sha256(data).hexdigest() == name for name, data in blobs.items())
    told = [*listed(layout), *(d for m in listed(layout) for d in descriptors(load(layout, m["digest"])))]
    assert all(len(blobs[each["digest"].removeprefix("sha256:")]) == each["size"] for each in told)
    assert {each["digest"].removeprefix("sha256:") for each in told} == blobs.keys()
    assert json.loads((layout / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}


def descriptors(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [manifest["config"], *manifest["layers"], *([manifest["subject"]] if "subject" in manifest else [])]


def test_files_are_layers_as_they_are_and_the_digest_of_llmopt_json_is_the_id(layout: Path, made: Manifest) -> None:
    layers = {layer["annotations"]["org.cncf.model.filepath"]: layer for layer in document(layout)["layers"]}
    assert layers.pop("llmopt.json")["digest"] == made.id
    assert {path: layer["digest"] for path, layer in layers.items()} == {
        entry.path: f"sha256:{entry.sha256}" for entry in made.files
    }


def test_the_manifest_and_the_config_are_of_modelpack(layout: Path) -> None:
    manifest = document(layout)
    assert manifest["schemaVersion"] == 2
    assert manifest["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert manifest["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    config = load(layout, manifest["config"]["digest"])
    assert config["modelfs"] == {"type": "layers", "diffIds": [layer["digest"] for layer in manifest["layers"]]}
    assert config["config"] == {
        "architecture": "LlamaForCausalLM",
        "format": "safetensors",
        "precision": "bfloat16",
        "quantization": "gptq",
    }
    assert config["descriptor"] == {
        "description": "quantized-model, complete, made by llmopt quantize.gptq",
        "family": "llama",
        "licenses": ["apache-2.0", "mit"],
        "name": "org/name",
    }


def test_each_kind_of_file_has_its_media_type(layout: Path) -> None:
    kinds = {
        layer["annotations"]["org.cncf.model.filepath"]: layer["mediaType"].removeprefix("application/vnd.cncf.model.")
        for layer in document(layout)["layers"]
    }
    assert kinds == {
        "LICENSE.txt": "doc.v1.raw",
        "README.md": "doc.v1.raw",
        "config.json": "weight.config.v1.raw",
        "empty.txt": "weight.config.v1.raw",
        "llmopt.json": "weight.config.v1.raw",
        "model.safetensors": "weight.v1.raw",
        "rows.parquet": "dataset.v1.raw",
        "run.sh": "code.v1.raw",
        "sub/same.safetensors": "weight.v1.raw",
        "what.is-it": "weight.config.v1.raw",
    }


def test_a_guess_is_marked_as_one(layout: Path) -> None:
    guessed = {
        layer["annotations"]["org.cncf.model.filepath"]
        for layer in document(layout)["layers"]
        if layer["annotations"].get("org.cncf.model.file.mediatype.untested") == "true"
    }
    assert guessed == {"what.is-it"}


@pytest.mark.parametrize("config", [b"[1]", b"not JSON", b'{"dtype": 3, "architectures": [{}], "model_type": []}'])
def test_a_config_that_says_nothing_of_use_is_no_hindrance(
    store: Store, put: Put, tmp_path: Path, config: bytes
) -> None:
    manifest = put({"config.json": config, "a.engine": b"1"})
    oci.export(store, manifest.id, tmp_path / "layout", tag="v1")
    found = load(tmp_path / "layout", document(tmp_path / "layout")["config"]["digest"])
    assert found["config"] == {"format": "tensorrt-llm"}
    assert found["descriptor"] == {"description": "model, complete"}


def test_the_same_artifact_has_the_same_digest_wherever_and_by_whomever_it_was_made(
    tmp_path: Path, made: Manifest, store: Store, put: Put
) -> None:
    other = Store(tmp_path / "other")
    put(FILES, into=other, kind="quantized-model", action=made.action, attestation=statement_from(5.0))
    first = oci.export(store, made.id, tmp_path / "first", tag="v1")
    second = oci.export(other, made.id, tmp_path / "second", tag="v2")
    assert first.digest == second.digest
    assert oci.export(store, made.id, tmp_path / "third", tag="v1") == first
    assert files(tmp_path / "first") == files(tmp_path / "third")


def test_attestations_refer_to_the_manifest_and_have_no_tag(store: Store, layout: Path, made: Manifest) -> None:
    model, *others = listed(layout)
    assert model["annotations"] == {"org.opencontainers.image.ref.name": "v1"}
    assert len(others) == 2
    found = []
    for other in others:
        manifest = load(layout, other["digest"])
        assert manifest["artifactType"] == other["artifactType"] == "application/vnd.in-toto+json"
        assert manifest["subject"] == {key: model[key] for key in ("mediaType", "digest", "size")}
        assert manifest["config"]["mediaType"] == "application/vnd.oci.empty.v1+json"
        found += [load(layout, layer["digest"]) for layer in manifest["layers"]]
    assert sorted(map(str, found)) == sorted(map(str, store.attestations(made.id)))


def test_who_made_it_and_where_can_be_left_out(store: Store, made: Manifest, tmp_path: Path) -> None:
    written = oci.export(store, made.id, tmp_path / "layout", tag="v1", attestations=False)
    assert written.attestations == 0
    assert len(listed(tmp_path / "layout")) == 1
    assert not any(os.uname().nodename.encode() in data for data in files(tmp_path / "layout").values())


def test_the_layout_is_the_users_own(store: Store, made: Manifest, layout: Path) -> None:
    for blob in (layout / "blobs" / "sha256").iterdir():
        blob.write_bytes(b"changed")
    assert Store(store.root).verify(made.id) == []


# -- all of it or nothing


def test_a_folder_that_has_something_is_refused(store: Store, made: Manifest, layout: Path) -> None:
    before = files(layout)
    with pytest.raises(SettingsError, match="is not empty"):
        oci.export(store, made.id, layout, tag="v1")
    assert files(layout) == before


@pytest.mark.parametrize("tag", ["", "a/b", "a:b", "-a", ".a", "a" * 129])
def test_what_cannot_be_a_tag_is_refused(store: Store, made: Manifest, tmp_path: Path, tag: str) -> None:
    with pytest.raises(SettingsError, match="cannot be a tag"):
        oci.export(store, made.id, tmp_path / "layout", tag=tag)
    assert not (tmp_path / "layout").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_export_cut_short_leaves_nothing(
    store: Store, made: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def stop(path: Path) -> None:
        if path.name == "oci-layout":
            raise error

    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(disk, "sync_file", stop)
    with pytest.raises(error):
        oci.export(store, made.id, tmp_path / "mine" / "layout", tag="v1")
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_full_disk_is_told_of_the_folder_that_was_named(store: Store, put: Put, small_disk: Path) -> None:
    manifest = put({"model.safetensors": bytes(5 << 20)})
    with pytest.raises(LlmoptError, match="too little space") as caught:
        oci.export(store, manifest.id, small_disk / "layout", tag="v1")
    assert f"`{small_disk / 'layout'}`" in caught.value.message
    assert caught.value.hint
    assert list(small_disk.iterdir()) == []


def test_a_damaged_artifact_is_not_exported(store: Store, made: Manifest, tmp_path: Path) -> None:
    sha256 = made.files[0].sha256
    blob = store.root / "blobs" / "sha256" / sha256[:2] / sha256
    blob.chmod(0o644)
    blob.write_bytes(b"other bytes")
    with pytest.raises(CorruptError):
        oci.export(Store(store.root), made.id, tmp_path / "layout", tag="v1")
    assert not (tmp_path / "layout").exists()


# -- and back


def test_what_comes_back_is_the_same_artifact_with_its_action_and_attestations(
    store: Store, made: Manifest, layout: Path, tmp_path: Path
) -> None:
    other = Store(tmp_path / "other")
    taken = exchange.take(other, str(layout))
    assert taken == exchange.Taken(made, (), 2)
    assert made.action is not None
    assert other.find(made.action.key) == made
    assert other.verify(made.id) == []
    assert sorted(map(str, other.attestations(made.id))) == sorted(map(str, store.attestations(made.id)))


def test_a_round_trip_through_another_store_changes_no_digest(
    store: Store, made: Manifest, layout: Path, tmp_path: Path
) -> None:
    other = Store(tmp_path / "other")
    exchange.take(other, f"{layout}:v1")
    oci.export(other, made.id, tmp_path / "again", tag="v1")
    assert files(tmp_path / "again") == files(layout)


# -- read by another tool


@needs_skopeo
def test_skopeo_reads_the_manifest(layout: Path, made: Manifest) -> None:
    raw = skopeo("inspect", "--raw", f"oci:{layout}:v1")
    assert f"sha256:{hashlib.sha256(raw).hexdigest()}" == listed(layout)[0]["digest"]


@needs_skopeo
def test_what_skopeo_copied_comes_back_as_the_same_artifact(layout: Path, made: Manifest, tmp_path: Path) -> None:
    skopeo("copy", f"oci:{layout}:v1", f"oci:{tmp_path / 'copy'}:other")
    assert exchange.take(Store(tmp_path / "other"), f"{tmp_path / 'copy'}:other").manifest == made


@needs_skopeo
def test_skopeo_copies_to_a_plain_folder_and_back(layout: Path, made: Manifest, tmp_path: Path) -> None:
    skopeo("copy", f"oci:{layout}:v1", f"dir:{tmp_path / 'dir'}")
    digest = hashlib.sha256((tmp_path / "dir" / "manifest.json").read_bytes()).hexdigest()
    assert f"sha256:{digest}" == listed(layout)[0]["digest"]
    skopeo("copy", f"dir:{tmp_path / 'dir'}", f"oci:{tmp_path / 'back'}:v1")
    assert exchange.take(Store(tmp_path / "other"), str(tmp_path / "back")).manifest == made
