"""All connections of a load: opens and closes them, watches their sockets, and keeps the timers of the loop."""

from __future__ import annotations

import heapq
import resource
import select
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from time import monotonic_ns
from typing import TypeAlias

from llmopt.bench.client.base import Exchange, Failure, Job, Target
from llmopt.bench.client.link import Link, Pool

_CONNECT_TIMEOUT_S = 10.0
_OPENING = 64  # at once before the load: more may be more than the server's queue takes
_BATCH = 64  # events between two looks at the timers
_COARSE_NS = 2_000_000  # epoll counts in milliseconds: the last ones before a timer are waited for with select
_SELECTABLE = 1024
_NEVER = 1 << 62

#: what a timer is for: a job that starts, a stream that wants its next job (None), a connection whose time may be up
Item: TypeAlias = Job | Link | None


class Timers:
    """Items by the time at which they are due."""

    def __init__(self) -> None:
        self.next_ns = _NEVER
        self._heap: list[tuple[int, int, Item]] = []
        self._order = count()

    def add(self, when_ns: int, item: Item) -> None:
        heapq.heappush(self._heap, (when_ns, next(self._order), item))
        self.next_ns = self._heap[0][0]

    def pop(self) -> tuple[int, Item]:
        when_ns, _, item = heapq.heappop(self._heap)
        self.next_ns = self._heap[0][0] if self._heap else _NEVER
        return when_ns, item

    def drop_starts(self) -> int:
        """Take out what would start; returns how many these are."""
        before = len(self._heap)
        self._heap = [entry for entry in self._heap if isinstance(entry[2], Link)]
        heapq.heapify(self._heap)
        self.next_ns = self._heap[0][0] if self._heap else _NEVER
        return before - len(self._heap)


class Connections:
    """`stands` is called for a connection that came to stand, `fails` for one that did not and had a request.

    `stop` is a socket of its own, on which something comes when the load is to be cut short.
    """

    def __init__(
        self,
        timers: Timers,
        *,
        kernel_stamps: bool,
        stop: socket.socket,
        stands: Callable[[Link], None],
        fails: Callable[[Exchange, Failure], None],
    ) -> None:
        self.links: dict[int, Link] = {}  # by the number of their socket
        self.pools: list[Pool] = []
        self.reconnects = 0
        self._timers = timers
        self._kernel_stamps = kernel_stamps
        self._stands = stands
        self._fails = fails
        self._epoll = select.epoll()  # before the sockets, so that its number is one that select takes
        self._epoll.register(stop.fileno(), select.EPOLLIN)
        self._opening = 0
        self._before_load = True

    def open_before(self, targets: Sequence[Target], wanted: Sequence[int], turn: Callable[[], None]) -> None:
        """Open a connection to each target whose index is in `wanted`; `turn` serves what happens meanwhile."""
        _allow_files(len(wanted))
        self.pools = [Pool.of(target) for target in targets]
        for pool in map(self.pools.__getitem__, wanted):
            if not pool.size and len(pool.failures) >= _OPENING:
                pool.failures.append(pool.failures[-1])  # nobody is there: the others need not wait for it too
                continue
            self.open(pool, None)
            while self._opening >= _OPENING:
                turn()
        while self._opening:
            turn()
        self._before_load = False

    def wait(self, until_ns: int) -> list[tuple[int, int]]:
        """The events of sockets; none of them when the time has come."""
        poll = self._epoll.poll
        wait_ns = until_ns - monotonic_ns()
        if wait_ns > _COARSE_NS:
            return poll(min(60.0, (wait_ns - _COARSE_NS // 2) / 1e9), _BATCH)
        ready = poll(0, _BATCH)
        if ready or wait_ns <= 0:
            return ready
        number = self._epoll.fileno()
        if number >= _SELECTABLE:
            return poll(wait_ns / 1e9, _BATCH)
        select.select([number], [], [], wait_ns / 1e9)
        return poll(0, _BATCH)

    def open(self, pool: Pool, exchange: Exchange | None) -> None:
        """A new connection, for `exchange` or to be idle."""
        if pool.lost:
            pool.lost -= 1
            self.reconnects += 1
        self._opening += 1
        pool.opening += exchange is None
        self._attempt(Link(pool, exchange))

    def go_on(self, link: Link, mask: int) -> None:
        """An event of a connection that is being opened."""
        try:
            link.go_on(mask)
        except BlockingIOError:
            return
        except ssl.SSLError as error:
            with suppress(OSError):
                link.flush()  # the alert that tells the server why
            self._attempt_again(link, Failure("tls", error.strerror or str(error.args[-1])))
            return
        except OSError as error:
            self._attempt_again(link, Failure("refused" if link.secure is None else "tls", str(error)))
            return
        self.watch(link)
        if link.connected:
            self._opened(link)
            link.pool.size += 1
            link.deadline_ns = 0
            link.idle_ns = monotonic_ns()
            self._stands(link)

    def flush(self, link: Link) -> None:
        """Send on what the socket did not take before. Raises OSError."""
        waited = bool(link.unsent)
        link.flush()
        if waited != bool(link.unsent):
            self.watch(link)

    def watch(self, link: Link) -> None:
        """Wait for what the connection is now interested in."""
        assert link.sock is not None
        self._epoll.modify(link.sock.fileno(), link.interest)

    def rest(self, link: Link) -> None:
        link.idle_ns = monotonic_ns()
        link.pool.idle.append(link)

    def close(self, link: Link) -> None:
        if not link.exchange:
            with suppress(ValueError):
                link.pool.idle.remove(link)
        self._drop_socket(link)
        link.pool.size -= link.connected
        link.pool.lost += link.used
        link.connected = False

    def close_all(self) -> None:
        for link in list(self.links.values()):
            self._drop_socket(link)
        self._epoll.close()

    def set_deadline(self, link: Link, deadline_ns: int) -> None:
        """One timer for a connection is enough: where it comes early, it is set anew."""
        link.deadline_ns = deadline_ns
        if not link.timer_ns or deadline_ns < link.timer_ns:
            link.timer_ns = deadline_ns
            self._timers.add(deadline_ns, link)

    def is_late(self, link: Link, when_ns: int) -> bool:
        """A timer of the connection has come; True when the time of its request is up."""
        if when_ns != link.timer_ns:
            return False  # an earlier one has replaced it
        link.timer_ns = 0
        if not link.deadline_ns:
            return False
        if link.deadline_ns > when_ns:
            self.set_deadline(link, link.deadline_ns)
            return False
        if not link.connected:
            what, kind = ("connection", "timeout") if link.secure is None else ("TLS handshake", "tls")
            self._attempt_again(link, Failure(kind, f"no {what} within {_CONNECT_TIMEOUT_S:g} s"))
        return link.connected

    def _attempt(self, link: Link) -> None:
        if not link.begin(kernel_stamps=self._kernel_stamps):
            self._opened(link)
            if link.exchange is not None:
                self._fails(link.exchange, link.why)
            elif self._before_load:
                link.pool.failures.append(link.why)
            return
        assert link.sock is not None
        self.links[link.sock.fileno()] = link
        self._epoll.register(link.sock.fileno(), link.interest)
        self.set_deadline(link, monotonic_ns() + int(_CONNECT_TIMEOUT_S * 1e9) // len(link.pool.addresses))

    def _attempt_again(self, link: Link, why: Failure) -> None:
        self._drop_socket(link)
        link.secure, link.unsent, link.why = None, b"", why
        self._attempt(link)

    def _opened(self, link: Link) -> None:
        self._opening -= 1
        link.pool.opening -= link.exchange is None

    def _drop_socket(self, link: Link) -> None:
        if link.sock is not None:
            self.links.pop(link.sock.fileno(), None)
            link.sock.close()  # which takes it out of the epoll set too
            link.sock = None
        link.deadline_ns = 0


def _allow_files(connections: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 256 if hard == resource.RLIM_INFINITY else min(connections + 256, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
