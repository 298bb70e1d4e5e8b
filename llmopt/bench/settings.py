"""What a bench does: its settings, and the subjects that it loads."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmopt.bench.gate import names, slo
from llmopt.bench.gate.slo import Slo
from llmopt.bench.workload import spec
from llmopt.bench.workload.spec import Workload
from llmopt.errors import SettingsError
from llmopt.profiles.settings import build

#: Keys of the section that are short for those of `workload`, each with the key there.
WORKLOAD_KEYS = ("prompt_tokens", "output_tokens", "prefix_tokens", "prefixes", "turns", "think_s")
GATE_ROUNDS = 12
_NEXT_URL = re.compile(r",(?=\s*https?://)")  # a path may have commas of its own
_LOOKS = 3  # of the gate: after `rounds`, twice and four times as many
_OPEN_LOOP_S = 20.0  # how long an open loop lasts where nothing says it
_SHORT_S = 5.0  # of a sweep that says how many requests: so long it lasts at any rate
_FEWEST_ARRIVALS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """One thing to load: servers at `url`, or the engine folder that bench serves itself.

    With neither, the engine is still to be made by an earlier stage: it can be checked, not measured.
    """

    name: str
    url: str | None = None  # with or without `/v1` at its end; several, with commas between, take turns
    engine: Path | None = None
    tokenizer: Path | None = None  # a tokenizer.json, or a folder with one; by default that of the engine
    artifact: str | None = None  # the engine's id, for the report
    lineage: tuple[Mapping[str, Any], ...] = ()  # what the engine was made from, back to the checkpoint

    @property
    def urls(self) -> tuple[str, ...]:
        return () if self.url is None else tuple(part.strip() for part in _NEXT_URL.split(self.url) if part.strip())

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
class LoadShape:
    """What is asked of the client: so many streams, or so many requests a second, or (both None) as a trace says."""

    label: str  # in reports: c4, r2.5, trace
    streams: int | None = None
    rate: float | None = None
    ramp_s: float = 0.0  # of the streams or of the rate
    in_flight: int | None = None  # open loop: at most so many at once


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchSettings:
    """A load test. `concurrency` is a closed loop: a stream sends its next request when its last one has ended.

    `rate` is an open loop: requests are sent when they are due, whatever the server does. A workload that is a trace
    says itself when, unless one of the two is given.
    """

    concurrency: tuple[int, ...] = ()  # one level after the other; (1, 4) where nothing else says how hard to press
    rate: tuple[float, ...] = ()  # requests a second, one level after the other
    sweep: Literal["concurrency", "rate"] | None = None  # find the knee, and the largest load that meets the SLOs
    arrivals: Literal["constant", "poisson", "gamma"] = "poisson"
    burstiness: float = 1.0  # of `gamma`: its shape; below 1 in bursts, 1 as `poisson`, above 1 more even
    ramp_s: float = 0.0  # the load grows from nothing over this time
    speed: float = 1.0  # of a trace: 2 sends twice as fast
    in_flight: int | None = None  # open loop: no more at once, what is due beyond is sent late and told
    requests: int | None = None  # measured per level and round; see `requests_at`
    duration_s: float | None = None  # no request starts later; those in flight then still end and count
    warmup: int = 2  # requests before each level that no figure counts
    warmup_s: float = 0.0  # requests sent in so many seconds at the beginning of a load: no figure counts them
    cooldown_s: float = 0.0  # nor those sent in so many seconds at its end
    workload: Workload = field(default_factory=Workload)
    endpoint: Literal["completions", "chat", "responses", "triton", "sagemaker", "tgi"] = "completions"
    rounds: int = 1  # the whole again; a round takes the subjects in random order and starts engines afresh
    max_rounds: int = 1  # of the gate: while it cannot tell, it doubles the rounds up to so many
    seed: int = 0  # of the prompts, the arrivals, and the order of the subjects
    timeout_s: float = 120.0  # for one request, from sending to the last byte
    model: str | None = None  # of servers at a URL; asked of their /v1/models when not given
    slo: tuple[str, ...] = ()  # as in `ttft_ms_p99<=200`, `tokens_per_s>=100`, `goodput>=95%`
    gate: bool = False  # the comparison decides the exit code
    gate_metrics: tuple[str, ...] = names.GATED
    margin: float = 0.05  # of the gate: what is no worse by more than this share passes
    alpha: float = 0.05  # of the gate: how often it may fail what is no worse
    processes: int | None = None  # of the client; by default one, and more while a core is not enough
    in_process: bool = False  # engines without their HTTP server, so that its share can be told
    headers: tuple[str, ...] = ()  # `Name: $VARIABLE`: the value comes from the environment, and is in no report

    def __post_init__(self) -> None:
        _at_least(1, rounds=self.rounds, processes=self.processes, in_flight=self.in_flight, requests=self.requests)
        _at_least(0, warmup=self.warmup, seed=self.seed)
        _check_levels("concurrency", self.concurrency, "1, 4")
        _check_levels("rate", self.rate, "2, 8.5")
        _positive(duration_s=self.duration_s, timeout_s=self.timeout_s, burstiness=self.burstiness, speed=self.speed)
        for name in ("ramp_s", "warmup_s", "cooldown_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise SettingsError(f"`{name}` cannot be `{getattr(self, name)}`", hint="give seconds, or 0")
        if self.duration_s is not None and self.warmup_s + self.cooldown_s >= self.duration_s:
            raise SettingsError(
                f"a warm-up of {self.warmup_s:g} s and a cool-down of {self.cooldown_s:g} s leave nothing of a load of "
                f"{self.duration_s:g} s",
                hint="raise `duration_s`",
            )
        for name in ("margin", "alpha"):
            if not 0 < getattr(self, name) < 1:
                raise SettingsError(f"`{name}` cannot be `{getattr(self, name)}`", hint="as in `5%` or `0.05`")
        if self.concurrency and self.rate:
            raise SettingsError("`concurrency` and `rate` are two kinds of load", hint="give one of them")
        if self.sweep and (self.concurrency or self.rate):
            raise SettingsError("`sweep` finds its levels itself", hint="leave `concurrency` and `rate` out")
        if self.sweep and self.rounds > 1:
            raise SettingsError("`sweep` and `rounds` do not go together", hint="sweep first, then gate at one level")
        if self.max_rounds < self.rounds:
            raise SettingsError(
                f"`max_rounds` of {self.max_rounds} is less than `rounds` of {self.rounds}", hint="raise it"
            )
        if self.requests is not None and self.concurrency and self.requests < max(self.concurrency):
            raise SettingsError(
                f"`requests` of {self.requests} cannot keep {max(self.concurrency)} streams busy",
                hint=f"give `requests: {4 * max(self.concurrency)}` or more, or fewer streams",
            )
        self._check_that_they_apply()
        if self.in_process and (self.rate or self.sweep == "rate"):
            raise SettingsError("`in_process` runs a closed loop only", hint="give `concurrency`")
        for metric in self.gate_metrics:
            base, percentile = names.split(metric)
            if base in names.TIMES and percentile is None:
                raise SettingsError(f"`{metric}` cannot be compared without a percentile", hint=f"write `{base}_p50`")
        slo.parse_all(self.slo)
        for header in self.headers:
            header_of(header)

    def _check_that_they_apply(self) -> None:
        """What would be passed over in silence is refused: whoever gives it expects it to matter."""
        open_loop = bool(self.rate) or self.sweep == "rate"
        trace = self.workload.file is not None and not self.concurrency and self.sweep is None
        for name, given, applies, where in (
            ("arrivals", self.arrivals != "poisson", open_loop, "an open loop: give `rate`"),
            ("burstiness", self.burstiness != 1.0, self.arrivals == "gamma", "`arrivals: gamma`"),
            ("in_flight", self.in_flight is not None, open_loop or trace, "an open loop: give `rate`, or a trace"),
            ("speed", self.speed != 1.0, trace and not self.rate, "a trace that is replayed at its own times"),
            ("max_rounds", self.max_rounds > self.rounds, self.gate, "`gate`, which measures on while it cannot tell"),
        ):
            if given and not applies:
                raise SettingsError(f"`{name}` changes nothing here", hint=f"it is for {where}")

    def loads(self, *, timed: bool) -> tuple[LoadShape, ...]:
        """The levels, in order; `timed`: the workload says when it is sent, if nothing else does."""
        if self.rate:
            return tuple(self.at_rate(rate) for rate in self.rate)
        if timed and not self.concurrency:
            return (LoadShape(label="trace", in_flight=self.in_flight),)
        return tuple(self.at_streams(streams) for streams in self.concurrency or (1, 4))

    def at_streams(self, streams: int) -> LoadShape:
        return LoadShape(label=f"c{streams}", streams=streams, ramp_s=self.ramp_s)

    def at_rate(self, rate: float) -> LoadShape:
        return LoadShape(label=f"r{rate:g}", rate=rate, ramp_s=self.ramp_s, in_flight=self.in_flight)

    @property
    def slos(self) -> tuple[Slo, ...]:
        """Every threshold, the implied one too."""
        return slo.parse_all(self.slo)

    @property
    def looks(self) -> tuple[int, ...]:
        """After how many rounds the gate looks."""
        looks = [self.rounds]
        while self.gate and len(looks) < _LOOKS and 2 * looks[-1] <= self.max_rounds:
            looks.append(2 * looks[-1])
        return tuple(looks)

    def requests_at(self, load: LoadShape) -> int | None:
        """The most conversations of a level and round; None: until the duration, or the trace, ends."""
        if self.requests is not None and self.sweep is not None:  # fewer could tell nothing of the larger loads
            return max(self.requests, 4 * load.streams if load.streams else round(_SHORT_S * (load.rate or 0)))
        if self.requests is not None or self.duration_s is not None:
            return self.requests
        if load.streams is not None:
            return max(8, 4 * load.streams)
        return None if load.rate is None else max(_FEWEST_ARRIVALS, round(_OPEN_LOOP_S * load.rate))


def resolve(settings: Mapping[str, Any]) -> BenchSettings:
    """The checked settings, every default spelled out; an unknown key is a `SettingsError`.

    `workload` may be a name, a file or a mapping; WORKLOAD_KEYS are put over what it says.
    """
    values = dict(settings)
    over = {key: values.pop(key) for key in WORKLOAD_KEYS if values.get(key) is not None}
    workload = spec.resolve(values.pop("workload", None), **over)
    if values.get("gate"):
        values.setdefault("rounds", GATE_ROUNDS)
        values.setdefault("max_rounds", 4 * int(values["rounds"]))
    elif "rounds" in values:
        values.setdefault("max_rounds", values["rounds"])
    for name in ("margin", "alpha"):
        if isinstance(values.get(name), str):
            values[name] = share(values[name], name)
    if isinstance(metrics := values.get("gate_metrics"), list | tuple):  # by the names that figures have
        values["gate_metrics"] = [names.joined(*names.split(str(metric))) for metric in metrics]
    if workload.endpoint is not None:
        values.setdefault("endpoint", workload.endpoint)
    return build(BenchSettings, values | {"workload": workload}, where="bench")


def share(text: str, name: str) -> float:
    """`5%` or `0.05` as 0.05."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise SettingsError(f"`{name}` cannot be `{text}`", hint="as in `5%` or `0.05`") from None


def header_of(text: str) -> tuple[str, str]:
    """`Name: $VARIABLE` or `Name: value` as a header; a key has to come from the environment."""
    name, colon, value = (part.strip() for part in text.partition(":"))
    if not colon or not name or not name.replace("-", "").isalnum() or not name.isascii():
        raise SettingsError(f"`{text}` is not a header", hint="write it as `X-Tenant: $TENANT`")
    if not value.startswith("$"):
        if name.lower() in ("authorization", "api-key", "x-api-key", "cookie"):
            raise SettingsError(
                f"the value of `{name}` would end up in the report", hint=f"write `{name}: $VARIABLE`, and set that"
            )
        found = value
    elif (named := os.environ.get(value[1:])) is None:
        raise SettingsError(f"the environment has no `{value[1:]}`, which the header `{name}` takes", hint="set it")
    else:
        found = named
    if any(ord(c) < 32 or ord(c) > 255 for c in found):
        raise SettingsError(f"the header `{name}` has characters that no header can have", hint="see to its value")
    return name.lower(), found


def _at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise SettingsError(f"`{name}` cannot be `{value}`", hint=f"give a whole number from {least}")


def _positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value < float("inf"):
            what = "seconds" if name.endswith("_s") else "a number"
            raise SettingsError(f"`{name}` cannot be `{value}`", hint=f"give {what} above 0")


def _check_levels(name: str, levels: tuple[float, ...], example: str) -> None:
    if levels and (not min(levels) > 0 or max(levels) == float("inf") or len(set(levels)) < len(levels)):
        given = ", ".join(f"{level:g}" for level in levels)
        raise SettingsError(f"`{name}` cannot be `{given}`", hint=f"give numbers above 0, each once, as in `{example}`")
