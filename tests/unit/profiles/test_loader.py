from __future__ import annotations

from pathlib import Path

import pytest

from llmopt import profiles
from llmopt.errors import Exit, LlmoptError


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def refused(reference: str) -> LlmoptError:
    with pytest.raises(LlmoptError) as caught:
        profiles.load(reference)
    return caught.value


def test_a_profile_extends_a_shipped_one_key_by_key(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", "extends: int4-gptq\nquantize:\n  bits: 3\n")
    profile = profiles.load(file)
    shipped = profiles.load("int4-gptq")
    assert profile.section("quantize") == shipped.section("quantize") | {"bits": 3}
    assert profile.section("compile") == shipped.section("compile")


def test_a_profile_extends_one_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "eval:\n  windows: 5\n")
    file = write(tmp_path / "mine.yaml", "extends: base.yaml\n")
    assert profiles.load(file).section("eval") == {"windows": 5}


def test_the_origin_of_a_setting_is_its_file_and_line(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "eval:\n  windows: 5\n  seq_len: 64\n")
    file = write(tmp_path / "mine.yaml", "extends: base.yaml\n\neval:\n  windows: 6\n")
    origins = profiles.load(file).origins
    assert origins["eval.windows"] == "mine.yaml:4"
    assert origins["eval.seq_len"] == "base.yaml:3"


def test_a_model_is_relative_to_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    file = write(tmp_path / "mine.yaml", "model: weights\n")
    assert profiles.load(file).model == str(tmp_path / "weights")


def test_a_model_that_is_no_path_beside_the_file_stays_a_reference(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", "model: a-name-in-the-store\n")
    assert profiles.load(file).model == "a-name-in-the-store"


def test_a_calibration_file_is_relative_to_the_profile(tmp_path: Path) -> None:
    write(tmp_path / "own.txt", "text")
    file = write(tmp_path / "mine.yaml", "quantize:\n  calib: own.txt\n")
    assert profiles.load(file).section("quantize")["calib"] == str(tmp_path / "own.txt")


def test_an_empty_section_is_a_stage_with_its_defaults(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", "compile:\n")
    assert profiles.load(file).sections == {"compile": {}}


def test_a_misspelt_section_is_an_error_with_its_line(tmp_path: Path) -> None:
    error = refused(write(tmp_path / "mine.yaml", "description: x\nquantise:\n  bits: 4\n"))
    assert error.message == "mine.yaml:2: a profile has no section `quantise`"
    assert error.hint == "did you mean `quantize`?"
    assert error.code == Exit.USAGE


def test_a_setting_given_twice_is_an_error(tmp_path: Path) -> None:
    error = refused(write(tmp_path / "mine.yaml", "eval:\n  windows: 4\n  windows: 5\n"))
    assert error.message == "mine.yaml:3: `eval.windows` is given twice"


def test_broken_yaml_is_an_error_with_its_line(tmp_path: Path) -> None:
    error = refused(write(tmp_path / "mine.yaml", "eval:\n  windows: [1, 2\ncompile: {}\n"))
    assert error.message.startswith("mine.yaml:3: not valid YAML")
    assert error.code == Exit.USAGE


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text\n", "eval: 5\n", "model: 5\n", "description: [a]\n"])
def test_a_document_of_another_shape_is_an_error(tmp_path: Path, text: str) -> None:
    error = refused(write(tmp_path / "mine.yaml", text))
    assert error.code == Exit.USAGE
    assert error.hint


def test_a_circle_of_extends_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    error = refused(write(tmp_path / "b.yaml", "extends: a.yaml\n"))
    assert "extends itself" in error.message


def test_an_unknown_profile_names_the_nearest() -> None:
    error = refused("int4-gtpq")
    assert error.message == "no profile is named `int4-gtpq`"
    assert error.hint == "did you mean `int4-gptq`?"


def test_a_missing_file_is_told_as_a_missing_file() -> None:
    error = refused("nowhere/mine.yaml")
    assert error.message == "no pipeline or profile file `nowhere/mine.yaml`"


def test_nothing_in_a_profile_can_run_code(tmp_path: Path) -> None:
    error = refused(write(tmp_path / "mine.yaml", "eval: !!python/object/apply:os.getcwd []\n"))
    assert error.message.startswith("mine.yaml:1: not valid YAML")


@pytest.mark.parametrize(
    ("text", "value"),
    [("4", 4), ("0.5", 0.5), ("true", True), ("null", None), ("[1, 4]", [1, 4]), ("gptq", "gptq"), ("'4'", "4")],
)
def test_a_value_is_typed_as_yaml_types_it(text: str, value: object) -> None:
    assert profiles.parse_value(text) == value


def test_every_shipped_profile_describes_itself() -> None:
    assert {"demo", "exact", "int4-awq", "int4-gptq", "int8-smoothquant"} <= set(profiles.shipped())
    for name in profiles.shipped():
        assert profiles.load(name).description, name
