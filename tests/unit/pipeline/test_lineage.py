from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from llmopt.artifacts.store import Store
from llmopt.pipeline.lineage import lineage

MODEL = "sha256:" + "d" * 64
Put = Callable[..., str]


@pytest.fixture
def put(store: Store, action: Callable[..., Any], tmp_path: Path) -> Put:
    def make(op: str, model: str, kind: str, metrics: Mapping[str, Any] | None = None, **inputs: str) -> str:
        folder = tmp_path / f"staged{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "file").write_text(op + model + str(metrics))
        own = action(op=op, inputs={"model": model, **inputs}, settings={"bits": 4})
        return store.put(folder, kind=kind, action=own, metrics=dict(metrics or {})).id

    return make


def test_it_goes_back_to_the_checkpoint(store: Store, put: Put) -> None:
    quantized = put("quantize.gptq", MODEL, "quantized-model", model_source="hf:org/name@abc")
    engine = put("compile.openvino", quantized, "engine")
    steps = lineage(store, engine)
    assert [(step["id"], step["kind"]) for step in steps] == [
        (engine, "engine"), (quantized, "quantized-model"), (MODEL, "model")
    ]  # fmt: skip
    assert [step.get("op") for step in steps] == ["compile.openvino", "quantize.gptq", None]
    assert steps[-1]["source"] == "hf:org/name@abc"
    assert steps[0]["settings"] == {"bits": 4}


def test_what_was_measured_of_a_step_is_with_it(store: Store, put: Put) -> None:
    quantized = put("quantize.gptq", MODEL, "quantized-model", {"bits_per_weight": 4.2, "layers": {"a": 1}})
    put("eval", quantized, "report", {"perplexity": 9.5, "kl_mean": 0.1, "windows": 7})
    (first, _) = lineage(store, quantized)
    assert first["metrics"] == {"bits_per_weight": 4.2, "perplexity": 9.5, "kl_mean": 0.1}


def test_the_checkpoint_s_own_quality_is_told_too(store: Store, put: Put) -> None:
    engine = put("compile.openvino", MODEL, "engine")
    put("eval", MODEL, "report", {"perplexity": 8.0})
    assert lineage(store, engine)[-1]["metrics"] == {"perplexity": 8.0}


def test_a_folder_that_the_store_does_not_know_is_all_there_is(store: Store) -> None:
    (only,) = lineage(store, MODEL)
    assert (only["id"], only["kind"]) == (MODEL, "model")
