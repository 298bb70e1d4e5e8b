from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llmopt.artifacts.outcome import silent
from llmopt.artifacts.store import Store
from llmopt.errors import CorruptError, Exit, LlmoptError
from llmopt.pipeline import inputs, runner
from llmopt.pipeline.runner import Stage, StageResult


@pytest.fixture
def stored(store: Store, make_stage: Callable[..., Stage]) -> StageResult:
    return runner.run(store, make_stage(), silent)


def refused(store: Store, reference: str) -> LlmoptError:
    with pytest.raises(LlmoptError) as caught:
        inputs.resolve(store, reference)
    return caught.value


def test_a_folder_is_named_by_its_bytes_wherever_it_lies(store: Store, tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny, copy)
    assert inputs.resolve(store, str(copy)).id == inputs.resolve(store, str(tiny)).id


def test_a_changed_byte_is_another_input(store: Store, tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny, copy)
    with (copy / "tokenizer_config.json").open("a") as file:
        file.write(" ")
    assert inputs.resolve(store, str(copy)).id != inputs.resolve(store, str(tiny)).id


def test_an_artifact_is_found_by_id_by_its_first_digits_and_by_name(store: Store, stored: StageResult) -> None:
    store.set_name("best", stored.artifact)
    digits = stored.artifact.removeprefix("sha256:")
    for reference in (stored.artifact, digits[:8], f"sha256:{digits[:12]}", "best"):
        found = inputs.resolve(store, reference)
        assert (found.id, found.kind) == (stored.artifact, "quantized-model")
        assert (found.path / "model.safetensors").read_text() == "weights"


def test_an_exported_artifact_keeps_its_id(store: Store, stored: StageResult, tmp_path: Path) -> None:
    store.export(stored.artifact, tmp_path / "out")
    assert inputs.resolve(store, str(tmp_path / "out")).id == stored.artifact


def test_a_damaged_artifact_as_input_is_refused(store: Store, stored: StageResult) -> None:
    (blob,) = (path for path in (store.root / "blobs").rglob("*") if path.is_file())
    blob.chmod(0o644)
    blob.write_bytes(b"weightz")
    with pytest.raises(CorruptError) as caught:
        inputs.resolve(Store(store.root), stored.artifact)
    assert caught.value.code == Exit.VERIFICATION_FAILED


def test_a_damaged_export_as_input_is_refused(store: Store, stored: StageResult, tmp_path: Path) -> None:
    store.export(stored.artifact, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    file.chmod(0o644)
    file.write_bytes(b"weightz")
    assert refused(store, str(tmp_path / "out")).code == Exit.VERIFICATION_FAILED


def test_the_hub_is_named_where_a_model_may_come_from_it(store: Store) -> None:
    assert "ORG/NAME" in str(refused(store, "meta-llama/Llama-3.2-1B").hint)


def test_an_address_is_not_a_folder(store: Store) -> None:
    error = refused(store, "https://host/model")
    assert error.code == Exit.USAGE
    assert "only folders and `s3://BUCKET/PREFIX`" in error.message


def test_a_path_that_is_not_there_is_told_as_one(store: Store) -> None:
    assert refused(store, "./a/b/c").message == "no model folder at `./a/b/c`"


def test_a_misspelt_name_gets_the_nearest(store: Store, stored: StageResult) -> None:
    store.set_name("llama-int4", stored.artifact)
    assert refused(store, "lama-int4").hint == "did you mean `llama-int4`?"


def test_a_file_is_not_a_model(store: Store, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert refused(store, str(tmp_path / "model.gguf")).code == Exit.USAGE


def test_a_text_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LlmoptError, match="no text file"):
        inputs.text(tmp_path / "none.txt")


def test_a_command_refuses_what_it_is_not_for(store: Store, stored: StageResult, tiny: Path) -> None:
    for reference, kind, told in (
        (stored.artifact, "engine", "a quantized model"),
        (str(tiny), "engine", "a checkpoint"),
    ):
        with pytest.raises(LlmoptError) as caught:
            inputs.require(inputs.resolve(store, reference), "bench", kind)
        assert told in caught.value.message
        assert str(caught.value.hint).startswith("make one: `llmopt compile")
        assert caught.value.code == Exit.USAGE
