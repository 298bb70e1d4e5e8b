"""A proxy between a client and an S3 server that breaks what it is told to, and counts what passes.

    with Proxy(server) as proxy:
        proxy.fail(match=lambda request: "partNumber" in request.query, times=2, with_=Cut(after_request_bytes=1000))
        push(proxy.server)  # a Server whose endpoint is the proxy
        assert proxy.count("PUT") == 5

Heads pass unchanged (a signature covers Host), bodies as they come, except that chunks are cut anew. Each connection of
a client is a thread and, from its first request that is passed on, one connection to the server.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from urllib.parse import parse_qsl, unquote

from servers.server import Server
from servers.wire import EndedError, Framing, Wire, headers_of, request_framing, response_framing, status_of


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Reset both connections once so much of a body has passed, or at its end where it is shorter.

    A client may see less of a response: a reset discards what it has not read yet.
    """

    after_request_bytes: int | None = None
    after_response_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Truncate:
    """End the connection in order after so much of a response's body: less comes than Content-Length promised."""

    after_response_bytes: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Answer with an error in S3's form; the server hears nothing of the request."""

    status: int = 500
    code: str = "InternalError"
    message: str = "We encountered an internal error. Please try again."


SLOW_DOWN = Answer(status=503, code="SlowDown", message="Please reduce your request rate.")


@dataclass(frozen=True, kw_only=True)
class LoseReply:
    """Pass the request on, take the whole reply, and reset the client's connection: it happened, but nobody knows."""


@dataclass(frozen=True, kw_only=True)
class Slow:
    """Let a body pass at this rate at most; `delay_s` comes before the request is passed on."""

    request_bytes_per_s: float | None = None
    response_bytes_per_s: float | None = None
    delay_s: float = 0


@dataclass(frozen=True, kw_only=True)
class Flip:
    """Turn a bit of the byte at this place in a body; a shorter body passes unharmed."""

    request_byte: int | None = None
    response_byte: int | None = None


@dataclass(frozen=True, kw_only=True)
class Hang:
    """Take the request and never answer; `forward`: the server has got it, and its reply is dropped."""

    forward: bool = False


Fault = Cut | Truncate | Answer | LoseReply | Slow | Flip | Hang


@dataclass(kw_only=True)
class Exchange:
    """A request and what became of it. Bytes are those of bodies, as they pass (with aws-chunked's framing, if any)."""

    method: str
    path: str  # decoded: /bucket/a key
    query: Mapping[str, str]
    headers: Mapping[str, str]  # of the request, names in lower case
    status: int | None = None  # the server's, or that of an Answer; None where there was none
    request_bytes: int = 0  # that came from the client
    response_bytes: int = 0  # that were sent to the client
    fault: Fault | None = None


@dataclass(kw_only=True)
class Rule:
    match: Callable[[Exchange], bool]
    fault: Fault
    times: int | None
    skip: int
    hits: int = 0  # requests that met the fault

    def takes(self, request: Exchange) -> bool:
        if (self.times is not None and self.hits >= self.times) or not self.match(request):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.hits += 1
        return True


class _BrokenOffError(Exception):
    """A fault has had its way with the connection."""


class _EarlyReplyError(Exception):
    def __init__(self, head: bytes) -> None:
        self.head = head


class Proxy:
    def __init__(self, server: Server) -> None:
        self.upstream = server
        self.exchanges: list[Exchange] = []  # in the order in which their heads came
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._live: set[Wire] = set()
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.server = replace(server, endpoint=f"http://127.0.0.1:{self._listener.getsockname()[1]}")
        self._start(self._accept)

    def fail(
        self,
        *,
        with_: Fault,
        match: Callable[[Exchange], bool] = lambda request: True,
        times: int | None = 1,
        skip: int = 0,
    ) -> Rule:
        """The next `times` requests that match (None: all), after `skip` others that do, meet the fault.

        Of several rules the first that takes a request has it. `match` sees method, path, query and headers.
        """
        rule = Rule(match=match, fault=with_, times=times, skip=skip)
        with self._lock:
            self._rules.append(rule)
        return rule

    def heal(self) -> None:
        """No more faults for requests to come."""
        with self._lock:
            self._rules.clear()

    def forget(self) -> None:
        """Begin counting anew."""
        with self._lock:
            self.exchanges = []

    def count(self, *methods: str) -> int:
        """Requests, of these methods or of any."""
        return len(self._of(methods))

    def sent_bytes(self, *methods: str) -> int:
        """Bytes of request bodies that clients have sent."""
        return sum(exchange.request_bytes for exchange in self._of(methods))

    def received_bytes(self, *methods: str) -> int:
        """Bytes of response bodies that were sent to clients."""
        return sum(exchange.response_bytes for exchange in self._of(methods))

    def log(self) -> list[tuple[str, str, Mapping[str, str], int | None]]:
        """(method, path, query, status) of each request."""
        return [(exchange.method, exchange.path, exchange.query, exchange.status) for exchange in self._of(())]

    def close(self) -> None:
        with self._lock:
            self._closed = True
            live, threads = list(self._live), list(self._threads)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._listener.close()
        for wire in live:
            with suppress(OSError):
                wire.socket.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(10)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _of(self, methods: tuple[str, ...]) -> list[Exchange]:
        with self._lock:
            return [exchange for exchange in self.exchanges if not methods or exchange.method in methods]

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True, name="proxy")
        with self._lock:
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            thread.start()
            self._threads.append(thread)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._start(_Connection(self, connection).run)

    def _hold(self, wire: Wire) -> Wire:
        with self._lock:
            self._live.add(wire)
            if self._closed:
                wire.socket.shutdown(socket.SHUT_RDWR)
        return wire

    def _release(self, wire: Wire) -> None:
        with self._lock:
            self._live.discard(wire)

    def _begin(self, head: bytes) -> Exchange:
        """Write the request down, with the fault it is to meet."""
        method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        path, _, query = target.partition("?")
        pairs = dict(parse_qsl(query, keep_blank_values=True))
        exchange = Exchange(method=method, path=unquote(path), query=pairs, headers=headers_of(head))
        with self._lock:
            exchange.fault = next((rule.fault for rule in self._rules if rule.takes(exchange)), None)
            self.exchanges.append(exchange)
        return exchange


class _Connection:
    """One connection of a client, in a thread of its own."""

    def __init__(self, proxy: Proxy, connection: socket.socket) -> None:
        self.proxy = proxy
        self.client = proxy._hold(Wire(connection))
        self.server: Wire | None = None

    def run(self) -> None:
        try:
            while (head := self.client.head()) is not None and self._exchange(head):
                pass
            self.client.finish()
        except EndedError:
            self.client.finish()
        except (_BrokenOffError, OSError):  # one of the three has broken it off, so the others hear of it
            self.client.reset()
            if self.server is not None:
                self.server.reset()
        finally:
            for wire in filter(None, (self.client, self.server)):
                self.proxy._release(wire)
                wire.socket.close()

    def _exchange(self, head: bytes) -> bool:
        """Whether the connection may be used again."""
        exchange = self.proxy._begin(head)
        fault = exchange.fault
        framing = request_framing(exchange.headers)
        if isinstance(fault, Answer):
            return self._answer(exchange, framing, fault)
        if isinstance(fault, Hang) and not fault.forward:
            self._take_request(exchange, framing)
            self.client.wait_for_end()
            return False
        if isinstance(fault, Slow):
            time.sleep(fault.delay_s)
        server = self._connect()
        server.socket.sendall(head)
        reply, early = self._pass_request(exchange, framing, server)
        while status_of(reply) < 200:
            self.client.socket.sendall(reply)
            reply = _head(server)
        return self._pass_reply(exchange, reply, server) and not early

    def _connect(self) -> Wire:
        if self.server is None:
            upstream = socket.create_connection(("127.0.0.1", self.proxy.upstream.port))
            self.server = self.proxy._hold(Wire(upstream))
            watch = select.poll()
            watch.register(self.client.socket, select.POLLIN)
            watch.register(self.server.socket, select.POLLIN)
            self.client.before_wait = lambda: self._listen_to_both(watch)
        return self.server

    def _listen_to_both(self, watch: select.poll) -> None:
        """Returns when the client has something; meanwhile the server may say 100, reply before its time, or go."""
        assert self.server is not None
        server_fd = self.server.socket.fileno()
        while any(fd == server_fd for fd, _ in watch.poll()):
            reply = _head(self.server)
            if status_of(reply) >= 200:
                raise _EarlyReplyError(reply)
            self.client.socket.sendall(reply)

    def _pass_request(self, exchange: Exchange, framing: Framing, server: Wire) -> tuple[bytes, bool]:
        """The head of the reply, and whether it came before all of the request had passed."""
        fault = exchange.fault
        limit = fault.after_request_bytes if isinstance(fault, Cut) else None
        flip = fault.request_byte if isinstance(fault, Flip) else None
        rate = fault.request_bytes_per_s if isinstance(fault, Slow) else None
        try:
            if limit == 0:
                raise _BrokenOffError
            for part in self.client.body(framing):
                start = exchange.request_bytes
                exchange.request_bytes += len(part)
                for piece in _pieces(part[: None if limit is None else limit - start], rate):
                    try:
                        server.write_part(_flipped(piece, flip, start), framing)
                    except OSError:  # it has stopped listening, but may have said why
                        raise _EarlyReplyError(_head(server)) from None
                    start += len(piece)
                if limit is not None and exchange.request_bytes >= limit:
                    raise _BrokenOffError
            if limit is not None:
                raise _BrokenOffError
            server.write_end(framing, self.client.trailers)
        except _EarlyReplyError as early:
            return early.head, True
        return _head(server), False

    def _pass_reply(self, exchange: Exchange, head: bytes, server: Wire) -> bool:
        """Whether the connections may be used again."""
        fault = exchange.fault
        headers, status = headers_of(head), status_of(head)
        framing = response_framing(exchange.method, status, headers)
        exchange.status = status
        if isinstance(fault, LoseReply | Hang):
            for _ in server.body(framing):
                pass
            if isinstance(fault, Hang):
                self.client.wait_for_end()
            raise _BrokenOffError
        limit = fault.after_response_bytes if isinstance(fault, Cut | Truncate) else None
        flip = fault.response_byte if isinstance(fault, Flip) else None
        rate = fault.response_bytes_per_s if isinstance(fault, Slow) else None
        self.client.socket.sendall(head)
        if limit != 0:
            for part in server.body(framing):
                passing = part[: None if limit is None else limit - exchange.response_bytes]
                for piece in _pieces(passing, rate):
                    start = exchange.response_bytes
                    exchange.response_bytes += len(piece)
                    self.client.write_part(_flipped(piece, flip, start), framing)
                if limit is not None and exchange.response_bytes >= limit:
                    break
        if isinstance(fault, Cut) and limit is not None:
            raise _BrokenOffError
        if isinstance(fault, Truncate):
            return False
        self.client.write_end(framing, server.trailers)
        return framing != "until-close" and headers.get("connection", "").lower() != "close"

    def _take_request(self, exchange: Exchange, framing: Framing) -> None:
        for part in self.client.body(framing):
            exchange.request_bytes += len(part)

    def _answer(self, exchange: Exchange, framing: Framing, answer: Answer) -> bool:
        waits = "100-continue" in exchange.headers.get("expect", "").lower()  # for leave to send its body
        if not waits:
            self._take_request(exchange, framing)
        content = (
            f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{answer.code}</Code><Message>{answer.message}'
            f"</Message><Resource>{exchange.path}</Resource><RequestId>proxy</RequestId></Error>"
        ).encode()
        exchange.status = answer.status
        body = b"" if exchange.method == "HEAD" else content
        exchange.response_bytes = len(body)
        head = (
            f"HTTP/1.1 {answer.status} {answer.code}\r\nContent-Type: application/xml\r\n"
            f"Content-Length: {len(content)}\r\nConnection: {'close' if waits else 'keep-alive'}\r\n\r\n"
        )
        self.client.socket.sendall(head.encode() + body)
        return not waits


def _head(server: Wire) -> bytes:
    if (head := server.head()) is None:
        raise EndedError("the server has gone")
    return head


def _flipped(piece: memoryview, place: int | None, start: int) -> bytes | memoryview:
    if place is None or not start <= place < start + len(piece):
        return piece
    changed = bytearray(piece)
    changed[place - start] ^= 1
    return bytes(changed)


def _pieces(part: memoryview, bytes_per_s: float | None) -> Iterator[memoryview]:
    """The part as it is, or twentieths of a second of it, each followed by the time it is to take."""
    size = len(part) if bytes_per_s is None else max(1, int(bytes_per_s / 20))
    for start in range(0, len(part), size or 1):
        piece = part[start : start + size]
        yield piece
        if bytes_per_s is not None:
            time.sleep(len(piece) / bytes_per_s)
