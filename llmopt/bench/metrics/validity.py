"""Whether the figures mean anything, and what a reader has to know beside them.

A load is invalid where the client did not do what was asked of it, or where the server answered too few of the
requests. What a slow server does to a load (queues, requests that wait for a free place) is a result, not a fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from llmopt.bench.metrics.figures import Level, sent_and_due_per_s, streams_held
from llmopt.bench.metrics.intervals import least_count
from llmopt.bench.metrics.records import UNSENT, Record
from llmopt.bench.metrics.sample import Sample
from llmopt.bench.settings import LoadShape

MAX_ERROR_SHARE = 0.01
MAX_CLIENT_CPU_SHARE = 0.9  # of a core, for each of its processes
MIN_HELD_SHARE = 0.95  # of the streams, or of the schedule's rate where the client is what was late
MIN_HELD_SHARE_OF_SHORT = 0.8  # of a load below LONG_FROM_S, of which one busy moment of the machine is much
JUDGED_FROM_S = 1.0  # in a shorter load its beginning and its end weigh too much
LONG_FROM_S = 5.0
JUDGED_FROM_WAVES = 3  # conversations (mostly one request) for each stream; of fewer, begin and end are the most
JUDGED_FROM_REQUESTS = 20  # of an open loop

LATE_MS = 1.0  # a sending later than this, and than _LATE_SHARE of the mean time between two
_LATE_SHARE = 0.1
_MANY_LATE = 0.05
_MANY_RECONNECTS = 0.05  # of the requests: then what streams wait for is the server, which closes connections
_MUCH_COALESCED = 0.05
_HINTS = {
    "http_401": "put a key that is valid there in the environment variable `LLMOPT_API_KEY`",
    "http_403": "put a key that is valid there in the environment variable `LLMOPT_API_KEY`",
    "http_429": "it limits requests: lower the load, or raise the limit of the key",
    "timeout": "raise `--timeout`, or lower the load or `--output-tokens`",
    "refused": "does the server still run?",
}
_RIGHT_STAMPS = ("kernel", "engine")  # however late they are read: only the next request of a stream suffers then
_MUCH_LAG_MS = 2.0  # and _MUCH_LAG_SHARE of the median gap, or of the median request where stamps are right
_MUCH_LAG_SHARE = 0.2


def invalid(level: Level) -> str | None:
    """Why the load says nothing about its subject; None if it does."""
    at = f"`{level.subject}` at {words(level.load)}"
    if not level.records:
        return f"no request of {at} was sent"
    if level.window_ns is not None and not _sent_in(level.window_ns, level):
        return f"no request of {at} was sent between the warm-up and the cool-down"
    failed = [r for r in level.records if r.failure is not None and r.failure.kind != UNSENT]
    if len(failed) > MAX_ERROR_SHARE * len(level.records):
        return f"{len(failed)} of {len(level.records)} requests of {at} failed: {describe(failed)}"
    share = level.cpu_s / (level.wall_s * level.processes) if level.wall_s else 0.0
    if level.wall_s >= JUDGED_FROM_S and share > MAX_CLIENT_CPU_SHARE:
        return f"the client could not hold the load of {at}: it used {share:.0%} of a core"
    found = not_held(level, MIN_HELD_SHARE if level.wall_s >= LONG_FROM_S else MIN_HELD_SHARE_OF_SHORT)
    return None if found is None else f"the client could not hold the load of {at}: it {found}"


def _sent_in(window_ns: tuple[int, int], level: Level) -> bool:
    first, last = window_ns
    return any(first <= record.sent_ns - level.started_ns < last for record in level.records)


def hint(level: Level) -> str:
    """What to do about a load that says nothing."""
    kinds = Counter(record.failure.kind for record in level.records if record.failure is not None)
    most = kinds.most_common(1)[0][0] if kinds else ""
    return _HINTS.get(most, "see to the cause and measure again")


def words(load: LoadShape) -> str:
    """A load as a sentence has it."""
    if load.streams is not None:
        return f"concurrency {load.streams}"
    return f"{load.rate:g} requests/s" if load.rate is not None else f"the load `{load.label}`"


def describe(failed: Sequence[Record]) -> str:
    """The classes of the failures with their counts, and the first detail of each."""
    kinds = Counter(record.failure.kind for record in failed if record.failure is not None)
    details = {record.failure.kind: record.failure.detail for record in reversed(failed) if record.failure is not None}
    return ", ".join(f"{count} `{kind}` ({details[kind]})" for kind, count in kinds.most_common())


def not_held(level: Level, share: float) -> str | None:
    """What the client did where that is less than a share of what it was asked, and not for the server's sake."""
    if level.wall_s < JUDGED_FROM_S:
        return None
    return _streams_not_held(level, share) if level.load.streams is not None else _rate_not_held(level, share)


def _streams_not_held(level: Level, share: float) -> str | None:
    """Between two requests of a stream there is the client, and nothing else, unless conversations have pauses."""
    asked = level.load.streams or 0
    pauses = any(record.turn > 0 and record.due_ns is not None for record in level.records)
    begun = sum(record.turn == 0 for record in level.records)
    if pauses or begun < JUDGED_FROM_WAVES * asked or level.reconnects > _MANY_RECONNECTS * len(level.records):
        return None
    held = streams_held(level)
    return None if held >= share * asked else f"held {held:.2f} of {asked} streams"


def _rate_not_held(level: Level, share: float) -> str | None:
    """Less than the schedule is the client's fault where it sent late with places to spare."""
    sent_per_s, due_per_s = sent_and_due_per_s(level)
    if len(level.records) < JUDGED_FROM_REQUESTS or sent_per_s is None or due_per_s is None or places_full(level):
        return None
    return None if sent_per_s >= share * due_per_s else f"sent {sent_per_s:g} of {due_per_s:g} requests/s"


def places_full(level: Level) -> bool:
    """Whether the requests in flight ever reached their limit, so that some had to wait for the server."""
    if level.load.in_flight is None or not level.records:
        return False
    ends = np.sort([record.end_ns for record in level.records])
    sent = np.sort([record.sent_ns for record in level.records])
    in_flight = np.arange(1, len(sent) + 1) - np.searchsorted(ends, sent, side="right")
    return bool(in_flight.max() >= level.load.in_flight)


def notes(
    levels: Sequence[Level], *, asked_prompt_tokens: Callable[[Record], int | None] = lambda record: None
) -> list[str]:
    """What the server did not do as asked, and what else bears on the figures, over the rounds of a load.

    `asked_prompt_tokens` tells the length of a record's prompt, where it is known just as the server should count it.
    """
    answered = [record for level in levels for record in level.records if record.failure is None]
    samples = [Sample(level.records, level.started_ns, level.window_ns) for level in levels]
    found = _of_answers(answered, asked_prompt_tokens) + _of_samples(samples)
    return found + _of_the_client(levels, samples)


def _of_answers(answered: Sequence[Record], asked_prompt_tokens: Callable[[Record], int | None]) -> list[str]:
    found: list[str] = []

    def note(part: Sequence[Record], what: str) -> None:
        if part:
            found.append(f"{len(part)} of {len(answered)} answers {what}")

    note([r for r in answered if not r.streamed], "were not streamed: their TTFT is their whole time")
    note([r for r in answered if r.completion_tokens is None], "have no usage: their chunks are counted as tokens")
    counted = [r for r in answered if r.completion_tokens is not None]
    note([r for r in counted if r.tokens < (r.wanted_tokens or 0)], "ended early: the server may not know `ignore_eos`")
    long = [r for r in counted if r.wanted_tokens is not None and r.tokens > r.wanted_tokens]
    note(long, "are too long: the server ignores `max_tokens`")
    note([r for r in counted if len(r.stamps_ns) > r.tokens], "came in more chunks than their usage has tokens")
    told = [(r, r.prompt_tokens, asked_prompt_tokens(r)) for r in answered]
    other = [(r, count, asked) for r, count, asked in told if None not in (count, asked) and count != asked]
    if other:
        asked_range, range_ = _range([asked for _, _, asked in other]), _range([count for _, count, _ in other])
        note([r for r, _, _ in other], f"count another length of the prompt than {asked_range} tokens: {range_}")
    return found


def _of_samples(samples: Sequence[Sample]) -> list[str]:
    found = []
    tokens = sum(int(sample.tokens.sum()) for sample in samples)
    coalesced = sum(sample.coalesced_tokens() for sample in samples)
    if coalesced > _MUCH_COALESCED * tokens:
        share = coalesced / tokens
        found.append(f"{share:.0%} of the tokens came together with another: gaps are between chunks, not tokens")
    counted = sum(int(sample.counted.sum()) for sample in samples)
    if 0 < counted < least_count(0.99):
        found.append(f"fewer requests than the {least_count(0.99)} that give a p99 of requests an interval")
    return found


def _of_the_client(levels: Sequence[Level], samples: Sequence[Sample]) -> list[str]:
    found = []
    lags = [lag for level in levels for lag in level.lags_ms]
    right = all(level.stamps in _RIGHT_STAMPS for level in levels)
    suffers = [sample.times["e2e_ms"] if right else sample.gaps[0] for sample in samples]
    suffers_ms = float(np.median(np.concatenate(suffers))) if sum(map(len, suffers)) else 0.0
    lag_ms = float(np.percentile(lags, 99)) if lags else 0.0
    if lag_ms > max(_MUCH_LAG_MS, _MUCH_LAG_SHARE * suffers_ms):
        so = "next requests went out that much later" if right else "latencies are that much too long"
        found.append(f"the client ran {lag_ms:.1f} ms late at p99, for want of CPU: {so}")
    short = [what for level in levels if level.wall_s < LONG_FROM_S and (what := not_held(level, MIN_HELD_SHARE))]
    if short:
        found.append(f"the client {short[0]}, in a load too short to be judged by that")
    records = [record for level in levels for record in level.records]
    unsent = sum(record.failure is not None and record.failure.kind == UNSENT for record in records)
    if unsent:
        limit = levels[0].load.in_flight
        found.append(f"{unsent} of {len(records)} requests were never sent: {limit} were in flight, the limit")
    if late := _late(levels):
        found.append(late)
    reconnects = sum(level.reconnects for level in levels)
    if reconnects:
        found.append(f"the server closed connections: {reconnects} were made anew, which no latency counts")
    return found


def _late(levels: Sequence[Level]) -> str | None:
    """A word on requests that were sent late, where they are many."""
    late = np.array([late for level in levels for late in level.late_ms])
    rates = [due for _, due in map(sent_and_due_per_s, levels) if due is not None]
    if not len(late) or not rates:
        return None
    much_ms = max(LATE_MS, _LATE_SHARE * 1e3 / max(rates))
    share = float((late > much_ms).mean())
    if share <= _MANY_LATE:
        return None
    limit = levels[0].load.in_flight
    why = f", for want of a place among {limit} in flight" if any(places_full(level) for level in levels) else ""
    p99_ms = float(np.percentile(late, 99))
    so = "which only the scheduled times count"
    return f"{share:.0%} of the requests were sent more than {much_ms:.1f} ms late (p99 {p99_ms:.1f} ms){why}, {so}"


def _range(values: Sequence[int | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{min(known)}" if min(known) == max(known) else f"{min(known)} to {max(known)}"
