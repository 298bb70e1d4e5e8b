"""What a bench does: its settings, and the subjects that it loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmopt.errors import SettingsError
from llmopt.profiles.settings import build


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """One thing to load: the server at `url`, or the engine folder that bench serves itself.

    With neither, the engine is still to be made by an earlier stage: it can be checked, not measured.
    """

    name: str
    url: str | None = None  # with or without `/v1` at its end
    engine: Path | None = None
    tokenizer: Path | None = None  # a tokenizer.json, or a folder with one; by default that of the engine
    artifact: str | None = None  # the engine's id, for the report

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer.json that makes prompts of an exact length, where there is one."""
        for place in (self.tokenizer, self.engine):
            if place is not None:
                file = place / "tokenizer.json" if place.is_dir() else place
                if file.is_file():
                    return file
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchSettings:
    """The closed loop: `concurrency` streams, each of which sends its next request when the last one has ended."""

    concurrency: tuple[int, ...] = (1, 4)  # one level after the other
    requests: int | None = None  # measured per level and round; without it and without a duration: max(8, 4 * level)
    duration_s: float | None = None  # no request starts later; those in flight then still end and count
    prompt_tokens: int = 128
    output_tokens: int = 64
    warmup: int = 2  # requests before each level that no figure counts
    rounds: int = 1  # the whole again; a round takes the subjects in random order and starts engines afresh
    endpoint: Literal["completions", "chat"] = "completions"
    seed: int = 0  # of the prompts and of the order of the subjects
    timeout_s: float = 120.0  # for one request, from sending to the last byte
    model: str | None = None  # of servers at a URL; asked of their /v1/models when not given

    def __post_init__(self) -> None:
        _at_least(1, rounds=self.rounds, prompt_tokens=self.prompt_tokens, output_tokens=self.output_tokens)
        _at_least(0, warmup=self.warmup, seed=self.seed)
        if not self.concurrency or min(self.concurrency) < 1 or len(set(self.concurrency)) < len(self.concurrency):
            given = ", ".join(map(str, self.concurrency))
            raise SettingsError(f"`concurrency` cannot be `{given}`", hint="give different numbers, as in `1, 4`")
        for name, seconds in (("duration_s", self.duration_s), ("timeout_s", self.timeout_s)):
            if seconds is not None and not 0 < seconds < float("inf"):
                raise SettingsError(f"`{name}` cannot be `{seconds}`", hint="give seconds above 0")
        if self.requests is not None:
            _at_least(1, requests=self.requests)
            if self.requests < max(self.concurrency):
                raise SettingsError(
                    f"`requests` of {self.requests} cannot keep {max(self.concurrency)} streams busy",
                    hint=f"give `requests: {4 * max(self.concurrency)}` or more, or fewer streams",
                )

    def requests_at(self, streams: int) -> int | None:
        """The most requests of a level and round; None: until the duration ends."""
        if self.requests is None and self.duration_s is None:
            return max(8, 4 * streams)
        return self.requests


def resolve(settings: Mapping[str, Any]) -> BenchSettings:
    """The checked settings, every default spelled out; an unknown key is a `SettingsError`."""
    return build(BenchSettings, settings, where="bench")


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise SettingsError(f"`{name}` cannot be `{value}`", hint=f"give a whole number from {least}")
