"""Licences of inputs: found, kept in the action, inherited by what is made, and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmopt.artifacts.outcome import silent
from llmopt.artifacts.store import Store
from llmopt.errors import Exit, SettingsError
from llmopt.pipeline import inputs, plan, runner, stages
from llmopt.pipeline.inputs import Input

CARD = "---\nlicense: {}\n---\n# About\n"
APACHE = "Apache License\nVersion 2.0, January 2004\n"
RTN = {"method": "rtn", "group_size": 32}


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    (folder / "README.md").write_text(CARD.format("llama3.1"))
    return folder


def test_the_licence_is_in_the_action_and_the_card_is_not_in_the_digest(store: Store, model: Path, tiny: Path) -> None:
    found = inputs.model(store, str(model))
    assert found.license == "llama3.1"
    assert found.id == inputs.model(store, str(tiny)).id
    assert stages.quantize(found, RTN).action.inputs["model_license"] == "llama3.1"


def test_a_word_changed_in_the_card_is_the_same_key_another_licence_is_not(store: Store, model: Path) -> None:
    def key() -> str:
        return stages.quantize(inputs.model(store, str(model)), RTN).action.key

    before = key()
    (model / "README.md").write_text(CARD.format("llama3.1") + "a typo mended")
    assert key() == before
    (model / "README.md").write_text(CARD.format("mit"))
    assert key() != before


def test_nothing_stated_is_no_entry(store: Store, tiny: Path) -> None:
    assert stages.quantize(inputs.model(store, str(tiny)), RTN).action.inputs.keys() == {"model"}


def test_what_is_made_states_the_licence_to_the_next_stage(store: Store, model: Path, tmp_path: Path) -> None:
    made = runner.run(store, stages.quantize(inputs.model(store, str(model)), RTN), silent)
    assert made.license == "llama3.1"
    exported = tmp_path / "exported"
    store.export(made.artifact, exported)
    (exported / "README.md").write_text(CARD.format("mit"))  # whoever got it cannot say otherwise
    for source in (
        inputs.product(made), inputs.model(store, made.artifact), inputs.model(store, str(exported))
    ):  # fmt: skip
        assert source.license == "llama3.1"
        assert stages.compile_(source, {}).action.inputs["model_license"] == "llama3.1"


def test_licence_files_go_with_what_is_made(store: Store, model: Path) -> None:
    for name in ("LICENSE.md", "LICENCE", "COPYING.txt", "NOTICE.txt"):
        (model / name).write_text(f"the text of {name}")
    made = runner.run(store, stages.quantize(inputs.model(store, str(model)), RTN), silent)
    files = {path.name for path in Path(made.path).iterdir()}
    assert files >= {"LICENSE.md", "LICENCE", "COPYING.txt", "NOTICE.txt"}
    assert "README.md" not in files


def test_an_adapter_s_licence_is_joined(store: Store, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "LICENSE").write_text(APACHE)
    adapter = inputs.adapter(str(folder))
    action = stages.quantize(inputs.model(store, str(model)), RTN, adapter=adapter).action
    assert (action.inputs["model_license"], action.inputs["adapter_license"]) == ("llama3.1", "apache-2.0")


def test_the_card_of_the_hub_is_read_and_counts_for_nothing_else(hub: Any, store: Store, tiny: Path) -> None:
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    hub.add("someone/tiny", files | {"README.md": CARD.format("gemma").encode()})
    found = inputs.model(store, "someone/tiny")
    assert found.license == "gemma"
    assert found.id == inputs.model(store, str(tiny)).id


def test_a_data_set_s_licence_is_that_of_the_calibration_set(hub: Any, store: Store, tiny: Path) -> None:
    rows = "".join(json.dumps({"text": "words upon words upon words"}) + "\n" for _ in range(200))
    hub.add(
        "datasets/someone/rows",
        {"train.jsonl": rows.encode(), "README.md": CARD.format("cc-by-nc-4.0").encode(), "LICENSE": b"ours"},
    )
    source = inputs.calibration(store, "datasets:someone/rows")
    assert source.license is not None
    assert source.license.startswith("cc-by-nc-4.0 AND LicenseRef-")
    assert {file.name for file in source.files} == {"train.jsonl"}
    settings = {"samples": 4, "seq_len": 32, "group_size": 32}
    model = inputs.model(store, str(tiny))
    made = runner.run(store, stages.calibrate(model, source, settings), silent)
    assert made.license == source.license
    quantize = stages.quantize(model, settings, inputs.product(made)).action
    assert quantize.inputs["calibration_license"] == source.license


def test_a_denied_model_of_the_hub_is_refused_before_its_weights_are_fetched(
    hub: Any, store: Store, tiny: Path
) -> None:
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    hub.add("someone/tiny", files | {"README.md": CARD.format("gemma").encode()})
    with pytest.raises(SettingsError, match="`gemma` by its card"):
        inputs.model(store, "someone/tiny", deny=["gemma"])
    assert "model.safetensors" not in hub.downloads()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "README.md", CARD.format("llama3.1"),
            "`model` has the licence `llama3.1` by its card, `README.md`, which `--deny-license LLAMA*` denies",
        ),
        (
            "LICENSE", "LLAMA 2 COMMUNITY LICENSE AGREEMENT",
            "`model` has the licence `llama2` by its file `LICENSE`, which `--deny-license LLAMA*` denies",
        ),
    ],
)  # fmt: skip
def test_the_error_says_where_the_licence_is_stated(
    store: Store, model: Path, file: str, content: str, message: str
) -> None:
    (model / "README.md").unlink()
    (model / file).write_text(content)
    with pytest.raises(SettingsError) as caught:
        inputs.model(store, str(model), deny=["mit", "LLAMA*"])
    assert caught.value.message == message
    assert caught.value.hint
    assert caught.value.code == Exit.USAGE


def test_an_artifact_is_refused_by_its_manifest(store: Store, model: Path) -> None:
    made = runner.run(store, stages.quantize(inputs.model(store, str(model)), RTN), silent)
    with pytest.raises(SettingsError, match="by its manifest"):
        inputs.model(store, made.artifact, deny=["llama*"])


def test_unknown_denies_a_model_that_states_nothing(store: Store, tiny: Path) -> None:
    with pytest.raises(SettingsError, match="states no licence"):
        inputs.model(store, str(tiny), deny=["unknown"])


def test_a_text_of_the_user_s_own_can_state_none_and_is_not_denied(tmp_path: Path) -> None:
    inputs.refuse_denied([Input(id="x", path=tmp_path, kind="text", bytes=1, label="own.txt")], ["unknown"])


def test_an_empty_pattern_is_an_error(store: Store, tiny: Path) -> None:
    with pytest.raises(SettingsError, match="is empty"):
        inputs.model(store, str(tiny), deny=[" "])


def test_a_denied_pipeline_does_nothing_even_where_all_is_in_the_store(store: Store, model: Path) -> None:
    pipeline = plan.Pipeline(name="x", model=str(model), sections={"quantize": RTN})
    plan.run(store, pipeline, silent)
    with pytest.raises(SettingsError, match=r"llama3\.1"):
        plan.run(store, pipeline, silent, deny=["llama*"])


def test_what_is_denied_is_not_in_the_key(store: Store, model: Path) -> None:
    pipeline = plan.Pipeline(name="x", model=str(model), sections={"quantize": RTN})
    first, second = (plan.run(store, pipeline, silent, deny=deny).steps[0].key for deny in ([], ["mit"]))
    assert first == second
