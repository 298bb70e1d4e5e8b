"""What a compile target offers."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

from llmopt.artifacts.outcome import Outcome, Progress


class Target(Protocol):
    """A frozen keyword-only dataclass of settings; its module imports no backend. It is `Direct` or `Staged`.

    portable: whether what it makes is the same on every machine; else the CPU's architecture is in the key.
    """

    portable: ClassVar[bool]

    @property
    def target(self) -> str:
        """The name in TARGETS."""

    def deps(self) -> tuple[str, ...]:
        """The distributions whose versions change the bits."""

    def check(self, model: Path) -> None:
        """Raise LlmoptError for anything that would be refused, reading only small files and headers."""


@runtime_checkable
class Direct(Target, Protocol):
    """A target whose engine is made in one go, on this machine."""

    def compile(self, model: Path, out: Path, progress: Progress) -> Outcome:
        """Check and write the engine; raises BackendMissingError where the backend is not installed."""


@runtime_checkable
class Staged(Target, Protocol):
    """A target whose engine is planned and prepared on any machine, and built where its device is."""

    def plan(self, model: Path, out: Path, progress: Progress) -> Outcome:
        """Write `plan.json`: what will be made, what it takes and which device it needs."""

    def prepare(self, model: Path, plan: Path, out: Path, progress: Progress) -> Outcome:
        """Write and validate all that the build needs; the status is `prepared`."""
