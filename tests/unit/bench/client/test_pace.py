"""How long receives may gather before they are read."""

from __future__ import annotations

import pytest

from llmopt.bench.client.pace import Pace

MS = 1_000_000
LONG_NS = 1 << 40


def seen(*gaps_ms: float) -> Pace:
    """A pace that has looked at streams whose last gaps were these."""
    pace = Pace()
    for gap_ms in gaps_ms:
        pace.look([0, 50 * MS, round((50 + gap_ms) * MS)])
    return pace


def test_there_is_no_pause_before_any_gap_was_seen() -> None:
    assert Pace().pause_ns(LONG_NS) == 0


@pytest.mark.parametrize("gap_ms", [2, 5, 10, 1000])
def test_a_pause_is_a_small_part_of_the_gaps_and_never_long(gap_ms: float) -> None:
    assert 0 < seen(*[gap_ms] * 200).pause_ns(LONG_NS) <= min(gap_ms * MS / 10, MS)


@pytest.mark.parametrize("short_ms", [0, 0.1], ids=["together", "near"])
def test_tokens_that_come_together_stop_the_pauses_at_once(short_ms: float) -> None:
    assert seen(*[10] * 200, short_ms).pause_ns(LONG_NS) == 0


def test_a_short_gap_is_forgotten() -> None:
    assert seen(0, *[10] * 200).pause_ns(LONG_NS) == seen(*[10] * 200).pause_ns(LONG_NS)


@pytest.mark.parametrize("stamps_ns", [[], [1], [1, 1]])
def test_the_beginning_of_a_stream_says_nothing(stamps_ns: list[int]) -> None:
    pace = seen(*[10] * 200)
    before_ns = pace.pause_ns(LONG_NS)
    pace.look(stamps_ns)
    assert pace.pause_ns(LONG_NS) == before_ns


def test_nothing_that_is_due_is_slept_past() -> None:
    pace = seen(*[10] * 200)
    pause_ns = pace.pause_ns(LONG_NS)
    assert pace.pause_ns(pause_ns) == 0
    assert pace.pause_ns(-1) == 0
