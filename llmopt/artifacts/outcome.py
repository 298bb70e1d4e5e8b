"""What a stage hands back to the runner, beside the files it wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

#: Called with one short line whenever a stage has something to say; the command decides where it goes.
Progress: TypeAlias = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A stage is a function from artifacts and settings to a folder of files and an outcome."""

    status: str = "complete"  # of an engine: "compiled", or "prepared" where the machine could not finish
    metrics: Mapping[str, Json] = field(default_factory=dict)
    events: tuple[str, ...] = ()  # fallbacks that changed numbers, in order


def silent(message: str) -> None:
    """A progress that says nothing."""
