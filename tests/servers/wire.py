"""HTTP/1.1 on a socket: heads, and bodies as a stream of parts that are never held whole."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Literal

PART_BYTES = 1 << 18
HEAD_BYTES = 1 << 16

#: How long a body is: bytes, in chunks, or until the connection closes.
Framing = int | Literal["chunked", "until-close"]


def headers_of(head: bytes) -> dict[str, str]:
    """Names in lower case."""
    lines = head.decode("latin-1").split("\r\n")[1:]
    pairs = (line.partition(":") for line in lines if line)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def status_of(head: bytes) -> int:
    return int(head.split(maxsplit=2)[1])


def request_framing(headers: Mapping[str, str]) -> Framing:
    if "chunked" in headers.get("transfer-encoding", "").lower():
        return "chunked"
    return int(headers.get("content-length", "0"))


def response_framing(method: str, status: int, headers: Mapping[str, str]) -> Framing:
    if method == "HEAD" or status in (204, 304) or status < 200:
        return 0
    if "chunked" in headers.get("transfer-encoding", "").lower():
        return "chunked"
    return int(headers["content-length"]) if "content-length" in headers else "until-close"


class EndedError(ConnectionError):
    """The other side ended in order, but within a head or a body."""


class Wire:
    """One side of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.before_wait: Callable[[], None] = lambda: None  # called before each read that may block
        self.trailers = b""  # of the body in chunks read last
        self._rest = b""  # read, but not taken yet
        self._space = bytearray(PART_BYTES)

    def head(self) -> bytes | None:
        """Up to and with the empty line; None where the other side ended instead of beginning one."""
        found = self._rest
        while (end := found.find(b"\r\n\r\n")) < 0:
            if len(found) > HEAD_BYTES:
                raise EndedError("a head without an end")
            self.before_wait()
            more = self.socket.recv(HEAD_BYTES)
            if not more:
                if found:
                    raise EndedError("ended within a head")
                return None
            found += more
        self._rest = found[end + 4 :]
        return found[: end + 4]

    def body(self, framing: Framing) -> Iterator[memoryview]:
        """The content without the chunks' framing; each part is valid until the next."""
        self.trailers = b""
        if framing == "chunked":
            while size := int(self._line().split(b";")[0], 16):
                yield from self._exactly(size)
                self._line()
            while (line := self._line()) != b"\r\n":
                self.trailers += line
        elif framing == "until-close":
            while part := self._some(PART_BYTES):
                yield part
        else:
            yield from self._exactly(framing)

    def write_part(self, part: bytes | bytearray | memoryview, framing: Framing) -> None:
        if framing == "chunked":
            self.socket.sendall(b"%x\r\n" % len(part))
            self.socket.sendall(part)
            self.socket.sendall(b"\r\n")
        else:
            self.socket.sendall(part)

    def write_end(self, framing: Framing, trailers: bytes) -> None:
        if framing == "chunked":
            self.socket.sendall(b"0\r\n" + trailers + b"\r\n")

    def reset(self) -> None:
        """Break the connection off: the other side gets an error, not an end."""
        with suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def finish(self, patience_s: float = 2) -> None:
        """End in order: what was sent arrives, though the other side may still be sending."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
            self.socket.settimeout(patience_s)
            self.wait_for_end()
        self.socket.close()

    def wait_for_end(self) -> None:
        while self.socket.recv_into(self._space):
            pass

    def _some(self, limit: int) -> memoryview:
        if self._rest:
            part, self._rest = self._rest[:limit], self._rest[limit:]
            return memoryview(part)
        self.before_wait()
        count = self.socket.recv_into(self._space, min(limit, PART_BYTES))
        return memoryview(self._space)[:count]

    def _exactly(self, size: int) -> Iterator[memoryview]:
        while size:
            part = self._some(size)
            if not part:
                raise EndedError("ended within a body")
            size -= len(part)
            yield part

    def _line(self) -> bytes:
        while (end := self._rest.find(b"\n")) < 0:
            self.before_wait()
            more = self.socket.recv(HEAD_BYTES)
            if not more:
                raise EndedError("ended within a chunk's head")
            self._rest += more
        line, self._rest = self._rest[: end + 1], self._rest[end + 1 :]
        return line
