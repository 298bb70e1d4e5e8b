"""The exchanges that have ended, unread as long as there is room for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic

from llmopt.bench.client.base import Exchange, R

HELD_BYTES = 64 << 20  # beyond it, answers are read while nothing else is to be done


class Store(Generic[R]):
    """`keep` takes an exchange; what `read` makes of it is among `records` after `read_all`."""

    def __init__(self, read: Callable[[Exchange], R]) -> None:
        self.records: list[R] = []
        self.ended = 0
        self.failed = 0
        self.chunks = 0
        self.failures_in_a_row = 0
        self.full = False  # answers should be read when there is time for it
        self._read = read
        self._unread: deque[Exchange] = deque()
        self._unread_bytes = 0

    @property
    def overfull(self) -> bool:
        """Answers must be read, time or no time."""
        return self._unread_bytes > 4 * HELD_BYTES

    def keep(self, exchange: Exchange) -> None:
        response = exchange.response
        answered = exchange.failure is None and response is not None and response.status < 400
        self.failures_in_a_row = 0 if answered else self.failures_in_a_row + 1
        self.failed += not answered
        self.ended += 1
        self._unread.append(exchange)
        if response is not None:
            self.chunks += len(response.stamps_ns)
            self._unread_bytes += response.received_bytes
            self.full = self._unread_bytes > HELD_BYTES

    def read_one(self) -> None:
        exchange = self._unread.popleft()
        self.records.append(self._read(exchange))
        if exchange.response is not None:
            self._unread_bytes -= exchange.response.received_bytes
            self.full = self._unread_bytes > HELD_BYTES

    def read_all(self) -> None:
        while self._unread:
            self.read_one()
