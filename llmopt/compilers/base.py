"""What a compile target offers."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from llmopt.artifacts.outcome import Outcome, Progress


class Target(Protocol):
    """A frozen keyword-only dataclass of settings; its module imports no backend, its `compile` does."""

    @property
    def target(self) -> str:
        """The name in TARGETS."""

    def deps(self) -> tuple[str, ...]:
        """The distributions whose versions change the bits."""

    def check(self, model: Path) -> None:
        """Raise LlmoptError for anything that `compile` would refuse, reading only small files and headers."""

    def compile(self, model: Path, out: Path, progress: Progress) -> Outcome:
        """Check and write the engine; raises BackendMissingError where the backend is not installed."""
