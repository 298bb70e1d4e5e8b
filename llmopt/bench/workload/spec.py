"""What is sent, as data: how long prompts and answers are, what they share, how many turns; or a file that says it."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llmopt.errors import LlmoptError, SettingsError, nearest
from llmopt.profiles import WORKLOADS, read_mapping
from llmopt.profiles.settings import build

DATA_SUFFIXES = (".jsonl", ".json", ".csv")
_OUTPUT_TOKENS = 64  # where nothing says how long an answer is to be
_Z90 = 1.2815515655446004  # standard deviations from the median to the 90th percentile of a normal distribution
_DRAWS = 100  # outside min and max, before a value is moved to the nearer of them


@dataclass(frozen=True, kw_only=True, slots=True)
class Length:
    """A number that differs from one prompt (or answer, conversation, pause) to the next.

    `median` and `p90`: log-normal, the shape that lengths have in production (ServeGen, arXiv:2505.09999).
    `mean` and `sd`: normal. Neither: evenly from `min` to `max`. What falls outside `min` and `max` is drawn again.
    """

    median: float | None = None
    p90: float | None = None
    mean: float | None = None
    sd: float | None = None
    min: float | None = None
    max: float | None = None

    def __post_init__(self) -> None:
        shape = tuple(name for name in ("median", "p90", "mean", "sd") if getattr(self, name) is not None)
        if shape not in ((), ("median", "p90"), ("mean", "sd")) or (not shape and None in (self.min, self.max)):
            hint = "give `median` and `p90`, or `mean` and `sd`, or `min` and `max`"
            raise SettingsError(f"a distribution cannot be made of {_named(shape)}", hint=hint)
        for name in ("median", "p90", "mean", "sd", "min", "max"):
            value = getattr(self, name)
            if value is not None and not (0 <= value < math.inf and (value > 0 or name in ("sd", "min"))):
                raise SettingsError(f"`{name}` of a distribution cannot be `{value}`", hint="give a number above 0")
        middle = self.mean if self.median is None else self.median
        _in_order("min", self.min, "its middle", middle)
        _in_order("its middle", middle, "p90", self.p90)
        _in_order("its middle", middle, "max", self.max)
        _in_order("min", self.min, "max", self.max)

    def draw(self, rng: random.Random) -> float:
        least, most = self.min or 0.0, math.inf if self.max is None else self.max
        for _ in range(_DRAWS):
            value = self._draw(rng, least, most)
            if least <= value <= most:
                return value
        return min(max(value, least), most)

    def _draw(self, rng: random.Random, least: float, most: float) -> float:
        if self.median is not None and self.p90 is not None:
            return rng.lognormvariate(math.log(self.median), math.log(self.p90 / self.median) / _Z90)
        if self.mean is not None and self.sd is not None:
            return rng.normalvariate(self.mean, self.sd)
        return rng.uniform(least, most)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Conversations of `turns` turns, made from held-out text, or those of `file`.

    A conversation begins with one of `prefixes` texts of `prefix_tokens`, shared with others (a system prompt), in
    addition to `prompt_tokens` of its own. `output_tokens` and `turns` are None only with a file: as the file says, or
    64 tokens. A file's rows are `.jsonl` of prompts or messages, ShareGPT `.json`, or a trace: Mooncake `.jsonl`,
    BurstGPT or Azure `.csv`.
    """

    description: str = ""
    prompt_tokens: int | Length = 128
    output_tokens: int | Length | None = None
    prefix_tokens: int | Length = 0
    prefixes: int = 1
    turns: int | Length | None = None  # with a file: at most so many of each conversation
    next_tokens: int | Length | None = None  # of what is said in later turns; None: as `prompt_tokens`
    think_s: float | Length = 0.0  # from the end of an answer to the next turn
    endpoint: Literal["completions", "chat"] | None = None  # that suits it, where none is asked for
    file: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "next_tokens", "output_tokens", "prefixes", "turns"):
            _check(name, getattr(self, name), least=1)
        for name in ("prefix_tokens", "think_s"):
            _check(name, getattr(self, name), least=0)

    @property
    def most_tokens(self) -> int | None:
        """The longest that a conversation may become with its last answer; None where nothing bounds it."""
        parts = (self.prefix_tokens, self.prompt_tokens, self.next_tokens or self.prompt_tokens)
        prefix, first, later = (_most(part) for part in parts)
        turns, output = _most(self.turns), _most(self.output_tokens)
        longest = prefix + first + (turns - 1) * later + turns * output
        return round(longest) if self.file is None and math.isfinite(longest) else None


def shipped() -> tuple[str, ...]:
    """The names of the workloads that come with the package."""
    return tuple(sorted(file.stem for file in WORKLOADS.glob("*.yaml")))


def resolve(
    reference: str | Mapping[str, Any] | None = None,
    *,
    prompt_tokens: int | None = None,
    output_tokens: int | None = None,
    prefix_tokens: int | None = None,
    prefixes: int | None = None,
    turns: int | None = None,
    think_s: float | None = None,
) -> Workload:
    """The workload that `reference` names (shipped, YAML, data file) or is (a mapping), with what is given instead.

    Every default is spelled out. Nothing given: 128 tokens of held-out text, 64 of output, nothing shared.
    Only the existence of a data file is checked here, its rows where it is read.
    """
    values = _values(reference)
    given = {
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "prefix_tokens": prefix_tokens,
        "prefixes": prefixes,
        "turns": turns,
        "think_s": think_s,
    }
    values |= {name: value for name, value in given.items() if value is not None}
    workload = build(Workload, values, where="workload")
    if workload.file is None:
        defaults = replace(workload, output_tokens=workload.output_tokens or _OUTPUT_TOKENS, turns=workload.turns or 1)
        return replace(defaults, next_tokens=defaults.next_tokens or defaults.prompt_tokens)
    plain = Workload()
    for name in ("prompt_tokens", "prefix_tokens", "prefixes", "next_tokens"):
        if getattr(workload, name) != getattr(plain, name):
            message = f"`{name}` does not go with `{Path(workload.file).name}`, whose rows have their own length"
            raise SettingsError(message, hint=f"leave out `{name}` or the file")
    return workload


def draw_tokens(length: int | Length | None, rng: random.Random) -> int:
    """A whole number of at least 1 from a distribution; a number, or the default for None, as it is."""
    if isinstance(length, Length):
        return max(1, round(length.draw(rng)))
    return _OUTPUT_TOKENS if length is None else length


def draw_s(length: float | Length, rng: random.Random) -> float:
    return length.draw(rng) if isinstance(length, Length) else length


def _values(reference: str | Mapping[str, Any] | None) -> dict[str, Any]:
    if reference is None:
        return {}
    if isinstance(reference, Mapping):
        return _with_file(dict(reference), Path())
    path = Path(reference)
    if reference in shipped() and not path.is_file():
        path = WORKLOADS / f"{reference}.yaml"
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(path)
    if path.suffix in DATA_SUFFIXES:
        return _with_file({"file": reference}, Path())
    if path.suffix or len(path.parts) > 1:
        suffixes = ", ".join(f"`{suffix}`" for suffix in (".yaml", *DATA_SUFFIXES))
        raise SettingsError(f"`{reference}` is not a workload", hint=f"give a file that ends in one of {suffixes}")
    raise SettingsError(f"no workload is named `{reference}`", hint=nearest(reference, shipped()))


def _from_yaml(file: Path) -> dict[str, Any]:
    """The settings in a workload's file; each that does not fit is an error with its line."""
    if not file.is_file():
        raise LlmoptError(f"no workload file `{file}`", hint=f"shipped: {', '.join(shipped())}")
    values, lines = read_mapping(file, hint="write one `setting: value` a line")
    for key, value in values.items():
        try:
            build(Workload, {key: value}, where="workload")
        except SettingsError as error:
            raise SettingsError(f"{file.name}:{lines[key]}: {error.message}", hint=error.hint) from None
    return _with_file(values, file.parent)


def _with_file(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`values` with the absolute path of their data file, which is relative to the YAML that names it."""
    if not isinstance(values.get("file"), str):
        return values
    file = folder / Path(values["file"]).expanduser()
    if file.suffix not in DATA_SUFFIXES:
        known = ", ".join(f"`{suffix}`" for suffix in DATA_SUFFIXES)
        raise SettingsError(f"`{file}` is no data of a workload", hint=f"its name should end in one of {known}")
    if not file.is_file():
        raise LlmoptError(f"no workload file `{file}`", hint="check the path")
    return {**values, "file": str(file.resolve())}


def _check(name: str, value: float | Length | None, *, least: int) -> None:
    if isinstance(value, int | float) and not least <= value < math.inf:
        raise SettingsError(f"`{name}` cannot be `{value}`", hint=f"give a number from {least}")


def _most(length: float | Length | None) -> float:
    if isinstance(length, Length):
        return math.inf if length.max is None else length.max
    return _OUTPUT_TOKENS if length is None else length


def _in_order(low_name: str, low: float | None, high_name: str, high: float | None) -> None:
    if low is not None and high is not None and low > high:
        message = f"a distribution with {low_name} `{low:g}` cannot have {high_name} `{high:g}`"
        raise SettingsError(message, hint="min, median, p90 and max go up")


def _named(names: tuple[str, ...]) -> str:
    return " and ".join(f"`{name}`" for name in names) if names else "nothing"
