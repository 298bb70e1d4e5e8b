"""What a stage hands back to the runner, beside the files it wrote, and what it says on its way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


class Progress(Protocol):
    """Called with one short line whenever a stage has something to say; the command decides where it goes.

    The same as facts, for machines and for a progress bar: `stage`; `done` of `total` steps, and the `seconds` this
    one took (none: it was done before this process); `block`; `errors`, the relative error of each of its linears
    by name; `rss_bytes` and `peak_rss_bytes`. A stage sends those it has, and may send more.
    """

    def __call__(self, line: str, /, **facts: Json) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A stage is a function from artifacts and settings to a folder of files and an outcome."""

    status: str = "complete"  # of an engine: "compiled", or "prepared" where the machine could not finish
    metrics: Mapping[str, Json] = field(default_factory=dict)
    events: tuple[str, ...] = ()  # fallbacks that changed numbers, in order
    byproducts: Mapping[str, str] = field(default_factory=dict)  # texts for the attestation, by name: a log


def silent(line: str, /, **facts: Json) -> None:
    """A progress that says nothing."""


def within(progress: Progress, name: str, **more: Json) -> Progress:
    """The progress of a part: every line begins with its name, and `more` is among the facts."""

    def say(line: str, /, **facts: Json) -> None:
        progress(f"{name}: {line}", **{**more, **facts})

    return say
