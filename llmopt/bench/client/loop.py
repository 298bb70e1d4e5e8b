"""The closed-loop load: streams that each send their next prepared request when the last one has ended.

One thread, asyncio protocols, HTTP/1.1 with keep-alive. On a receive the client stores (monotonic stamp, bytes) and
looks for the end of the response, no more: JSON is read after the load (records.py), since parsing between receives
would delay the stamps of the other streams. The collector of cyclic garbage stands still for the same reason. Only
when a long load has filled `_HELD_BYTES` with unread answers is each further one read as it ends.
"""

from __future__ import annotations

import asyncio
import gc
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Generic
from urllib.parse import urlsplit

from llmopt.bench.client.base import Exchange, Failure, Job, Load, R, Target
from llmopt.bench.client.wire import MalformedError, Response

_CONNECT_TIMEOUT_S = 10.0
_LAG_TICK_S = 0.02
_HELD_BYTES = 256 << 20


def closed_loop(
    target: Target,
    bodies: Sequence[bytes],
    read: Callable[[Exchange], R],
    *,
    streams: int,
    timeout_s: float,
    duration_s: float | None = None,
    repeat: bool = False,
) -> Load[R]:
    """Send `bodies` in order over `streams` connections; blocks. With `repeat`, begin again at the first when used up.

    `read` makes a record of an exchange. Errors of single requests are in their exchanges. A stream that cannot
    connect is given up, and so is the whole load when nothing but failures comes back.
    """
    if repeat and duration_s is None:
        raise ValueError("a load that repeats its prompts needs a duration")
    requests = [Job(target.request(body), number) for number, body in enumerate(bodies)]
    loop = _ClosedLoop(target, cycle(requests) if repeat else iter(requests), read, timeout_s, duration_s)
    with _no_collection():
        return asyncio.run(loop.run(streams))


class _ClosedLoop(Generic[R]):
    def __init__(
        self,
        target: Target,
        jobs: Iterator[Job],
        read: Callable[[Exchange], R],
        timeout_s: float,
        duration_s: float | None,
    ) -> None:
        self._jobs = jobs
        self._read = read
        self._timeout_s = timeout_s
        self._duration_s = duration_s
        self._deadline_ns: int | None = None
        self._parts = urlsplit(target.url)
        self._tls = ssl.create_default_context() if self._parts.scheme == "https" else None
        self._unread: list[Exchange] = []
        self._unread_bytes = 0
        self._records: list[R] = []
        self._failures_in_a_row = 0
        self._patience = 0  # failures in a row after which the load is given up
        self._reconnects = 0
        self._connections: set[_Connection] = set()

    async def run(self, streams: int) -> Load[R]:
        self._patience = max(16, 4 * streams)
        lags_ms: list[float] = []
        try:
            links = await asyncio.gather(*(self._connect() for _ in range(streams)))
            ticker = asyncio.create_task(_measure_lag(lags_ms))
            cpu_ns, began_ns = time.thread_time_ns(), time.monotonic_ns()
            if self._duration_s is not None:
                self._deadline_ns = began_ns + int(self._duration_s * 1e9)
            await asyncio.gather(*(self._work(link) for link in links))
            wall_s = (time.monotonic_ns() - began_ns) / 1e9
            cpu_s = (time.thread_time_ns() - cpu_ns) / 1e9
            ticker.cancel()
        finally:
            for connection in self._connections:
                connection.abort()
        records = [self._read(exchange) for exchange in self._unread] + self._records
        return Load(records, began_ns, wall_s, cpu_s, lags_ms, [], self._reconnects, "user")

    def _next(self) -> Job | None:
        if self._failures_in_a_row >= self._patience:
            return None
        if self._deadline_ns is not None and time.monotonic_ns() >= self._deadline_ns:
            return None
        return next(self._jobs, None)

    async def _work(self, link: _Connection | Failure) -> None:
        while (job := self._next()) is not None:
            if isinstance(link, _Connection) and not link.open:
                link = await self._reconnect()
            if isinstance(link, _Connection):
                reused = link.used
                exchange = await link.ask(job, self._timeout_s)
                if reused and _is_stale(exchange):
                    link = await self._reconnect()
                    if isinstance(link, _Connection):
                        exchange = await link.ask(job, self._timeout_s)
            if isinstance(link, Failure):
                now = time.monotonic_ns()
                self._keep(Exchange(job, None, now, now, None, link))
                return
            self._keep(exchange)

    def _keep(self, exchange: Exchange) -> None:
        answered = exchange.failure is None and exchange.response is not None and exchange.response.status < 400
        self._failures_in_a_row = 0 if answered else self._failures_in_a_row + 1
        if self._unread_bytes > _HELD_BYTES:
            self._records.append(self._read(exchange))
            return
        self._unread.append(exchange)
        self._unread_bytes += exchange.response.received_bytes if exchange.response is not None else 0

    async def _reconnect(self) -> _Connection | Failure:
        self._reconnects += 1
        return await self._connect()

    async def _connect(self) -> _Connection | Failure:
        parts = self._parts
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                _, connection = await asyncio.get_running_loop().create_connection(
                    _Connection,
                    parts.hostname or "",
                    parts.port or (443 if self._tls else 80),
                    ssl=self._tls,
                )
        except TimeoutError:
            return Failure("timeout", f"no connection within {_CONNECT_TIMEOUT_S:g} s")
        except OSError as error:
            return Failure("refused", str(error))
        self._connections.add(connection)
        return connection


class _Connection(asyncio.Protocol):
    """A keep-alive connection with at most one request on it."""

    def __init__(self) -> None:
        self.open = False
        self.used = False
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[Failure | None] | None = None
        self._response = Response()
        self._last_ns = 0

    async def ask(self, job: Job, timeout_s: float) -> Exchange:
        """Send the request and wait for the end of its response, whatever that is."""
        assert self._transport is not None
        loop = asyncio.get_running_loop()
        self.used = True
        self._response = response = Response()
        self._waiter = loop.create_future()
        late = Failure("timeout", f"no end within {timeout_s:g} s")
        timer = loop.call_later(timeout_s, self._settle, late)
        sent_ns = self._last_ns = time.monotonic_ns()
        self._transport.write(job.request)
        try:
            failure = await self._waiter
        finally:
            timer.cancel()
            self._waiter = None
        if failure is late:
            self._last_ns = time.monotonic_ns()
        return Exchange(job, None, sent_ns, self._last_ns, response, failure)

    def abort(self) -> None:
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.open = True

    def data_received(self, data: bytes) -> None:
        self._last_ns = stamp_ns = time.monotonic_ns()
        if self._waiter is None:  # nobody asked; a further answer could not be told from this
            self.abort()
            return
        try:
            if self._response.feed(stamp_ns, data):
                self._settle(None)
        except MalformedError as error:
            self._settle(Failure("malformed", str(error)))

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        if self._waiter is None:
            return
        if self._response.closed():
            self._settle(None)
        else:
            why = f" ({error})" if error else ""
            received = self._response.received_bytes
            self._settle(Failure("cut", f"the server closed the connection after {received} bytes{why}"))

    def _settle(self, failure: Failure | None) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(failure)
        if failure is not None or not self._response.keep_alive:
            self.abort()


def _is_stale(exchange: Exchange) -> bool:
    """The server had closed an idle connection while the request was on its way: it never saw it."""
    cut = exchange.failure is not None and exchange.failure.kind == "cut"
    return cut and exchange.response is not None and exchange.response.received_bytes == 0


async def _measure_lag(lags_ms: list[float]) -> None:
    """How late the loop serves a timer: about as late as it may stamp a receive (it rounds timers up to 1 ms)."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + _LAG_TICK_S
        await asyncio.sleep(_LAG_TICK_S)
        lags_ms.append(max(0.0, (loop.time() - due_s) * 1e3))


@contextmanager
def _no_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
