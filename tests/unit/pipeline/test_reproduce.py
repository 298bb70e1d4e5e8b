"""Inputs found again: where an artifact was made from a hub, at the commit that it was made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmopt.artifacts.outcome import silent
from llmopt.artifacts.store import Store
from llmopt.errors import LlmoptError
from llmopt.pipeline import inputs, plan, runner
from llmopt.pipeline.reproduce import reproduce

SMALL = {"sweeps": 0, "compensate": False, "group_size": 32, "samples": 4, "seq_len": 32}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def quantized(hub: Any, store: Store, tiny: Path, tmp_path: Path) -> str:
    """Made from a model and a data set of the hub, both of which have moved on since; the cache is empty."""
    rows = "".join(json.dumps({"text": f"words upon words, {n} of them"}) + "\n" for n in range(200)).encode()
    hub.add("someone/tiny", files_of(tiny) | {"README.md": b"---\nlicense: gemma\n---\n"})
    hub.add("datasets/someone/rows", {"train.jsonl": rows})
    source = inputs.model(store, "someone/tiny")
    stage = plan.quantize_stage(store, source, {**SMALL, "calib": "datasets:someone/rows"}, silent)
    made = runner.run(store, stage, silent).artifact
    hub.add(
        "someone/tiny", files_of(tiny) | {"generation_config.json": b"{}", "README.md": b"---\nlicense: mit\n---\n"}
    )
    hub.add("datasets/someone/rows", {"train.jsonl": rows[:1000]})
    shutil.rmtree(tmp_path / "hub")
    hub.requests.clear()
    return str(made)


def test_a_model_is_fetched_at_the_commit_that_it_was(hub: Any, store: Store, quantized: str) -> None:
    again = reproduce(store, quantized, silent)
    assert (again.outcome, again.remade) == ("identical", quantized)
    assert "model.safetensors" in hub.downloads()


def test_so_is_a_data_set(hub: Any, store: Store, quantized: str) -> None:
    """Its tokenizer is that of any artifact which has it."""
    action = store.get(quantized).action
    assert action is not None
    assert reproduce(store, action.inputs["calibration"], silent).outcome == "identical"
    assert hub.downloads() == ["train.jsonl"]


def test_a_folder_with_the_same_bytes_does_as_well_and_nothing_is_fetched(
    hub: Any, store: Store, quantized: str, tiny: Path
) -> None:
    """What the manifest says of where the model was from, and of its licence, stays as it was said."""
    again = reproduce(store, quantized, silent, given=[str(tiny)])
    assert again.outcome == "identical"
    assert hub.requests == []


def test_a_hub_that_cannot_be_reached_is_an_error_that_says_so(hub: Any, store: Store, quantized: str) -> None:
    hub.down = 503
    with pytest.raises(LlmoptError, match="503"):
        reproduce(store, quantized, silent)


def test_an_input_damaged_in_the_store_is_not_used(store: Store, quantized: str, tiny: Path) -> None:
    action = store.get(quantized).action
    assert action is not None
    (entry, *_) = store.get(action.inputs["calibration"]).files
    blob = next(path for path in (store.root / "blobs").rglob(entry.sha256))
    blob.chmod(0o644)
    blob.write_bytes(b"x" * entry.size)
    with pytest.raises(LlmoptError, match="corrupt"):
        reproduce(Store(store.root), quantized, silent, given=[str(tiny)])
