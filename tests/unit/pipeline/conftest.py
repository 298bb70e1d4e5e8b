"""A stage that needs no model: it writes what its settings say."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmopt.artifacts.manifest import Action
from llmopt.artifacts.outcome import Outcome, Progress
from llmopt.artifacts.store import Store
from llmopt.pipeline.runner import Stage

MakeStage = Callable[..., Stage]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"))


def an_action(**changes: object) -> Action:
    fields: dict[str, object] = {
        "op": "quantize.gptq",
        "op_version": 1,
        "inputs": {"model": "sha256:" + "a" * 64},
        "settings": {"bits": 4, "seed": 0},
        "code": "sha256:" + "c" * 64,
        "deps": {"torch": "2.13.0"},
        "target": {"arch": "x86_64"},
    }
    return Action(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def action() -> Callable[..., Action]:
    return an_action


@pytest.fixture
def make_stage() -> MakeStage:
    """make_stage(text="x", **fields of the action) -> Stage; `stage.done` counts how often it did its work."""

    def make(
        text: str = "weights",
        *,
        repeatable: bool = True,
        resumable: bool = False,
        fail: BaseException | None = None,
        refuse: BaseException | None = None,
        done: list[str] | None = None,
        **changes: object,
    ) -> Stage:
        def check() -> None:
            if refuse is not None:
                raise refuse

        def produce(out: Path, progress: Progress) -> Outcome:
            (out / "model.safetensors").write_text(text)
            if done is not None:
                done.append(text)
            if fail is not None:
                raise fail
            return Outcome(metrics={"figure": 1.5}, events=("rounded to nearest",))

        return Stage(
            kind="quantized-model",
            action=an_action(**changes),
            check=check,
            produce=produce,
            repeatable=repeatable,
            resumable=resumable,
        )

    return make


def _load(name: str) -> Any:
    """A module beside this file: tests are not a package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A hub of this test's own, with an empty cache; see hub_server.py."""
    from huggingface_hub import constants

    with _load("hub_server").running() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub
