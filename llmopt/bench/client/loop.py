"""The load in one thread: sends each prepared request when it is due and stores (stamp, bytes) of what comes back.

Sockets do not block and are watched by epoll. Stamps are the kernel's (SO_TIMESTAMPNS), so they are right however late
this loop reads, and it may let some gather (pace.py); where there is none, it is taken on reading. A receive is not
parsed, for that would hold up the other streams: answers are read after the load, by `read`. Only when a long load has
filled the store are they read before, while nothing else is to be done. The collector of cyclic garbage stands still
for the same reason.
"""

from __future__ import annotations

import gc
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from time import monotonic_ns
from typing import Generic

from llmopt.bench.client.base import Exchange, Failure, Interrupted, Job, Load, Plan, R, Watch
from llmopt.bench.client.connections import Connections, Timers
from llmopt.bench.client.interrupts import came, ctrl_c
from llmopt.bench.client.link import Link
from llmopt.bench.client.pace import Pace
from llmopt.bench.client.stamps import ANCILLARY_BYTES, Stamps, await_kernel
from llmopt.bench.client.store import Store
from llmopt.bench.client.wire import MalformedError, Response

_RECEIVE_BYTES = 16 * 1024
_READABLE = select.EPOLLIN
_FEW, _MANY = 8, 64  # sockets to be read; requests in flight
_WATCH_NS = 500_000_000
_OPENED_BEFORE = 256  # connections of an open loop, at most
_PATIENCE = 64
_STALE_NS = 1_000_000_000  # a connection that was idle so long may be closed just when a request is sent


def drive(plan: Plan, read: Callable[[Exchange], R], watch: Callable[[Watch], None] | None = None) -> Load[R]:
    """Run the load; blocks. `read` makes a record of an exchange; `watch` hears about twice a second how it stands.

    Errors of single requests are in their exchanges. A stream that cannot connect is given up, and so is the whole
    load when nothing but failures comes back. Raises Interrupted on Ctrl-C.
    """
    with ctrl_c() as stop:
        driver = Driver(plan, read, stop, watch)
        driver.connect()
        return driver.run(monotonic_ns())


class Driver(Generic[R]):
    """A load in two steps, so that several processes can begin at once: `connect`, then `run`.

    When something comes on `stop`, both end early and raise Interrupted.
    """

    def __init__(
        self,
        plan: Plan,
        read: Callable[[Exchange], R],
        stop: socket.socket,
        watch: Callable[[Watch], None] | None = None,
    ) -> None:
        if plan.repeat and (plan.duration_s is None or plan.streams is None):
            raise ValueError("a load that repeats its jobs needs streams and a duration")
        self._plan = plan
        self._watch = watch
        self._stop = stop
        self._stopped = False
        self._closed_loop = plan.streams is not None
        self._timers = Timers()
        self._connections = Connections(
            self._timers, kernel_stamps=plan.kernel_stamps, stop=stop, stands=self._stands, fails=self._end_unsent
        )
        self._stamps = Stamps(plan.kernel_stamps)
        self._pace = Pace()
        self._store = Store(read)
        self._jobs: Iterator[Job] = iter(())  # that the streams are to send
        self._soon: deque[tuple[Job | None, int | None]] = deque()  # to start at once, with their due times
        self._held_back: deque[tuple[Job, int | None]] = deque()  # due, but `in_flight` are out
        self._alive = 0  # streams, or jobs of an open loop, that have not ended
        self._in_flight = 0
        self._timeout_ns = int(plan.timeout_s * 1e9)
        self._deadline_ns: int | None = None
        self._patience = max(16, 4 * plan.streams) if plan.streams else _PATIENCE  # failures in a row to give up after
        self._late_ms: list[float] = []

    def connect(self) -> None:
        """Open the connections that the load will need at once."""
        jobs = cycle(self._plan.jobs) if self._plan.repeat else self._plan.jobs
        wanted = [job.target for job in islice(jobs, self._opened_before())]
        self._connections.open_before(self._plan.targets, wanted, self._turn_connecting)
        if self._plan.kernel_stamps:
            await_kernel()

    def _turn_connecting(self) -> None:
        self._turn()
        if self._stopped:
            self._connections.close_all()
            raise Interrupted(self._load(monotonic_ns(), 0.0, 0.0))

    def run(self, started_ns: int) -> Load[R]:
        """Run the load from `started_ns` on, which may lie ahead."""
        began_cpu_ns = time.thread_time_ns()
        try:
            with _no_collection():
                self._schedule(started_ns)
                self._turn_until_ended(started_ns)
                wall_s = max(0, monotonic_ns() - started_ns) / 1e9
                cpu_s = (time.thread_time_ns() - began_cpu_ns) / 1e9
                if self._stopped:
                    self._cut()
                self._store.read_all()
        finally:
            self._connections.close_all()
        load = self._load(started_ns, wall_s, cpu_s)
        if came(self._stop):
            raise Interrupted(load)
        return load

    def _opened_before(self) -> int:
        plan = self._plan
        if plan.streams is not None:
            return plan.streams
        first_second = sum((job.due_ns or 0) < 1_000_000_000 for job in plan.jobs)
        return min(first_second, plan.in_flight or first_second, _OPENED_BEFORE)

    def _schedule(self, started_ns: int) -> None:
        plan = self._plan
        if plan.duration_s is not None:
            self._deadline_ns = started_ns + int(plan.duration_s * 1e9)
        if plan.streams is None:
            for job in plan.jobs:
                self._add(started_ns + (job.due_ns or 0), job)
            return
        self._jobs = cycle(plan.jobs) if plan.repeat else iter(plan.jobs)
        for number in range(plan.streams if plan.repeat else min(plan.streams, len(plan.jobs))):
            self._add(started_ns + int(plan.ramp_s * 1e9 * number / plan.streams), None)

    def _add(self, due_ns: int, item: Job | None) -> None:
        if self._deadline_ns is None or due_ns < self._deadline_ns:
            self._alive += 1
            self._timers.add(due_ns, item)

    def _turn_until_ended(self, started_ns: int) -> None:
        if self._watch is None:
            while self._alive and not self._stopped:
                self._turn()
            return
        next_ns = started_ns
        while self._alive and not self._stopped:
            self._turn(next_ns)
            now = monotonic_ns()
            if now >= next_ns:
                next_ns = now + _WATCH_NS
                self._watch(self._state(now - started_ns))
        self._watch(self._state(monotonic_ns() - started_ns))

    def _turn(self, until_ns: int | None = None) -> None:
        """Wait until something is to be done, and do it."""
        timers = self._timers
        if self._store.full:
            ready = self._connections.wait(0)
            if not ready or self._store.overfull:
                self._store.read_one()
        else:
            due_ns = timers.next_ns
            ready = self._connections.wait(due_ns if until_ns is None or due_ns < until_ns else until_ns)
            if 0 < len(ready) < _FEW and self._in_flight >= _MANY:
                ready = self._gather(ready, due_ns)
        if ready:
            self._stamps.look()
            links = self._connections.links
            for number, mask in ready:
                link = links.get(number)
                if link is None:  # it was closed in this turn, or it is no connection
                    self._stopped |= number == self._stop.fileno()
                    continue
                if mask == _READABLE and link.connected:
                    self._receive(link)
                else:
                    self._serve(link, mask)
                if self._soon:
                    self._start_all()
        while timers.next_ns <= monotonic_ns():
            when_ns, item = timers.pop()
            if not isinstance(item, Link):
                self._start(item, when_ns)
            elif self._connections.is_late(item, when_ns):
                self._end(item, monotonic_ns(), Failure("timeout", f"no end within {self._plan.timeout_s:g} s"))
            self._start_all()

    def _gather(self, ready: list[tuple[int, int]], due_ns: int) -> list[tuple[int, int]]:
        """Let more come before these few are read, unless a request is due meanwhile or stamps are taken on reading."""
        link = self._connections.links.get(ready[0][0])
        if link is not None and link.exchange is not None and link.exchange.response is not None:
            self._pace.look(link.exchange.response.stamps_ns)
        pause_ns = self._pace.pause_ns(due_ns - monotonic_ns()) if self._stamps.kind == "kernel" else 0
        if not pause_ns:
            return ready
        time.sleep(pause_ns / 1e9)
        return self._connections.wait(0)

    def _receive(self, link: Link) -> None:
        """The hot path: all that a token costs before the load is over."""
        exchange = link.exchange
        try:
            data, ancillary, _, _ = link.sock.recvmsg(_RECEIVE_BYTES, ANCILLARY_BYTES)  # type: ignore[union-attr]
            stamp_ns = self._stamps.of(ancillary, exchange.sent_ns if exchange is not None else 0)
            ended = not data
            if link.secure is not None:
                data, ended = link.secure.open(data)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(link, error)
            return
        if exchange is None:
            if data or ended:  # hung up, or speaks unasked: a further answer could not be told from this
                self._connections.close(link)
            return
        if data:
            try:
                if exchange.response.feed(stamp_ns, data):  # type: ignore[union-attr]
                    self._end(link, stamp_ns, None)
                    return
            except MalformedError as error:
                self._end(link, stamp_ns, Failure("malformed", str(error)))
                return
        if ended:
            self._lose(link, None)

    def _serve(self, link: Link, mask: int) -> None:
        """What is rare: a connection that begins, one that takes more of a request, an error."""
        if not link.connected:
            self._connections.go_on(link, mask)
            return
        if mask & select.EPOLLOUT:
            try:
                self._connections.flush(link)
            except OSError as error:
                self._lose(link, error)
                return
        if mask & ~select.EPOLLOUT:
            self._receive(link)

    def _start_all(self) -> None:
        while self._soon:
            self._start(*self._soon.popleft())

    def _start(self, job: Job | None, due_ns: int | None) -> None:
        """Send a job, or the next one of a stream."""
        if self._is_over(due_ns):
            self._alive -= 1
            return
        if job is None:
            job, due_ns = next(self._jobs, None), None
            if job is None:
                self._alive -= 1
                return
        elif not self._closed_loop and self._plan.in_flight is not None and self._in_flight >= self._plan.in_flight:
            self._held_back.append((job, due_ns))
            return
        self._in_flight += 1
        pool = self._connections.pools[job.target]
        exchange = Exchange(job, due_ns)
        if pool.idle:
            self._send(pool.idle.pop(), exchange)
        elif pool.failures:
            self._end_unsent(exchange, pool.failures.pop())
        else:
            self._connections.open(pool, exchange)
        if not self._closed_loop and len(pool.idle) + pool.opening < 2 + pool.size // 16:
            self._connections.open(pool, None)  # so that the next one need not wait for a connection

    def _is_over(self, due_ns: int | None) -> bool:
        """Whether what is due then, or now, may not start any more."""
        if self._store.failures_in_a_row >= self._patience:
            self._alive -= self._timers.drop_starts() + len(self._held_back)
            self._held_back.clear()
            return True
        return self._deadline_ns is not None and (due_ns or monotonic_ns()) >= self._deadline_ns

    def _let_go(self) -> None:
        """There is room for one that was held back; at the load's end those still held back are failures."""
        if self._deadline_ns is None or monotonic_ns() < self._deadline_ns:
            self._soon.append(self._held_back.popleft())
            return
        while self._held_back:
            exchange = Exchange(*self._held_back.popleft())
            exchange.sent_ns = exchange.end_ns = monotonic_ns()
            exchange.failure = Failure("unsent", "due, but held back by the limit of requests in flight to the end")
            self._store.keep(exchange)
            self._alive -= 1

    def _stands(self, link: Link) -> None:
        if link.exchange is None:
            self._connections.rest(link)
        else:
            self._send(link, link.exchange)

    def _send(self, link: Link, exchange: Exchange) -> None:
        exchange.response = Response()
        link.exchange = exchange
        exchange.sent_ns = now = monotonic_ns()
        try:
            link.write(exchange.job.request)
        except OSError as error:
            self._lose(link, error)
            return
        if link.unsent:
            self._connections.watch(link)
        self._connections.set_deadline(link, now + self._timeout_ns)

    def _lose(self, link: Link, error: Exception | None) -> None:
        """The connection has ended on the other side."""
        exchange = link.exchange
        if exchange is None:
            self._connections.close(link)
            return
        received = exchange.response.received_bytes if exchange.response is not None else 0
        maybe_stale = link.used or exchange.sent_ns - link.idle_ns > _STALE_NS
        if not received and maybe_stale:  # it had closed the idle connection and never saw the request
            self._connections.close(link)
            self._connections.open(link.pool, exchange)
            return
        if exchange.response is not None and exchange.response.closed():
            self._end(link, monotonic_ns(), None)
            return
        why = f" ({error})" if error else ""
        self._end(link, monotonic_ns(), Failure("cut", f"the server closed the connection after {received} bytes{why}"))

    def _end(self, link: Link, end_ns: int, failure: Failure | None) -> None:
        exchange = link.exchange
        assert exchange is not None
        response = exchange.response
        assert response is not None
        exchange.end_ns, exchange.failure = end_ns, failure
        if not self._closed_loop and exchange.due_ns is not None:
            self._late_ms.append((exchange.sent_ns - exchange.due_ns) / 1e6)
        self._store.keep(exchange)
        link.exchange = None
        link.deadline_ns = 0
        link.used = True
        if failure is not None or link.unsent or not response.keep_alive:
            self._connections.close(link)
        else:
            self._connections.rest(link)
        self._go_on(exchange)

    def _end_unsent(self, exchange: Exchange, failure: Failure) -> None:
        """There is no connection for it."""
        exchange.sent_ns = exchange.end_ns = monotonic_ns()
        exchange.response, exchange.failure = None, failure
        self._store.keep(exchange)
        if self._closed_loop:  # the stream is given up
            self._in_flight -= 1
            self._alive -= 1
        else:
            self._go_on(exchange)

    def _go_on(self, exchange: Exchange) -> None:
        """What follows on an exchange that has ended: the conversation, the stream's next job, or nothing."""
        if not self._closed_loop:
            self._patience = max(self._patience, _PATIENCE + self._in_flight)
        self._in_flight -= 1
        follower = exchange.job.then(exchange) if exchange.job.then is not None else None
        if follower is not None and follower.due_ns is not None:
            self._alive -= 1
            self._add(follower.due_ns, follower)
        elif follower is not None:
            self._soon.append((follower, None))
        elif self._closed_loop:
            self._soon.append((None, None))
        else:
            self._alive -= 1
        if self._held_back:
            self._let_go()

    def _cut(self) -> None:
        """Keep what is in flight as it is."""
        now = monotonic_ns()
        for link in self._connections.links.values():
            exchange = link.exchange
            if exchange is None or exchange.response is None:
                continue
            exchange.end_ns, exchange.failure = now, Failure("interrupted", "Ctrl-C came before its end")
            self._store.keep(exchange)

    def _state(self, elapsed_ns: int) -> Watch:
        exchanges = [link.exchange for link in self._connections.links.values() if link.exchange is not None]
        chunks = sum(len(exchange.response.stamps_ns) for exchange in exchanges if exchange.response is not None)
        return Watch(
            elapsed_s=max(0, elapsed_ns) / 1e9,
            in_flight=self._in_flight,
            ended=self._store.ended,
            failed=self._store.failed,
            chunks=self._store.chunks + chunks,
        )

    def _load(self, started_ns: int, wall_s: float, cpu_s: float) -> Load[R]:
        return Load(
            records=self._store.records,
            started_ns=started_ns,
            wall_s=wall_s,
            cpu_s=cpu_s,
            lags_ms=self._stamps.lags_ms,
            late_ms=self._late_ms,
            reconnects=self._connections.reconnects,
            stamps=self._stamps.kind,
        )


@contextmanager
def _no_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
