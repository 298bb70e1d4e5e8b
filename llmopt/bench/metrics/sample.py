"""The answered requests of a load as columns: one row a request, and one a chunk."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmopt.bench.gate.names import forms
from llmopt.bench.metrics.intervals import Floats, Ints
from llmopt.bench.metrics.records import Record

Bools: TypeAlias = NDArray[np.bool_]

#: One value a request; NaN where it has none. All in milliseconds.
REQUEST_TIMES = (
    "ttft_ms", "ttft_scheduled_ms", "answer_ms", "ttst_ms", "itl_request_mean_ms", "itl_request_max_ms", "tpot_ms",
    "e2e_ms", "e2e_scheduled_ms",
)  # fmt: skip
_NEVER = np.iinfo(np.int64).min


class Sample:
    """Stamps are nanoseconds since the start of the load. Requests sent in the window are `counted`."""

    def __init__(self, records: Sequence[Record], started_ns: int, window_ns: tuple[int, int] | None) -> None:
        self.answered = [record for record in records if record.failure is None and len(record.stamps_ns)]
        self._window = window_ns or (_NEVER, np.iinfo(np.int64).max)
        self._all_sent = np.array([record.sent_ns for record in records], dtype=np.int64) - started_ns
        self.sent_in_window = int(self._inside(self._all_sent).sum())
        answered = self.answered
        self.chunks: Ints = np.array([len(record.stamps_ns) for record in answered], dtype=np.int64)
        self.tokens: Ints = np.array([record.tokens for record in answered], dtype=np.int64)
        self.sent_ns: Ints = np.array([record.sent_ns for record in answered], dtype=np.int64) - started_ns
        stamps = array("q")
        for record in answered:
            stamps.extend(record.stamps_ns)
        self.stamps_ns: Ints = np.array(stamps, dtype=np.int64) - started_ns
        self.ends: Ints = np.cumsum(self.chunks)  # index behind a request's last stamp
        self.starts: Ints = self.ends - self.chunks
        self.owner: Ints = np.repeat(np.arange(len(answered)), self.chunks)
        self.first_ns: Ints = self.stamps_ns[self.starts]
        self.last_ns: Ints = self.stamps_ns[self.ends - 1]
        self.counted: Bools = self._inside(self.sent_ns)
        self.ended_in_window: Bools = self._inside(self.last_ns)
        self._started_ns = started_ns

    def __len__(self) -> int:
        return len(self.answered)

    @cached_property
    def gaps(self) -> tuple[Floats, Ints]:
        """Every gap in milliseconds, and the request that it is of."""
        after_first = np.ones(len(self.stamps_ns), dtype=bool)
        after_first[self.starts] = False
        gaps_ns = np.diff(self.stamps_ns, prepend=np.int64(0))[after_first]
        return gaps_ns / 1e6, self.owner[after_first]

    @cached_property
    def times(self) -> dict[str, Floats]:
        """REQUEST_TIMES by name."""
        due_ns = self._optional([record.due_ns for record in self.answered])
        answer_ns = self._optional([record.answer_ns for record in self.answered])
        speaking_ms = (self.last_ns - self.first_ns) / 1e6
        gaps_ms, owner = self.gaps
        longest = np.full(len(self), np.nan)
        np.fmax.at(longest, owner, gaps_ms)
        second_ns = self.stamps_ns[np.minimum(self.starts + 1, self.ends - 1)]
        return {
            "ttft_ms": (self.first_ns - self.sent_ns) / 1e6,
            "ttft_scheduled_ms": (self.first_ns - due_ns) / 1e6,
            "answer_ms": (answer_ns - self.sent_ns) / 1e6,
            "ttst_ms": np.where(self.chunks > 1, (second_ns - self.first_ns) / 1e6, np.nan),
            "itl_request_mean_ms": _divided(speaking_ms, self.chunks - 1),
            "itl_request_max_ms": longest,
            "tpot_ms": _divided(speaking_ms, self.tokens - 1),
            "e2e_ms": (self.last_ns - self.sent_ns) / 1e6,
            "e2e_scheduled_ms": (self.last_ns - due_ns) / 1e6,
        }

    def met(self, limits: Mapping[str, float]) -> Bools:
        """Which requests meet every limit: one on `itl_ms` holds for every gap, one on a latency since it was due."""
        good = np.ones(len(self), dtype=bool)
        for name, limit in limits.items():
            times_ms = self.times["itl_request_max_ms" if name == "itl_ms" else name]
            since_due = forms(name)[0]
            if since_due != name:
                times_ms = np.fmax(times_ms, self.times[since_due])  # the later of both; NaN where nothing was due
            good &= ~(times_ms > limit)
        return good

    def tokens_between(self, begin_ns: int, end_ns: int) -> float:
        """Output tokens whose stamps are in the time; a chunk has its share of its request's tokens."""
        inside = (self.stamps_ns >= begin_ns) & (self.stamps_ns < end_ns)
        return float((self.tokens / self.chunks) @ np.bincount(self.owner[inside], minlength=len(self)))

    def tokens_in_window(self) -> float:
        return self.tokens_between(*self._window)

    def prompt_tokens_in_window(self) -> int | None:
        """Of the requests whose first chunk is in the window; None where the server does not tell."""
        inside = self._inside(self.first_ns)
        counts = [record.prompt_tokens for record, counts in zip(self.answered, inside, strict=True) if counts]
        return None if None in counts else sum(filter(None, counts))

    def steady(self) -> tuple[float, float]:
        """Output tokens, and the seconds, from the end of the first request to the sending of the last."""
        if not len(self):
            return 0.0, 0.0
        begin_ns, end_ns = int(self.last_ns.min()), int(self._all_sent.max())
        return (self.tokens_between(begin_ns, end_ns), (end_ns - begin_ns) / 1e9) if end_ns > begin_ns else (0.0, 0.0)

    def peak_tokens(self) -> float:
        """Output tokens of the best second."""
        if not len(self):
            return 0.0
        second = np.maximum(self.stamps_ns, 0) // 1_000_000_000
        return float(np.bincount(second, weights=(self.tokens / self.chunks)[self.owner]).max())

    def coalesced_tokens(self) -> int:
        """Tokens without a receive of their own."""
        gaps_ms, owner = self.gaps
        receives = 1 + np.bincount(owner[gaps_ms > 0], minlength=len(self))
        return int(np.maximum(0, self.tokens - receives).sum())

    def _inside(self, times_ns: Ints) -> Bools:
        inside: Bools = (times_ns >= self._window[0]) & (times_ns < self._window[1])
        return inside

    def _optional(self, times_ns: Sequence[int | None]) -> Floats:
        """Since the start of the load; NaN for None. A float holds the nanoseconds of a hundred days."""
        return np.array([np.nan if time is None else time - self._started_ns for time in times_ns], dtype=np.float64)


def gaps_of(samples: Sequence[Sample]) -> tuple[Floats, Ints, int]:
    """The gaps of all counted requests in milliseconds, the request that each is of, and the number of requests."""
    gaps, owners, total = [], [], 0
    for sample in samples:
        gaps_ms, owner = sample.gaps
        counts = sample.counted[owner]
        gaps.append(gaps_ms[counts])
        owners.append(owner[counts] + total)
        total += len(sample)
    numbers, owner = np.unique(np.concatenate(owners), return_inverse=True)
    return np.concatenate(gaps), owner.astype(np.int64), len(numbers)


def _divided(total: Floats, parts: Ints) -> Floats:
    return np.where(parts > 0, total / np.maximum(parts, 1), np.nan)
