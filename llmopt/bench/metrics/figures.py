"""From records to figures. Each convention is written out once, in CONVENTIONS, and goes into every report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from llmopt.artifacts.outcome import Json
from llmopt.bench.metrics.records import Record

CONVENTIONS: Mapping[str, str] = {
    "ttft_ms": "from just before the request is written, on a connection that stands, to the first chunk with text",
    "itl_ms": "every gap between successive chunks with text, all requests together; 0 where one receive brought both",
    "tpot_ms": "per request (e2e - ttft) / (tokens - 1), for requests of two tokens or more",
    "e2e_ms": "from just before the request is written to the last chunk with text",
    "tokens_per_s": "output tokens of the answered requests, over wall_s",
    "requests_per_s": "answered requests, over wall_s",
    "wall_s": "from the start of the load to the end of its last request, summed over rounds; warm-up is not in it",
    "tokens": "by the server's usage, or chunks with text where it sends none",
    "coalesced_share": "tokens without a receive of their own, as a share of all tokens",
    "streams_held": "mean number of requests in flight from the first sending to the last",
    "client_cpu_share": "CPU time of the client's thread over wall_s; near 1 the client is the bottleneck",
    "client_lag_ms": "how late the client's loop served a timer; timers are rounded up by as much as 1 ms",
    "percentiles": "linear interpolation between order statistics (type 7 of Hyndman and Fan, numpy's default)",
}

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """A load of one subject at one concurrency in one round, read."""

    subject: str
    streams: int
    round: int
    records: tuple[Record, ...]
    wall_s: float
    cpu_s: float
    lags_ms: tuple[float, ...]
    reconnects: int


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The percentile of ascending, non-empty `ordered`, with linear interpolation."""
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def spread(values: Iterable[float]) -> dict[str, Json] | None:
    """Mean, percentiles and extremes of milliseconds, to the microsecond; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    figures = {"mean": math.fsum(ordered) / len(ordered)}
    figures |= {f"p{percent}": percentile(ordered, percent) for percent in PERCENTILES}
    figures |= {"min": ordered[0], "max": ordered[-1]}
    return {"count": len(ordered), **{name: round(value, 3) for name, value in figures.items()}}


def ttft_ms(record: Record) -> float:
    return (record.stamps_ns[0] - record.sent_ns) / 1e6


def gaps_ms(record: Record) -> list[float]:
    stamps = record.stamps_ns
    return [(after - before) / 1e6 for before, after in pairwise(stamps)]


def e2e_ms(record: Record) -> float:
    return (record.stamps_ns[-1] - record.sent_ns) / 1e6


def tpot_ms(record: Record) -> float | None:
    return (e2e_ms(record) - ttft_ms(record)) / (record.tokens - 1) if record.tokens > 1 else None


def streams_held(records: Sequence[Record]) -> float:
    """Mean number in flight while there was a request left to send; over the whole load if all were sent at once."""
    if not records:
        return 0.0
    begin_ns = min(record.sent_ns for record in records)
    end_ns = max(record.sent_ns for record in records)
    if end_ns - begin_ns < 0.01 * (max(record.end_ns for record in records) - begin_ns):
        end_ns = max(record.end_ns for record in records)
    if end_ns == begin_ns:
        return 0.0
    busy_ns = sum(min(record.end_ns, end_ns) - min(record.sent_ns, end_ns) for record in records)
    return busy_ns / (end_ns - begin_ns)


def summarise(levels: Sequence[Level]) -> dict[str, Json]:
    """The figures of one subject at one concurrency, pooled over `levels`, its rounds (one or more).

    Requests of all rounds are one sample; times add up. Failed requests count as errors and in no latency.
    """
    records = [record for level in levels for record in level.records]
    answered = [record for record in records if record.failure is None]
    tpots = (tpot_ms(record) for record in answered)
    wall_s = math.fsum(level.wall_s for level in levels)
    tokens = sum(record.tokens for record in answered)
    errors = Counter(record.failure.kind for record in records if record.failure is not None)
    cpu_share = math.fsum(level.cpu_s for level in levels) / wall_s if wall_s else 0.0
    held = math.fsum(streams_held(level.records) * level.wall_s for level in levels)
    return {
        "requests": len(records),
        "answered": len(answered),
        "errors": dict(sorted(errors.items())),
        "wall_s": round(wall_s, 4),
        "requests_per_s": _rate(len(answered), wall_s),
        "tokens_per_s": _rate(tokens, wall_s),
        "ttft_ms": spread(ttft_ms(record) for record in answered),
        "itl_ms": spread(gap for record in answered for gap in gaps_ms(record)),
        "tpot_ms": spread(value for value in tpots if value is not None),
        "e2e_ms": spread(e2e_ms(record) for record in answered),
        "tokens": tokens,
        "chunks": sum(len(record.stamps_ns) for record in answered),
        "coalesced_share": round(coalesced_share(answered), 4),
        "prompt_tokens": prompt_tokens(answered),
        "streams_held": round(held / wall_s, 3) if wall_s else 0.0,
        "reconnects": sum(level.reconnects for level in levels),
        "client_cpu_share": round(cpu_share, 4),
        "client_lag_ms": spread(lag for level in levels for lag in level.lags_ms),
    }


def coalesced_share(answered: Sequence[Record]) -> float:
    tokens = sum(record.tokens for record in answered)
    shared = sum(max(0, record.tokens - len(set(record.stamps_ns))) for record in answered)
    return shared / tokens if tokens else 0.0


def prompt_tokens(answered: Sequence[Record]) -> float | None:
    """Mean length of the prompts by the server's usage; None where it sends none."""
    counts = [record.prompt_tokens for record in answered if record.prompt_tokens is not None]
    return round(sum(counts) / len(counts), 2) if counts else None


def compact(summary: Mapping[str, Json]) -> dict[str, Json]:
    """The figures that a manifest and a table show."""
    figures: dict[str, Json] = {}
    for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"):
        values = summary[name]
        if isinstance(values, dict):
            figures |= {f"{name}_p50": values["p50"], f"{name}_p99": values["p99"]}
    figures |= {name: summary[name] for name in ("tokens_per_s", "requests_per_s", "requests")}
    errors = summary["errors"]
    assert isinstance(errors, dict)
    return figures | {"errors": sum(count for count in errors.values() if isinstance(count, int))}


def ratios(candidate: Mapping[str, Json], baseline: Mapping[str, Json]) -> dict[str, Json]:
    """Candidate over baseline of the compact figures: below 1 is better for times, above 1 for rates."""
    found: dict[str, Json] = {}
    for name, value in candidate.items():
        base = baseline.get(name)
        if isinstance(value, float) and isinstance(base, float) and base:  # not the counts
            found[name] = round(value / base, 4)
    return found


def _rate(count: int, wall_s: float) -> float:
    return round(count / wall_s, 3) if wall_s else 0.0
