"""`llmopt store export` and `import` on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Llmopt = Callable[..., Any]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "pytorch_model.bin"):
        (folder / name).write_bytes(b"{}")
    return folder


@pytest.fixture
def named(llmopt: Llmopt, checkpoint: Path) -> str:
    assert llmopt("store", "import", checkpoint, "--name", "base").code == 0
    return "base"


def test_a_checkpoint_is_imported_under_a_name_and_what_was_left_out_is_told(llmopt: Llmopt, checkpoint: Path) -> None:
    ran = llmopt("store", "import", checkpoint, "--name", "base", "--json")
    assert ran.code == 0
    assert ran.json["left_out"] == ["pytorch_model.bin"]
    assert "`pytorch_model.bin`" in ran.err
    assert {key: ran.json[key] for key in ("kind", "status", "name", "action", "bytes", "attestations")} == {
        "kind": "model",
        "status": "complete",
        "name": "base",
        "action": None,
        "bytes": 4,
        "attestations": 0,
    }
    assert llmopt("store", "show", "base", "--json").json["artifact"] == ran.json["artifact"]


@pytest.mark.parametrize(("options", "tag"), [((), "base"), (("--name", "v2"), "v2")])
def test_the_tag_is_the_name_it_was_asked_for_by_or_the_one_given(
    llmopt: Llmopt, named: str, tmp_path: Path, options: tuple[str, ...], tag: str
) -> None:
    exported = llmopt("store", "export", named, tmp_path / "layout", "--oci", *options, "--json").json
    assert exported["tag"] == tag
    imported = llmopt("store", "import", f"{tmp_path / 'layout'}:{tag}", "--store", tmp_path / "other", "--json")
    assert imported.json["artifact"] == exported["artifact"]


def test_without_a_name_the_tag_is_latest(llmopt: Llmopt, named: str, tmp_path: Path) -> None:
    artifact = llmopt("store", "show", named, "--json").json["artifact"]
    assert llmopt("store", "export", artifact, tmp_path / "layout", "--oci", "--json").json["tag"] == "latest"


@pytest.mark.parametrize("option", [("--name", "v1"), ("--no-attestations",), ("--attestations",)])
def test_what_is_of_a_layout_is_refused_without_one(
    llmopt: Llmopt, named: str, tmp_path: Path, option: tuple[str, ...]
) -> None:
    ran = llmopt("store", "export", named, tmp_path / "out", *option)
    assert ran.code == 2
    assert "--oci" in ran.error
    assert not (tmp_path / "out").exists()


def test_a_name_that_cannot_be_one_is_found_before_the_import(llmopt: Llmopt, checkpoint: Path, store: Path) -> None:
    assert llmopt("store", "import", checkpoint, "--name", "a/b").code == 2
    assert not store.exists()


def test_a_damaged_layout_exits_with_4(llmopt: Llmopt, named: str, tmp_path: Path) -> None:
    llmopt("store", "export", named, tmp_path / "layout", "--oci")
    next((tmp_path / "layout" / "blobs" / "sha256").iterdir()).write_bytes(b"?")
    ran = llmopt("store", "import", tmp_path / "layout", "--store", tmp_path / "other")
    assert ran.code == 4
    assert "hint: " in ran.error
    assert llmopt("store", "ls", "--store", tmp_path / "other", "--json").json["artifacts"] == []
