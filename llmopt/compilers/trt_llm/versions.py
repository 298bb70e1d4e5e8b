"""The table of TensorRT-LLM's versions: the modes, flags and numbers that each one has. Data in versions.yaml.

`find(name) -> Version`, `known() -> tuple[str, ...]`, `Version.option(section, name) -> Option`. A row whose source
could not be read at the release itself says which source it was.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from llmopt.errors import SettingsError, nearest

Mode: TypeAlias = Literal["engine", "bundle"]
#: build: flags of `trtllm-build`. serve: flags of `trtllm-serve`. yaml: fields of its YAML (`LlmArgs`).
Section: TypeAlias = Literal["build", "serve", "yaml"]
#: The last one with the TensorRT engine builder, and the last release with it.
LAST_BUILDER, LAST_RELEASE_WITH_ENGINES = "1.3.0rc20", "1.2.1"
KINDS = ("int", "float", "text", "texts", "ints", "flag", "onoff")
_FILE = Path(__file__).with_name("versions.yaml")
_NAME = re.compile(r"((\d+)\.(\d+)\.(\d+)(?:rc(\d+))?)(?:\.post\d+)?")
_FINAL = 1 << 30  # a release comes after all of its candidates

_Order: TypeAlias = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One thing that a version can be told.

    kind: of KINDS, "choice" (of `choices`) or "object" (of `fields`); None where it is `refused`, for that reason.
    mode: the only one that has it. since, before: the versions that have it. instead: what to do where it is not.
    """

    name: str
    source: str
    kind: str | None = None
    choices: tuple[str, ...] = ()
    fields: Mapping[str, Option] = field(default_factory=dict)
    min: float | None = None
    max: float | None = None
    mode: Mode | None = None
    since: str | None = None
    before: str | None = None
    instead: str | None = None
    refused: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Numbers:
    """A kind of weights or of KV cache: the compute capabilities, times ten, that run it, by mode; both ends in."""

    name: str
    words: str
    source: str
    architectures: Mapping[Mode, tuple[tuple[int, int], ...]]

    def runs_on(self, capability: int, mode: Mode) -> bool:
        return any(first <= capability <= last for first, last in self.architectures.get(mode, ()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """A TensorRT-LLM. The first of `modes` is what `mode: auto` means."""

    name: str
    modes: tuple[Mode, ...]
    source: str

    @property
    def image(self) -> str:
        """NVIDIA's container of it (release notes of 0.20: released on NGC from there on)."""
        return f"nvcr.io/nvidia/tensorrt-llm/release:{self.name}"

    def has(self, option: Option) -> bool:
        """Whether an option of the table is one of this version."""
        order = _order(self.name)
        since, before = option.since, option.before
        return (since is None or _order(since) <= order) and (before is None or order < _order(before))

    def at_least(self, name: str) -> bool:
        return _order(name) <= _order(self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """All of versions.yaml."""

    sources: Mapping[str, str]
    versions: Mapping[str, Version]
    options: Mapping[Section, Mapping[str, Option]]
    algorithms: Mapping[str, Numbers]
    kv_cache: Mapping[str, Numbers]


@functools.cache
def table() -> Table:
    import yaml

    document = yaml.load(_FILE.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    sections: tuple[Section, ...] = ("build", "serve", "yaml")
    return Table(
        sources=document["sources"],
        versions={version.name: version for row in document["versions"] for version in _versions(row)},
        options={section: _options(document[section], None) for section in sections},
        algorithms={name: _numbers(name, row) for name, row in document["algorithms"].items()},
        kv_cache={name: _numbers(name, row) for name, row in document["kv_cache"].items()},
    )


def known() -> tuple[str, ...]:
    """Every version, oldest first."""
    return tuple(sorted(table().versions, key=_order))


def find(name: str) -> Version:
    """The row of a version, or of what its `.postN` mends; SettingsError that names the nearest for any other."""
    match, versions = _NAME.fullmatch(name), table().versions
    if match is not None and match[1] in versions:
        return replace(versions[match[1]], name=name)
    if match is None:
        raise SettingsError(f"`{name}` is no version of TensorRT-LLM", hint=nearest(name, known()))
    before = [other for other in known() if _order(other) < _order(name)]
    neighbour = before[-1] if before else known()[0]
    raise SettingsError(
        f"TensorRT-LLM `{name}` is not in the table of versions, so its flags are not known",
        hint=f"the nearest that is: `{neighbour}`; all: {_abridged()}",
    )


def option(section: Section, name: str) -> Option | None:
    """The row of a flag or field, None where the table has none."""
    return table().options[section].get(name)


def usable(rows: Iterable[Option], version: Version, mode: Mode) -> list[str]:
    """The names of those that can be given."""
    return [row.name for row in rows if row.refused is None and row.mode in (None, mode) and version.has(row)]


def _order(name: str) -> _Order:
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(name)
    _, major, minor, patch, candidate = match.groups()
    return int(major), int(minor), int(patch), _FINAL if candidate is None else int(candidate)


def is_past_the_builder(name: str) -> bool:
    """Whether a version, known or not, came after the engine builder was removed."""
    return bool(_NAME.fullmatch(name)) and _order(name) > _order(LAST_BUILDER)


def _abridged() -> str:
    """The known versions in words, the candidates of a release as their first and last."""
    runs = [list(run) for _, run in itertools.groupby(known(), key=lambda name: name.partition("rc")[0])]
    return ", ".join(f"`{run[0]}`" + (f" to `{run[-1]}`" if len(run) > 1 else "") for run in runs)


def _versions(row: Mapping[str, Any]) -> Iterator[Version]:
    first, last = row.get("candidates", (None, None))
    suffixes = [""] if first is None else [str(number) for number in range(first, last + 1)]
    for suffix in suffixes:
        yield Version(name=row["name"] + suffix, modes=tuple(row["modes"]), source=row["source"])


def _options(rows: Mapping[str, Mapping[str, Any]], inherited: str | None) -> dict[str, Option]:
    return {name: _option(name, row, inherited) for name, row in rows.items()}


def _option(name: str, row: Mapping[str, Any], inherited: str | None) -> Option:
    rest = dict(row)
    source, kind = rest.pop("source", inherited), rest.pop("type", None)
    if isinstance(kind, list):
        return Option(name=name, source=source, kind="choice", choices=tuple(kind), **rest)
    if isinstance(kind, dict):
        return Option(name=name, source=source, kind="object", fields=_options(kind, source), **rest)
    return Option(name=name, source=source, kind=kind, **rest)


def _numbers(name: str, row: Mapping[str, Any]) -> Numbers:
    modes: tuple[Mode, ...] = ("engine", "bundle")
    ranges = {mode: tuple((first, last) for first, last in row[mode]) for mode in modes if mode in row}
    return Numbers(name=name, words=row["words"], source=row["source"], architectures=ranges)
