"""One option of TensorRT-LLM's programs at a time: whether the version and the mode have it, and its value fits it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from llmopt.artifacts.outcome import Json
from llmopt.compilers.trt_llm import versions
from llmopt.compilers.trt_llm.versions import Mode, Option, Section, Version
from llmopt.errors import SettingsError, nearest

#: Which settings hold options, of which program, in which sections of the table.
_SETTINGS: Mapping[str, tuple[str, tuple[Section, ...]]] = {
    "build": ("trtllm-build", ("build",)),
    "serve": ("trtllm-serve", ("serve", "yaml")),
}
#: By the kind of an option: what a value of it must be, and how to write one.
_WORDS: Mapping[str, tuple[str, str]] = {
    "int": ("a whole number", "such as `64`"),
    "ints": ("whole numbers", "such as `[1, 2, 4]`"),
    "float": ("a number", "such as `0.9`"),
    "text": ("text", "quote it"),
    "texts": ("texts", "such as `[one, two]`"),
    "flag": ("true or false", "write it as `true`"),
    "onoff": ("`enable` or `disable`", "true and false are taken too"),
}


def check(setting: Literal["build", "serve"], values: Mapping[str, Json], version: Version, mode: Mode) -> None:
    """Raise SettingsError for the first of `compile.<setting>` that cannot be given."""
    program, sections = _SETTINGS[setting]
    if values and setting == "build" and mode == "bundle":
        raise SettingsError(
            "`compile.build` is for `trtllm-build`, and a bundle is not built",
            hint="use `mode: engine`, or say it in `compile.serve`",
        )
    for name, value in values.items():
        rows = [row for section in sections if (row := versions.option(section, name)) is not None]
        if not rows:
            known = (row for section in sections for row in versions.table().options[section].values())
            raise SettingsError(
                f"`compile.{setting}.{name}` is no option of {program}",
                hint=nearest(name, versions.usable(known, version, mode)),
            )
        _check_option(rows[0], value, f"compile.{setting}.{name}", version, mode)


def _check_option(row: Option, value: Json, where: str, version: Version, mode: Mode) -> None:
    if row.refused is not None:
        raise SettingsError(f"`{where}` cannot be set", hint=row.refused)
    if row.mode not in (None, mode):
        other = f"only `mode: {row.mode}` has it"
        raise SettingsError(f"`{where}` is not for `mode: {mode}`", hint=row.instead or other)
    if not version.has(row):
        known = f"it came with `{row.since}`" if row.since else f"it was there before `{row.before}`"
        raise SettingsError(f"TensorRT-LLM `{version.name}` has no `{row.name}`", hint=row.instead or known)
    _check_value(row, value, where, version, mode)


def _check_value(row: Option, value: Json, where: str, version: Version, mode: Mode) -> None:
    if row.kind == "object":
        if not isinstance(value, dict):
            raise SettingsError(f"`{where}` must be a mapping, not `{value}`", hint="write `name: ...` below it")
        for name, item in value.items():
            if name not in row.fields:
                raise SettingsError(
                    f"`{where}` has no field `{name}`",
                    hint=nearest(name, versions.usable(row.fields.values(), version, mode)),
                )
            _check_option(row.fields[name], item, f"{where}.{name}", version, mode)
    elif row.kind == "choice":
        if value not in row.choices:
            raise SettingsError(f"`{where}` cannot be `{value}`", hint=nearest(str(value), row.choices))
    elif row.kind in ("ints", "texts"):
        for item in value if isinstance(value, list) and value else [None]:
            _check_item(row, item, value, where)
    else:
        _check_item(row, value, value, where)


def _check_item(row: Option, item: Json, value: Json, where: str) -> None:
    """One number, text or truth; `value` is all that was given, for the message."""
    if not _fits(str(row.kind), item):
        words, example = _WORDS[str(row.kind)]
        raise SettingsError(f"`{where}` must be {words}, not `{value}`", hint=example)
    if isinstance(item, str) and "{" in item:  # in commands.json
        raise SettingsError(f"`{where}` cannot hold a brace, which stands for a placeholder", hint="put it in a file")
    if isinstance(item, int | float) and not isinstance(item, bool):
        low, high = row.min, row.max
        if (low is not None and item < low) or (high is not None and item > high):
            limits = [f"at least {low:g}"] if low is not None else []
            limits += [f"at most {high:g}"] if high is not None else []
            raise SettingsError(f"`{where}` cannot be `{item}`", hint=" and ".join(limits))


def _fits(kind: str, item: Json) -> bool:
    if kind in ("int", "ints"):
        return isinstance(item, int) and not isinstance(item, bool)
    if kind == "float":
        return isinstance(item, int | float) and not isinstance(item, bool)
    if kind in ("text", "texts"):
        return isinstance(item, str) and item != ""
    return isinstance(item, bool) or (kind == "onoff" and item in ("enable", "disable"))
