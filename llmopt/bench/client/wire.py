"""HTTP/1.1 responses and server-sent events as bytes; every piece keeps the stamp of the receive that brought it.

Framing (where does this response end?) is done as the bytes come, since the next request waits for it: a walk at the
end would come just then, and for all streams together where they go in step. Nothing else is done: events are cut out
after the load. Sources: RFC 9112 sections 6 and 7; the WHATWG HTML standard, 9.2.6.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from enum import Enum, auto
from functools import lru_cache
from itertools import accumulate
from typing import TypeAlias

#: (receive stamp in ns of the monotonic clock, bytes)
Piece: TypeAlias = tuple[int, bytes]

_MAX_HEAD_BYTES = 64 * 1024
_MAX_LINE_BYTES = 4 * 1024  # of a chunk's size with its extensions, or of a trailer
_HEX = re.compile(rb"[0-9a-fA-F]{1,15}")
_LINE = rb"(?>\r\n|\n|\r)"  # atomic: a CRLF is never taken for two line ends
_BLANK_LINE = re.compile(_LINE + _LINE)


class MalformedError(Exception):
    """Bytes that are not the protocol."""


class _State(Enum):
    HEAD = auto()
    CHUNK_SIZE = auto()
    CHUNK_DATA = auto()
    CHUNK_END = auto()
    TRAILERS = auto()
    LENGTH = auto()
    UNTIL_CLOSE = auto()
    COMPLETE = auto()


_CHUNK_SIZE = _State.CHUNK_SIZE  # looking up a member costs as much as a slice
_COMPLETE = _State.COMPLETE


class Response:
    """One response, fed with the bytes of each receive until `complete`.

    `status` is 0 until the head is in; `pieces` is the body without its framing, and `stamps_ns` says when each came;
    `received_bytes` counts everything.
    """

    __slots__ = ("_left", "_rest", "_state", "headers", "keep_alive", "pieces", "received_bytes", "stamps_ns", "status")

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.pieces: list[bytes] = []
        self.stamps_ns = array("q")
        self.keep_alive = True
        self.received_bytes = 0
        self._state = _State.HEAD
        self._left = 0  # bytes of the chunk or body still to come
        self._rest = b""  # the beginning of a head or line whose end has not come

    @property
    def complete(self) -> bool:
        return self._state is _State.COMPLETE

    def feed(self, stamp_ns: int, data: bytes) -> bool:
        """Take what one receive brought; True when the response is complete. Raises MalformedError."""
        self.received_bytes += len(data)
        if self._state is not _CHUNK_SIZE or self._rest:
            self._walk(stamp_ns, data)
        elif (at := self._read_whole_chunks(stamp_ns, data, 0)) < len(data):
            self._read_chunks(stamp_ns, data[at:])
        return self._state is _COMPLETE

    def closed(self) -> bool:
        """The connection has ended; True if the response is complete with that."""
        self.keep_alive = False
        if self._state is _State.UNTIL_CLOSE:
            self._state = _State.COMPLETE
        return self.complete

    def body(self) -> bytes:
        return b"".join(self.pieces)

    def stamps_at(self, ends: list[int]) -> Sequence[int]:
        """For each place in the body, behind a line, say, the stamp of the receive that reached it."""
        ours = list(accumulate(map(len, self.pieces)))
        if ours == ends:
            return self.stamps_ns  # as nearly always
        return [self.stamps_ns[bisect_left(ours, end)] for end in ends]

    def _add(self, stamp_ns: int, data: bytes) -> None:
        self.stamps_ns.append(stamp_ns)
        self.pieces.append(data)

    def _walk(self, stamp_ns: int, data: bytes) -> None:
        if self._state is _State.HEAD:
            data = self._read_heads(self._rest + data)
        if self._state is _State.LENGTH:
            self._read_length(stamp_ns, data)
        elif self._state is _State.UNTIL_CLOSE:
            if data:
                self._add(stamp_ns, data)
        elif self._state is not _State.HEAD:
            self._read_chunks(stamp_ns, data)

    def _read_heads(self, data: bytes) -> bytes:
        """Read the head, after any interim ones (1xx); returns the bytes behind it."""
        while (end := data.find(b"\r\n\r\n")) >= 0:
            self._read_head(data[:end])
            data = data[end + 4 :]
            if self.status >= 200:
                self._rest = b""
                self._choose_framing()
                return data
        if len(data) > _MAX_HEAD_BYTES:
            raise MalformedError("a response head without an end")
        if data and not b"HTTP/".startswith(data[:5]):
            raise MalformedError(f"not an HTTP response: {data[:40]!r}")
        self._rest = data
        return b""

    def _read_head(self, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        match = re.fullmatch(r"HTTP/1\.([01]) (\d{3})(?: .*)?", first)
        if match is None:
            raise MalformedError(f"not an HTTP/1 status line: {first[:80]!r}")
        self.status = int(match[2])
        self.headers = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon:
                raise MalformedError(f"not a header: {line[:80]!r}")
            self.headers[name.strip().lower()] = value.strip()
        connection = self.headers.get("connection", "").lower()
        self.keep_alive = "keep-alive" in connection if match[1] == "0" else "close" not in connection

    def _choose_framing(self) -> None:
        encoding, length = self.headers.get("transfer-encoding"), self.headers.get("content-length")
        if self.status in (204, 304):
            self._state = _State.COMPLETE
        elif encoding is not None:
            if encoding.lower() != "chunked":
                raise MalformedError(f"an unknown transfer encoding: {encoding[:40]!r}")
            self._state = _State.CHUNK_SIZE
        elif length is not None:
            if not length.isascii() or not length.isdigit():
                raise MalformedError(f"not a content length: {length[:40]!r}")
            self._left = int(length)
            self._state = _State.LENGTH if self._left else _State.COMPLETE
        else:
            self._state = _State.UNTIL_CLOSE
            self.keep_alive = False

    def _read_length(self, stamp_ns: int, data: bytes) -> None:
        piece = data[: self._left]
        if piece:
            self._add(stamp_ns, piece)
            self._left -= len(piece)
        if not self._left:
            self._state = _State.COMPLETE
            self._finish(data[len(piece) :])

    def _read_chunks(self, stamp_ns: int, data: bytes) -> None:
        if self._rest:
            data, self._rest = self._rest + data, b""
        at, size = 0, len(data)
        while at < size:
            if self._state is _State.CHUNK_DATA:
                piece = data[at : at + self._left]
                self._add(stamp_ns, piece)
                at += len(piece)
                self._left -= len(piece)
                if not self._left:
                    self._state = _State.CHUNK_END
            elif self._state is _State.COMPLETE:
                self._finish(data[at:])
                return
            else:
                end = data.find(b"\r\n", at)
                if end < 0:
                    self._keep_rest(data[at:])
                    return
                self._read_line(data[at:end])
                at = end + 2
                if self._state is _State.CHUNK_SIZE:
                    at = self._read_whole_chunks(stamp_ns, data, at)

    def _read_whole_chunks(self, stamp_ns: int, data: bytes, at: int) -> int:
        """Read the chunks from `at` on that have come whole, as nearly all do; returns where they end."""
        size = len(data)
        while at < size:
            end = data.find(b"\r\n", at)
            if end < 0:
                break
            start = end + 2
            stop = start + _chunk_size(data[at:end])
            if start == stop or data[stop : stop + 2] != b"\r\n":
                break
            self.stamps_ns.append(stamp_ns)
            self.pieces.append(data[start:stop])
            at = stop + 2
        return at

    def _read_line(self, line: bytes) -> None:
        """A line of the chunked framing: a size, the empty line behind a chunk's data, or a trailer."""
        if self._state is _State.CHUNK_SIZE:
            self._left = _chunk_size(line)
            self._state = _State.CHUNK_DATA if self._left else _State.TRAILERS
        elif self._state is _State.CHUNK_END:
            if line:
                raise MalformedError(f"a chunk is longer than its size says: {line[:40]!r}")
            self._state = _State.CHUNK_SIZE
        elif not line:
            self._state = _State.COMPLETE

    def _keep_rest(self, rest: bytes) -> None:
        if len(rest) > _MAX_LINE_BYTES or (self._state is _State.CHUNK_END and rest != b"\r"):
            raise MalformedError(f"no end of line in the chunked framing: {rest[:40]!r}")
        self._rest = rest

    def _finish(self, behind: bytes) -> None:
        if behind:  # nothing more was asked on this connection
            self.keep_alive = False


@lru_cache(1024)  # the chunks of a stream have few sizes
def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip(b" \t")
    if not _HEX.fullmatch(digits):
        raise MalformedError(f"not a chunk size: {line[:40]!r}")
    return int(digits, 16)


def events(response: Response) -> list[Piece]:
    """The data of every server-sent event, with the stamp of the receive that completed the event.

    Line ends are LF, CRLF or CR; comments and other fields are dropped. An event at the very end whose blank line is
    missing counts, as common servers leave it out behind `[DONE]`.
    """
    body = response.body()
    if body.startswith(b"data: ") and body.endswith(b"\n\n") and b"\r" not in body:
        found = body[6:-2].split(b"\n\ndata: ")
        if body.count(b"\n") == 2 * len(found):  # every event is one line, as nearly always
            ends = list(accumulate([len(data) + 8 for data in found]))
            return list(zip(response.stamps_at(ends), found, strict=True))
    return _cut(response, body)


def _cut(response: Response, body: bytes) -> list[Piece]:
    """The events of any body."""
    found: list[bytes] = []
    ends: list[int] = []
    start = 0
    while start < len(body):
        blank = _BLANK_LINE.search(body, start)
        end, following = (blank.start(), blank.end()) if blank else (len(body), len(body))
        payload = _event_data(body[start:end])
        if payload is not None:
            found.append(payload)
            ends.append(following)
        start = following
    return list(zip(response.stamps_at(ends), found, strict=True))


def _event_data(event: bytes) -> bytes | None:
    lines = [line[5:] for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(line[1:] if line.startswith(b" ") else line for line in lines) if lines else None
