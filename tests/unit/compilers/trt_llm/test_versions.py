"""The table of TensorRT-LLM's versions is whole, every row of it has a source, and it answers for any version."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from llmopt.compilers.trt_llm import versions
from llmopt.compilers.trt_llm.versions import Option
from llmopt.errors import SettingsError

GOLDEN = Path(__file__).parents[3] / "golden"
#: All that a program can be told, and in which sections of the table it is. trtllm-build: commands/build.py at 65f1d153
#: and `cli_plugin_args` of plugin.py at c20322ff. trtllm-serve: api_stability/references/trtllm_serve_cli.yaml at
#: 029e223d, with the aliases that our users know. LlmArgs: api_stability/references(_committed)/llm.yaml at ea35fd67.
PROGRAMS = [
    ("trtllm-build.txt", ("build",)),
    ("trtllm-serve.txt", ("serve", "yaml")),
    ("trtllm-args.txt", ("serve", "yaml")),
]


def every_option() -> Iterator[Option]:
    def walk(rows: Mapping[str, Option]) -> Iterator[Option]:
        for row in rows.values():
            yield row
            yield from walk(row.fields)

    for section in versions.table().options.values():
        yield from walk(section)


def test_every_row_names_a_source_of_the_table_and_every_source_is_named() -> None:
    table = versions.table()
    rows = [*every_option(), *table.versions.values(), *table.algorithms.values(), *table.kv_cache.values()]
    assert {row.source for row in rows} == set(table.sources)


def test_every_option_has_a_kind_or_a_reason_why_it_cannot_be_given() -> None:
    kinds = {*versions.KINDS, "choice", "object"}
    for row in every_option():
        assert (row.kind in kinds) != (row.refused is not None), row.name
        assert row.mode in (None, "engine", "bundle"), row.name


def test_since_and_before_are_versions_of_the_table() -> None:
    for row in every_option():
        assert {row.since, row.before} - {None} <= set(versions.known()), row.name


@pytest.mark.parametrize(("file", "sections"), PROGRAMS)
def test_everything_that_a_program_can_be_told_has_a_row(file: str, sections: tuple[versions.Section, ...]) -> None:
    names = (GOLDEN / file).read_text(encoding="utf-8").split()
    assert [name for name in names if not any(versions.option(section, name) for section in sections)] == []


def test_no_name_is_both_a_flag_of_trtllm_serve_and_a_field_of_its_yaml() -> None:
    options = versions.table().options
    assert not set(options["serve"]) & set(options["yaml"])


def test_candidates_are_ordered_by_number_and_come_before_their_release() -> None:
    known = versions.known()
    assert known[:6] == ("0.21.0rc1", "0.21.0", "1.0.0", "1.1.0", "1.2.0", "1.2.1")
    assert known.index("1.3.0rc9") < known.index("1.3.0rc10")


@pytest.mark.parametrize(
    ("name", "modes"),
    [
        ("0.21.0", ("engine",)),
        ("1.1.0", ("engine",)),
        ("1.2.1", ("bundle", "engine")),
        ("1.3.0rc20", ("bundle", "engine")),
        ("1.3.0rc21", ("bundle",)),
        ("1.3.0rc29", ("bundle",)),
        ("1.4.0rc1", ("bundle",)),
        ("1.3.0rc12.post1", ("bundle", "engine")),
    ],
)
def test_the_modes_of_a_version_begin_with_its_default(name: str, modes: tuple[str, ...]) -> None:
    assert versions.find(name).modes == modes


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("1.2.7", "`1.2.1`"),
        ("0.9.0", "`0.21.0rc1`"),
        ("1.3.0rc99", "`1.3.0rc29`"),
        ("1.0.3", "`1.0.0`"),
        ("2.0.0", "`1.4.0rc1`"),
    ],
)
def test_an_unknown_version_names_the_nearest_known_one(name: str, nearest: str) -> None:
    with pytest.raises(SettingsError, match="is not in the table") as caught:
        versions.find(name)
    assert str(caught.value.hint).startswith(f"the nearest that is: {nearest};")


@pytest.mark.parametrize("name", ["latest", "1.2", "v1.2.1", "1.2.1 ", ""])
def test_what_is_no_version_is_told_as_such(name: str) -> None:
    with pytest.raises(SettingsError, match="is no version of TensorRT-LLM"):
        versions.find(name)


def test_the_known_versions_fit_on_a_line() -> None:
    with pytest.raises(SettingsError) as caught:
        versions.find("9.9.9")
    assert len(str(caught.value.hint)) < 160


def test_a_container_is_named_by_its_version() -> None:
    assert versions.find("1.2.1").image == "nvcr.io/nvidia/tensorrt-llm/release:1.2.1"


def test_a_mended_release_is_known_by_its_own_name() -> None:
    assert versions.find("1.3.0rc12.post1").name == "1.3.0rc12.post1"
    assert not versions.is_past_the_builder("1.3.0rc20.post1")
    assert versions.is_past_the_builder("1.3.0rc22.post1")
    with pytest.raises(SettingsError, match=r"`1.0.7.post1` is not in the table"):
        versions.find("1.0.7.post1")
