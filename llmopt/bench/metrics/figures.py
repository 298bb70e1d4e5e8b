"""From records to figures. Each convention is written out once, in CONVENTIONS, and goes into every report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmopt.artifacts.outcome import Json
from llmopt.bench.metrics.intervals import PERCENTILES, spread
from llmopt.bench.metrics.records import UNSENT, Record
from llmopt.bench.metrics.sample import REQUEST_TIMES, Sample, gaps_of
from llmopt.bench.metrics.telemetry import merged
from llmopt.bench.settings import LoadShape

CONVENTIONS: Mapping[str, str] = {
    "ttft_ms": "from just before the request is written, on a connection that stands, to the first chunk with output",
    "ttft_scheduled_ms": "open loop: from when the request was to be sent to the first chunk with output",
    "answer_ms": "as ttft_ms, to the first chunk that is not reasoning",
    "ttst_ms": "per request, from the first chunk with output to the second",
    "itl_ms": "every gap between successive chunks with output, of all requests; 0 where one receive brought both",
    "itl_request_mean_ms": "per request, the mean of its gaps: the ITL of guidellm and aiperf, which hides stalls",
    "itl_request_max_ms": "per request, the longest of its gaps",
    "tpot_ms": "per request (e2e - ttft) / (tokens - 1), for requests of two tokens or more",
    "e2e_ms": "from just before the request is written to the last chunk with output",
    "e2e_scheduled_ms": "open loop: from when the request was to be sent to the last chunk with output",
    "output": "text, reasoning, refusals and tool calls; a chunk without any of them is no token",
    "counted": "answered requests that were sent inside the window: those that the latencies are of",
    "window": "the part of the load that counts; all of it where none is set",
    "wall_s": "from the start of the load to the end of its last request, summed over rounds; warm-up is not in it",
    "tokens_per_s": "output tokens of the answered requests, over wall_s; with a window those whose stamps are in it",
    "total_tokens_per_s": "as tokens_per_s, with the tokens of the prompts, which count at the first chunk",
    "steady_tokens_per_s": "output tokens between the end of the first request and the sending of the last, over that",
    "peak_tokens_per_s": "output tokens of the best whole second; of loads of two seconds or more",
    "requests_per_s": "answered requests, over wall_s; with a window those whose last chunk is in it",
    "goodput_per_s": "requests that meet every limit on a request, counted as requests_per_s",
    "goodput_share": "requests that meet every limit on a request, as a share of all that were sent in the window",
    "goodput": "a limit on itl_ms holds for every gap of a request; a figure that a request lacks breaks no limit",
    "judged": "thresholds, goodput and comparisons on ttft_ms and e2e_ms count from the schedule where there is one",
    "tokens": "by the server's usage, or chunks with output where it sends none",
    "usage_share": "answers with the server's own count of output tokens, as a share of all",
    "cached_share": "tokens of the prompts that the server says it had in its prefix cache, as a share of all of them",
    "error_share": "requests that failed, as a share of all",
    "coalesced_share": "tokens without a receive of their own, as a share of all tokens",
    "streams_held": "mean number of requests in flight, after the ramp, until no conversation was left to begin",
    "sent_per_s": "requests sent between the first sending and the last, over that",
    "due_per_s": "open loop: the same of the schedule",
    "late_ms": "open loop: from when each request was to be sent to when it was",
    "client_cpu_share": "CPU time of the client over wall_s and its processes; near 1 the client is the bottleneck",
    "client_lag_ms": "from a receive's kernel stamp, or the engine's, to its reading; else how late the client ran",
    "stamps": "kernel: of the receive; user: on reading it; engine: its own process behind each step, without a server",
    "joules_per_token": "energy that the machine's counters tell of, of everything that ran on it, over output tokens",
    "percentiles": "linear interpolation between order statistics (type 7 of Hyndman and Fan, numpy's default)",
    "ci95": "of requests: order statistics by the binomial distribution; of gaps: clustered by request (Woodruff); "
    "of means: Student's t; null where the requests are too few",
}

#: Times whose percentiles are in the compact figures.
TIMES = (
    "ttft_ms", "ttft_scheduled_ms", "answer_ms", "itl_ms", "itl_request_mean_ms", "tpot_ms", "e2e_ms",
    "e2e_scheduled_ms",
)  # fmt: skip
_RATES = (
    "tokens_per_s", "total_tokens_per_s", "steady_tokens_per_s", "peak_tokens_per_s", "requests_per_s",
    "goodput_per_s", "goodput_share", "joules_per_token",
)  # fmt: skip
_PEAK_FROM_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """A load of one subject in one round, read."""

    subject: str
    load: LoadShape
    round: int
    records: Sequence[Record]
    started_ns: int
    wall_s: float
    cpu_s: float
    lags_ms: Sequence[float]
    late_ms: Sequence[float] = ()
    reconnects: int = 0
    stamps: str = "kernel"
    processes: int = 1
    window_ns: tuple[int, int] | None = None  # since `started_ns`; what was sent before or after it is not counted
    server: Mapping[str, Json] | None = None  # what telemetry told of it

    @property
    def span_s(self) -> float:
        """The time that rates are over."""
        return self.wall_s if self.window_ns is None else (self.window_ns[1] - self.window_ns[0]) / 1e9


def summarise(levels: Sequence[Level], slo: Mapping[str, float] | None = None) -> dict[str, Json]:
    """The figures of one subject under one load, pooled over `levels`, its rounds (one or more).

    Requests of all rounds are one sample; times add up. Failed requests count as errors and in no latency.
    `slo`: limits on single requests by name, as `ttft_ms`, which define goodput; without any there is none.
    """
    samples = [Sample(level.records, level.started_ns, level.window_ns) for level in levels]
    records = [record for level in levels for record in level.records]
    errors = Counter(record.failure.kind for record in records if record.failure is not None)
    return {
        "requests": len(records),
        "answered": sum(len(sample) for sample in samples),
        "counted": sum(int(sample.counted.sum()) for sample in samples),
        "errors": dict(sorted(errors.items())),
        "error_share": _share(sum(errors.values()), len(records)),
        "wall_s": round(math.fsum(level.wall_s for level in levels), 4),
        **_rates(levels, samples, slo),
        **_times(samples, scheduled=all(level.load.streams is None for level in levels)),
        **_tokens(samples),
        **_client(levels),
        "server": merged([level.server for level in levels]),
    }


def _times(samples: Sequence[Sample], *, scheduled: bool) -> dict[str, Json]:
    """In a closed loop only the later turns of conversations are due at a time: that is no schedule."""
    found: dict[str, Json] = {}
    for name in REQUEST_TIMES:
        if name.endswith("_scheduled_ms") and not scheduled:
            found[name] = None
            continue
        values = np.concatenate([sample.times[name][sample.counted] for sample in samples])
        found[name] = spread(values[~np.isnan(values)])
    gaps_ms, owner, owners = gaps_of(samples)
    return found | {"itl_ms": spread(gaps_ms, owner, owners)}


def _rates(levels: Sequence[Level], samples: Sequence[Sample], slo: Mapping[str, float] | None) -> dict[str, Json]:
    span_s = math.fsum(level.span_s for level in levels)
    steady = [sample.steady() for sample in samples]
    steady_s = math.fsum(seconds for _, seconds in steady)
    peaks = [
        sample.peak_tokens() for level, sample in zip(levels, samples, strict=True) if level.span_s >= _PEAK_FROM_S
    ]
    prompts = [sample.prompt_tokens_in_window() for sample in samples]
    tokens = math.fsum(sample.tokens_in_window() for sample in samples)
    found: dict[str, Json] = {
        "requests_per_s": _rate(sum(int(sample.ended_in_window.sum()) for sample in samples), span_s),
        "tokens_per_s": _rate(tokens, span_s),
        "total_tokens_per_s": None if None in prompts else _rate(tokens + sum(filter(None, prompts)), span_s),
        "steady_tokens_per_s": _rate(math.fsum(count for count, _ in steady), steady_s) if steady_s else None,
        "peak_tokens_per_s": round(max(peaks), 3) if peaks else None,
        "goodput_per_s": None,
        "goodput_share": None,
        "joules_per_token": _joules(levels, math.fsum(float(sample.tokens.sum()) for sample in samples)),
    }
    if slo:
        met = [sample.met(slo) for sample in samples]
        good = sum(int((ok & sample.ended_in_window).sum()) for ok, sample in zip(met, samples, strict=True))
        counted = sum(int((ok & sample.counted).sum()) for ok, sample in zip(met, samples, strict=True))
        sent = sum(sample.sent_in_window for sample in samples)
        found |= {"goodput_per_s": _rate(good, span_s), "goodput_share": _share(counted, sent)}
    return found


def _tokens(samples: Sequence[Sample]) -> dict[str, Json]:
    answered = [record for sample in samples for record in sample.answered]
    prompts = [record.prompt_tokens for record in answered if record.prompt_tokens is not None]
    cached = [record.cached_tokens for record in answered if record.cached_tokens is not None]
    finishes = Counter(record.finish for record in answered if record.finish is not None)
    tokens = sum(int(sample.tokens.sum()) for sample in samples)
    return {
        "tokens": tokens,
        "chunks": sum(len(sample.stamps_ns) for sample in samples),
        "usage_share": _share(sum(record.completion_tokens is not None for record in answered), len(answered)),
        "coalesced_share": _share(sum(sample.coalesced_tokens() for sample in samples), tokens),
        "output_tokens": round(tokens / len(answered), 2) if answered else None,
        "prompt_tokens": round(sum(prompts) / len(prompts), 2) if prompts else None,
        "cached_share": _share(sum(cached), sum(prompts)) if cached and prompts else None,
        "finishes": dict(sorted(finishes.items())),
    }


def _client(levels: Sequence[Level]) -> dict[str, Json]:
    wall_s = math.fsum(level.wall_s for level in levels)
    cores_s = math.fsum(level.wall_s * level.processes for level in levels)
    held = math.fsum(streams_held(level) * level.wall_s for level in levels)
    lags = np.array([lag for level in levels for lag in level.lags_ms])
    late = np.array([late for level in levels for late in level.late_ms])
    sent, due = zip(*(sent_and_due_per_s(level) for level in levels), strict=True)
    stamps = {level.stamps for level in levels}
    return {
        "streams_held": round(held / wall_s, 3) if wall_s else 0.0,
        "sent_per_s": _mean_of(sent),
        "due_per_s": _mean_of(due),
        "late_ms": _without_intervals(spread(late)),
        "reconnects": sum(level.reconnects for level in levels),
        "client_cpu_share": round(math.fsum(level.cpu_s for level in levels) / cores_s, 4) if cores_s else 0.0,
        "client_lag_ms": _without_intervals(spread(lags)),
        "client_processes": max(level.processes for level in levels),
        "stamps": stamps.pop() if len(stamps) == 1 else "mixed",
    }


def streams_held(level: Level) -> float:
    """Mean number in flight while there was a conversation left to begin; over the whole load if all began at once."""
    if not level.records:
        return 0.0
    sent = np.array([record.sent_ns for record in level.records])
    end = np.array([record.end_ns for record in level.records])
    begin_ns = sent.min() + int(level.load.ramp_s * 1e9)
    stop_ns = max((record.sent_ns for record in level.records if record.turn == 0), default=sent.max())
    if stop_ns - begin_ns < 0.01 * (end.max() - sent.min()):
        begin_ns, stop_ns = sent.min(), end.max()
    if level.window_ns is not None:
        begin_ns = max(begin_ns, level.started_ns + level.window_ns[0])
        stop_ns = min(stop_ns, level.started_ns + level.window_ns[1])
    if stop_ns <= begin_ns:
        return 0.0
    busy_ns = (np.clip(end, begin_ns, stop_ns) - np.clip(sent, begin_ns, stop_ns)).sum()
    return float(busy_ns) / float(stop_ns - begin_ns)


def sent_and_due_per_s(level: Level) -> tuple[float | None, float | None]:
    """Requests sent a second, and those that were due; None where there are too few, or no schedule."""
    sent = [record for record in level.records if record.failure is None or record.failure.kind != UNSENT]
    due = [record.due_ns for record in sent if record.due_ns is not None]
    scheduled = level.load.streams is None and len(due) == len(sent)
    return _per_s([record.sent_ns for record in sent]), _per_s(due) if scheduled else None


def compact(summary: Mapping[str, Json]) -> dict[str, Json]:
    """The figures that a manifest, a table and a gate take; those that there are."""
    figures: dict[str, Json] = {}
    for name in TIMES:
        values = summary.get(name)
        if isinstance(values, dict):
            figures |= {f"{name}_{which}": values[which] for which in ("mean", *PERCENTILES) if which in values}
    figures |= {name: summary[name] for name in _RATES if summary.get(name) is not None}
    errors = summary["errors"]
    assert isinstance(errors, dict)
    failed = sum(count for count in errors.values() if isinstance(count, int))
    return figures | {"error_share": summary["error_share"], "requests": summary["requests"], "errors": failed}


def ratios(candidate: Mapping[str, Json], baseline: Mapping[str, Json]) -> dict[str, Json]:
    """Candidate over baseline of the compact figures: below 1 is better for times, above 1 for rates."""
    found: dict[str, Json] = {}
    for name, value in candidate.items():
        base = baseline.get(name)
        if isinstance(value, float) and isinstance(base, float) and base:  # not the counts
            found[name] = round(value / base, 4)
    return found


def _joules(levels: Sequence[Level], tokens: float) -> float | None:
    spent = [level.server.get("energy_j") if level.server else None for level in levels]
    known = [joules for joules in spent if isinstance(joules, (int, float))]
    return round(math.fsum(known) / tokens, 4) if tokens and len(known) == len(levels) else None


def _without_intervals(figures: dict[str, Json] | None) -> dict[str, Json] | None:
    """These samples are not independent of each other."""
    return None if figures is None else {name: value for name, value in figures.items() if name != "ci95"}


def _per_s(times_ns: Sequence[int]) -> float | None:
    if len(times_ns) < 2 or max(times_ns) == min(times_ns):
        return None
    return round((len(times_ns) - 1) / ((max(times_ns) - min(times_ns)) / 1e9), 3)


def _mean_of(rates: Sequence[float | None]) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return round(math.fsum(known) / len(known), 3) if len(known) == len(rates) else None


def _rate(count: float, span_s: float) -> float:
    return round(count / span_s, 3) if span_s else 0.0


def _share(part: float, whole: float) -> float:
    return round(part / whole, 4) if whole else 0.0
