"""A target's connections. Each is a socket that does not block: being opened, idle, or with one request on it."""

from __future__ import annotations

import os
import select
import socket
import ssl
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from llmopt.bench.client import stamps, tls
from llmopt.bench.client.base import Exchange, Failure, Target


@dataclass(slots=True)
class Pool:
    """A target's connections."""

    host: str
    trust: ssl.SSLContext | None  # None: without TLS
    addresses: list[tuple[Any, ...]]  # of getaddrinfo; the one that answered last comes first
    unresolved: Failure | None
    idle: list[Link] = field(default_factory=list)
    size: int = 0  # connections that stand
    opening: int = 0  # connections that are to be idle once they stand
    lost: int = 0  # connections that ended after use and were not replaced yet
    failures: list[Failure] = field(default_factory=list)  # of connections that were to be opened before the load

    @classmethod
    def of(cls, target: Target) -> Pool:
        """Looks up the name, so it can take a while."""
        parts = urlsplit(target.url)
        secure = parts.scheme == "https"
        addresses: list[tuple[Any, ...]] = []
        unresolved = None
        try:
            port = parts.port or (443 if secure else 80)
            addresses = list(socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM))
        except (OSError, ValueError) as error:
            unresolved = Failure("refused", f"no address for `{parts.hostname}` ({error})")
        return cls(parts.hostname or "", tls.context() if secure else None, addresses, unresolved)


class Link:
    """A connection. `exchange` is the request that is on it, or waits for it to stand."""

    __slots__ = (
        "connected",
        "deadline_ns",
        "exchange",
        "idle_ns",
        "plain",
        "pool",
        "secure",
        "sock",
        "timer_ns",
        "unsent",
        "untried",
        "used",
        "why",
    )

    def __init__(self, pool: Pool, exchange: Exchange | None) -> None:
        self.pool = pool
        self.exchange = exchange
        self.sock: socket.socket | None = None
        self.plain = pool.trust is None
        self.secure: tls.Session | None = None
        self.connected = False
        self.used = False  # a response has come over it
        self.idle_ns = 0  # since when it stands without a request
        self.deadline_ns = 0  # 0: none
        self.timer_ns = 0  # the earliest that is set for it; 0: none
        self.unsent = b""
        self.untried = list(pool.addresses)
        self.why = pool.unresolved or Failure("refused", "no address")  # the last attempt failed

    @property
    def interest(self) -> int:
        """The events to wait for."""
        if not self.connected and self.secure is None:
            return select.EPOLLOUT
        return select.EPOLLIN | (select.EPOLLOUT if self.unsent else 0)

    def begin(self, *, kernel_stamps: bool) -> bool:
        """Start connecting to the next address; False when none is left, and `why` says why."""
        while self.untried:
            family, kind, protocol, _, address = self.untried.pop(0)
            try:
                sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
            except OSError as error:
                self.why = Failure("refused", str(error))
                continue
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if kernel_stamps:
                    stamps.ask_kernel(sock)
                sock.connect(address)
            except BlockingIOError:
                pass
            except OSError as error:
                sock.close()
                self.why = Failure("refused", str(error))
                continue
            self.sock = sock
            return True
        return False

    def go_on(self, mask: int) -> None:
        """Go on connecting, after an event; `connected` is True when it stands. Raises OSError, of which ssl.SSLError.

        A handshake that fails leaves the alert for the server in `unsent`.
        """
        assert self.sock is not None
        if self.secure is None:
            if code := self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(code, os.strerror(code))
            try:
                address = self.sock.getpeername()
            except OSError:
                return  # the event was for an older socket of this number
            self.pool.addresses.sort(key=lambda item: item[4] != address)
            if self.pool.trust is not None:
                self.secure = tls.Session(self.pool.trust, self.pool.host)
                self.secure.handshake(b"")
            else:
                self.connected = True
        elif mask & ~select.EPOLLOUT:
            data = self.sock.recv(65536)
            if not data:
                raise ssl.SSLError("the server closed the connection during the handshake")
            self.connected = self.secure.handshake(data)
        self.flush()

    def write(self, data: bytes) -> None:
        """Send what the socket takes and keep the rest as `unsent`. Raises OSError."""
        if self.secure is not None:
            self.secure.seal(data)
            data = b""
        self.flush(data)

    def flush(self, data: bytes = b"") -> None:
        assert self.sock is not None
        waiting = self.unsent + data
        if self.secure is not None:
            waiting += self.secure.outgoing()
        if not waiting:
            return
        try:
            sent = self.sock.send(waiting)
        except BlockingIOError:
            sent = 0
        self.unsent = waiting[sent:]
