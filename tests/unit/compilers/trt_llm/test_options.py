"""Every option that a version has takes what its row says, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llmopt.artifacts.outcome import Json
from llmopt.compilers.trt_llm import options, versions
from llmopt.compilers.trt_llm.versions import Option, Version
from llmopt.errors import SettingsError


def right(row: Option, version: Version, mode: versions.Mode) -> Json:
    """A value that the row allows."""
    if row.kind == "object":
        usable = set(versions.usable(row.fields.values(), version, mode))
        return {name: right(each, version, mode) for name, each in row.fields.items() if name in usable}
    number = row.min if row.min is not None else 1
    values: dict[str, Json] = {
        "choice": row.choices[0] if row.choices else None,
        "int": int(number),
        "ints": [int(number)],
        "float": number,
        "text": "word",
        "texts": ["word"],
        "flag": True,
        "onoff": "disable",
    }
    return values[str(row.kind)]


def wrong(row: Option) -> Iterator[Json]:
    """Values that no row of this kind allows."""
    yield from (None, [], [None])
    if row.kind != "object":
        yield {}
    if row.kind not in ("flag", "onoff"):
        yield True
    if row.kind not in ("text", "choice"):
        yield "neither this nor that"
    if row.kind not in ("int", "float"):
        yield 7
    if row.kind in ("int", "float") and row.min is not None:
        yield row.min - 1
    if row.kind in ("int", "float") and row.max is not None:
        yield row.max + 1


def rows() -> Iterator[tuple[str, Option]]:
    sections: tuple[tuple[str, versions.Section], ...] = (("build", "build"), ("serve", "serve"), ("serve", "yaml"))
    for setting, section in sections:
        for row in versions.table().options[section].values():
            yield setting, row


@pytest.mark.parametrize("name", ["0.21.0", "1.1.0", "1.2.1", "1.3.0rc20", "1.4.0rc1"])
def test_a_version_takes_every_option_that_it_has_and_refuses_the_others(name: str) -> None:
    version = versions.find(name)
    for mode in version.modes:
        for setting, row in rows():
            if setting == "build" and mode == "bundle":
                continue
            if row.name in versions.usable([row], version, mode):
                options.check(setting, {row.name: right(row, version, mode)}, version, mode)  # type: ignore[arg-type]
            else:
                with pytest.raises(SettingsError) as caught:
                    options.check(setting, {row.name: None}, version, mode)  # type: ignore[arg-type]
                assert caught.value.hint, row.name


def test_an_option_refuses_what_is_not_of_its_kind() -> None:
    version = versions.find("1.2.1")
    for setting, row in rows():
        mode = row.mode or "engine"
        if row.name not in versions.usable([row], version, mode):
            continue
        for value in wrong(row):
            with pytest.raises(SettingsError, match=row.name):
                options.check(setting, {row.name: value}, version, mode)  # type: ignore[arg-type]


def test_the_hint_for_a_field_names_none_that_the_version_lacks() -> None:
    version = versions.find("1.2.1")
    with pytest.raises(SettingsError) as caught:
        options.check("serve", {"kv_cache_config": {"zzz": 1}}, version, "bundle")
    assert "`enable_block_reuse`" in str(caught.value.hint)
    assert "max_util_for_resume" not in str(caught.value.hint)
