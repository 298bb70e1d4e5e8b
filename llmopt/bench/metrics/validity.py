"""Whether the figures mean anything, and what a reader has to know beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from llmopt.bench.metrics.figures import Level, coalesced_share, gaps_ms, percentile
from llmopt.bench.metrics.records import Record
from llmopt.bench.settings import BenchSettings

MAX_ERROR_SHARE = 0.01
MAX_CLIENT_CPU_SHARE = 0.9
_CPU_COUNTS_FROM_S = 1.0  # in a shorter load the setting up weighs too much
_MUCH_COALESCED = 0.05
_MUCH_LAG_MS = 2.0  # and _MUCH_LAG_SHARE of the median gap
_MUCH_LAG_SHARE = 0.2


def invalid(level: Level) -> str | None:
    """Why the load says nothing about its subject; None if it does."""
    failed = [record for record in level.records if record.failure is not None]
    at = f"`{level.subject}` at concurrency {level.streams}"
    if not level.records:
        return f"no request of {at} was sent"
    if len(failed) > MAX_ERROR_SHARE * len(level.records):
        return f"{len(failed)} of {len(level.records)} requests of {at} failed: {describe(failed)}"
    share = level.cpu_s / level.wall_s if level.wall_s else 0.0
    if level.wall_s >= _CPU_COUNTS_FROM_S and share > MAX_CLIENT_CPU_SHARE:
        return f"the client could not hold the load of {at}: it used {share:.0%} of a core"
    return None


def describe(failed: Sequence[Record]) -> str:
    """The classes of the failures with their counts, and the first detail of each."""
    kinds = Counter(record.failure.kind for record in failed if record.failure is not None)
    details = {record.failure.kind: record.failure.detail for record in reversed(failed) if record.failure is not None}
    return ", ".join(f"{count} `{kind}` ({details[kind]})" for kind, count in kinds.most_common())


def notes(levels: Sequence[Level], settings: BenchSettings, *, exact_prompts: bool) -> list[str]:
    """What the server did not do as asked, and what else bears on the figures, over the rounds of a concurrency."""
    answered = [record for level in levels for record in level.records if record.failure is None]
    count = len(answered)
    found = []

    def note(part: Sequence[Record], what: str) -> None:
        if part:
            found.append(f"{len(part)} of {count} answers {what}")

    note([r for r in answered if not r.streamed], "were not streamed: their TTFT is their whole time")
    note([r for r in answered if r.completion_tokens is None], "have no usage: their chunks are counted as tokens")
    counted = [r for r in answered if r.completion_tokens is not None]
    note([r for r in counted if r.tokens < settings.output_tokens], "ended early: the server may not know `ignore_eos`")
    note([r for r in counted if r.tokens > settings.output_tokens], "are too long: the server ignores `max_tokens`")
    note([r for r in counted if len(r.stamps_ns) > r.tokens], "came in more chunks than their usage has tokens")
    if exact_prompts:
        other = [r for r in answered if r.prompt_tokens not in (None, settings.prompt_tokens)]
        lengths = sorted({r.prompt_tokens for r in other if r.prompt_tokens is not None})
        note(other, f"count another length of the prompt than {settings.prompt_tokens} tokens: {_range(lengths)}")
    share = coalesced_share(answered)
    if share > _MUCH_COALESCED:
        found.append(f"{share:.0%} of the tokens came together with another: gaps are between chunks, not tokens")
    lag_ms = percentile(sorted(lag for level in levels for lag in level.lags_ms) or [0.0], 90)
    gap_ms = percentile(sorted(gap for record in answered for gap in gaps_ms(record)) or [0.0], 50)
    if lag_ms > max(_MUCH_LAG_MS, _MUCH_LAG_SHARE * gap_ms):
        found.append(f"the client ran {lag_ms:.1f} ms late at p90, for want of CPU: latencies are that much too long")
    reconnects = sum(level.reconnects for level in levels)
    if reconnects:
        found.append(f"the server closed connections: {reconnects} were made anew, which no latency counts")
    return [f"`{levels[0].subject}` c{levels[0].streams}: {text}" for text in found]


def _range(values: Sequence[int]) -> str:
    if not values:
        return ""
    return f"{values[0]}" if values[0] == values[-1] else f"{values[0]} to {values[-1]}"
