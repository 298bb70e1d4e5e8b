"""How long what has come may lie unread. The kernel has stamped it, and reading much at once takes less CPU.

A receive has one stamp, that of its last segment, so two tokens of one stream must not lie together: a pause is a small
part of the shortest gap that streams had of late, and there is none where tokens come together by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

_SHARE = 16  # of the shortest gap
_LONGEST_NS = 500_000  # a stream's next request may wait that long
_LEAST_NS = 50_000  # shorter ones cost what they save
_SLACK_NS = 150_000
_FORGET_NS = 20_000  # so much, and a sixteenth, longer does the shortest gap become with each look


class Pace:
    """`look` at a stream now and then, and `pause_ns` says how long to wait for more."""

    def __init__(self) -> None:
        self._shortest_ns = 0

    def look(self, stamps_ns: Sequence[int]) -> None:
        """Take the last gap of a stream as a sample; those of its beginning, where several events may come in one."""
        if len(stamps_ns) > 2:
            gap_ns = stamps_ns[-1] - stamps_ns[-2]
            self._shortest_ns = min(gap_ns, self._shortest_ns + self._shortest_ns // 16 + _FORGET_NS)

    def pause_ns(self, within_ns: int) -> int:
        """0: none. `within_ns` from now something is due, and a pause may take a little longer than asked."""
        pause_ns = min(_LONGEST_NS, self._shortest_ns // _SHARE)
        return pause_ns if pause_ns >= _LEAST_NS and pause_ns + _SLACK_NS <= within_ns else 0
