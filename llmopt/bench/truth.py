"""A server that knows the truth: it streams tokens at set times and logs when it really sent each of them.

`python -m llmopt.bench.truth` prints `ready http://127.0.0.1:PORT` and answers chat and completions with `--ttft-ms`
and `--gap-ms`, every stream by the arrival of its own request: the k-th token is due at arrival + ttft + k * gap.
`GET /log` gives, by the monotonic clock that all processes of a machine share, when each request arrived and each of
its tokens left, and how far the server itself was from its schedule and may be from the truth.

What makes its log the truth: a request arrives when the kernel received it (SO_TIMESTAMPNS), not when this process
got to read it; a token leaves in the middle between two readings of the clock around the system call that sends it,
and over loopback the receiving socket has the bytes when that call returns. So half the time between the two readings
bounds the error of each stamp. It shares no code with the client that it judges. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import resource
import select
import socket
import struct
import time
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

_SO_TIMESTAMPNS = 35
_PR_SET_TIMERSLACK = 29
_RECEIVE_BYTES = 1 << 18
_BATCH = 64  # sends between two looks at what has arrived
_AT_ONCE_NS = 1_000  # two readings that are further apart had something between them
_TRIES = 5
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_IDENTITY = re.compile(rb"\r\nx-request-id: *([^\r]*)", re.IGNORECASE)

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Stream:
    """The bytes of one kind of stream, made once: every token is the same word."""

    opening: bytes
    token: bytes
    last_token: bytes
    kind: str

    def ending(self, prompt_tokens: int, tokens: int) -> bytes:
        """What follows the last token: usage and the end of the stream."""
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}
        return _event({**_fields(self.kind), "choices": [], "usage": usage}) + _chunk(_DONE) + b"0\r\n\r\n"


def _fields(kind: str) -> dict[str, Any]:
    return {"id": "truth-0123456789abcdef", "object": kind, "created": 1700000000, "model": "truth"}


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(fields: dict[str, Any]) -> bytes:
    return _chunk(b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n")


def _stream(kind: str, first: dict[str, Any] | None, token: dict[str, Any]) -> Stream:
    def event(choice: dict[str, Any], finish: str | None) -> bytes:
        full = {"index": 0, **choice, "logprobs": None, "finish_reason": finish}
        return _event({**_fields(kind), "choices": [full]})

    opening = _HEAD + (event(first, None) if first else b"")
    return Stream(opening, event(token, None), event(token, "length"), kind)


STREAMS = {
    b"/v1/chat/completions": _stream(
        "chat.completion.chunk", {"delta": {"role": "assistant", "content": ""}}, {"delta": {"content": " the"}}
    ),
    b"/v1/completions": _stream("text_completion", None, {"text": " the"}),
}


class _Connection:
    """A client's socket and the bytes of a request that are not complete yet."""

    __slots__ = ("close", "recvmsg", "rest", "send", "socket")

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.send = connection.send
        self.recvmsg = connection.recvmsg
        self.close = connection.close
        self.rest = b""


class _Answer:
    """A stream that is being sent, and its log."""

    __slots__ = ("arrived_ns", "due_ns", "ending", "identity", "left", "send", "sent_ns", "stream", "tokens")

    def __init__(self, connection: _Connection, stream: Stream, identity: str, arrived_ns: int, tokens: int) -> None:
        self.send = connection.send
        self.stream = stream
        self.identity = identity
        self.arrived_ns = arrived_ns
        self.due_ns = 0  # of its next token
        self.tokens = self.left = tokens
        self.ending = b""
        self.sent_ns = array("q")


@dataclass(slots=True)
class TruthServer:
    """One thread, one epoll. Every answer waits in one of two queues, for its first token or for a later one: since all
    gaps are the same, each queue is in order without sorting."""

    ttft_ns: int
    gap_ns: int
    tokens: int | None = None  # of every answer; None: what the request asks for
    _epoll: select.epoll = field(default_factory=select.epoll)
    _connections: dict[int, _Connection] = field(default_factory=dict)
    _first: deque[_Answer] = field(default_factory=deque)
    _later: deque[_Answer] = field(default_factory=deque)
    _answers: list[_Answer] = field(default_factory=list)
    _widths_ns: array[int] = field(default_factory=lambda: array("q"))  # of each send
    _cut: int = 0  # answers that could not be sent: the client was gone or had let its buffers fill

    def listen(self, port: int) -> tuple[socket.socket, int]:
        """A socket that listens on loopback, and its port."""
        listener = socket.create_server(("127.0.0.1", port), backlog=4096)
        listener.setblocking(False)
        # For all that are accepted, too. The kernel begins to stamp a while after the first socket asks for it.
        listener.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self._epoll.register(listener.fileno(), select.EPOLLIN)
        return listener, listener.getsockname()[1]

    def serve(self, listener: socket.socket) -> NoReturn:
        """Serve until the process is killed."""
        listening = listener.fileno()
        waiting_on = [self._epoll.fileno()]
        while True:
            due_ns = self._send_due()
            if due_ns is None:
                events = self._epoll.poll()
            else:
                # epoll counts its time-out in ms; select waits to the microsecond, and on an epoll too.
                if (wait_ns := due_ns - time.monotonic_ns()) > 0:
                    select.select(waiting_on, [], [], wait_ns / 1e9)
                events = self._epoll.poll(0)
            for number, _ in events:
                if number == listening:
                    self._accept(listener)
                else:
                    self._receive(number)

    def _send_due(self) -> int | None:
        """Send what is due, at most a batch of it; returns when the next token is due, None: no answer is open."""
        clock, gap_ns = time.monotonic_ns, self.gap_ns
        first, later, widths_ns = self._first, self._later, self._widths_ns
        now = clock()
        for _ in range(_BATCH):
            if not first and not later:
                return None
            queue = first if not later or (first and first[0].due_ns < later[0].due_ns) else later
            answer = queue[0]
            if answer.due_ns > now:
                return answer.due_ns
            queue.popleft()
            answer.left -= 1
            data = answer.stream.token if answer.left and queue is later else self._edge(answer)
            try:
                whole = answer.send(data) == len(data)
            except OSError:
                whole = False
            after = clock()
            if whole:
                answer.sent_ns.append((now + after) >> 1)
                widths_ns.append(after - now)
                if answer.left:
                    answer.due_ns += gap_ns
                    later.append(answer)
            else:
                self._cut += 1
            now = after
        return now

    def _edge(self, answer: _Answer) -> bytes:
        """The bytes of a first or a last token, with what goes before and behind."""
        stream = answer.stream
        opening = b"" if answer.sent_ns else stream.opening
        return opening + (stream.token if answer.left else stream.last_token + answer.ending)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                return
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections[connection.fileno()] = _Connection(connection)
            self._epoll.register(connection.fileno(), select.EPOLLIN)

    def _receive(self, number: int) -> None:
        connection = self._connections[number]
        try:
            data, ancillary, _, _ = connection.recvmsg(_RECEIVE_BYTES, 64)
        except BlockingIOError:
            return
        except OSError:
            data, ancillary = b"", []
        if not data:
            del self._connections[number]
            connection.close()  # which also takes it out of the epoll
            return
        connection.rest += data
        head, blank, rest = connection.rest.partition(b"\r\n\r\n")
        if not blank:
            return
        length = _LENGTH.search(head)
        size = int(length[1]) if length else 0
        if len(rest) < size:
            return
        connection.rest = rest[size:]
        self._answer(connection, head, rest[:size], _received_ns(ancillary))

    def _answer(self, connection: _Connection, head: bytes, body: bytes, arrived_ns: int) -> None:
        method, path = head.split(b" ", 2)[:2]
        if method == b"POST" and path in STREAMS:
            try:
                self._begin(connection, STREAMS[path], head, json.loads(body), arrived_ns)
            except (ValueError, TypeError, AttributeError) as error:
                _reply(connection, 400, {"error": {"message": str(error)}})
        elif path == b"/v1/models":
            _reply(
                connection, 200, {"object": "list", "data": [{"id": "truth", "object": "model", "owned_by": "llmopt"}]}
            )
        elif path == b"/log":
            _reply(connection, 200, self.log())
        elif path == b"/health":
            _reply(connection, 200, {})
        else:
            _reply(connection, 404, {"error": {"message": f"no {path.decode('latin-1')} here"}})

    def _begin(
        self, connection: _Connection, stream: Stream, head: bytes, request: dict[str, Any], arrived_ns: int
    ) -> None:
        if not request.get("stream"):
            raise ValueError("this server only streams")
        tokens = self.tokens or request.get("max_completion_tokens") or request.get("max_tokens")
        if not isinstance(tokens, int) or tokens < 1:
            raise ValueError("`max_tokens` must be at least 1")
        identity = _IDENTITY.search(head)
        answer = _Answer(connection, stream, identity[1].decode("latin-1") if identity else "", arrived_ns, tokens)
        answer.ending = stream.ending(len(_prompt(request).split()), tokens)
        answer.due_ns = arrived_ns + self.ttft_ns
        self._first.append(answer)
        self._answers.append(answer)

    def log(self) -> dict[str, Any]:
        """What was sent when, in order of arrival, and the server's own error."""
        late_ns: list[int] = []
        for answer in self._answers:
            due_ns = answer.arrived_ns + self.ttft_ns
            late_ns += [sent_ns - due_ns - k * self.gap_ns for k, sent_ns in enumerate(answer.sent_ns)]
        return {
            "requests": [
                {"id": answer.identity, "arrived_ns": answer.arrived_ns, "sent_ns": answer.sent_ns.tolist()}
                for answer in self._answers
            ],
            "sends": len(late_ns),
            "cut": self._cut,
            "late_us": _spread(late_ns),  # from when a token was due to when it was sent
            "half_width_us": _spread([width_ns // 2 for width_ns in self._widths_ns]),  # of the stamps of sending
            "cpu_s": time.process_time(),
        }


def _received_ns(ancillary: Sequence[tuple[int, int, bytes]]) -> int:
    """When the kernel received the last bytes, by the monotonic clock; it stamps them by the clock of the day."""
    now = time.monotonic_ns()
    for _, kind, data in ancillary:
        if kind == _SO_TIMESTAMPNS:
            seconds, rest_ns = struct.unpack("qq", data)
            return min(now, int(seconds) * 1_000_000_000 + int(rest_ns) - _ahead_ns())
    return now


def _ahead_ns() -> int:
    """How far the clock of the day is ahead of the monotonic one.

    Where this process loses its core between two readings they tell nothing, so the nearest two of a few are taken.
    """
    nearest_ns, ahead_ns = 1 << 62, 0
    for _ in range(_TRIES):
        before = time.monotonic_ns()
        today = time.time_ns()
        after = time.monotonic_ns()
        if after - before < nearest_ns:
            nearest_ns, ahead_ns = after - before, today - ((before + after) >> 1)
        if nearest_ns < _AT_ONCE_NS:
            break
    return ahead_ns


def _prompt(request: dict[str, Any]) -> str:
    """The text of the request, whose words are counted as its tokens."""
    if "messages" in request:
        return " ".join(str(message.get("content", "")) for message in request["messages"])
    return str(request.get("prompt", ""))


def _reply(connection: _Connection, status: int, fields: dict[str, Any]) -> None:
    data = json.dumps(fields).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n".encode()
    try:
        connection.socket.setblocking(True)
        connection.socket.sendall(head + data)
        connection.socket.setblocking(False)
    except OSError:
        connection.socket.close()


def _spread(values_ns: list[int]) -> dict[str, float]:
    if not values_ns:
        return {}
    ordered = sorted(values_ns)
    last = len(ordered) - 1
    return {name: ordered[round(last * q)] / 1e3 for name, q in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m llmopt.bench.truth", description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="of 127.0.0.1; 0: a free one")
    parser.add_argument("--ttft-ms", type=float, default=100.0)
    parser.add_argument("--gap-ms", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, help="of every answer; by default what the request asks for")
    parser.add_argument("--core", type=int, help="the one core to run on")
    arguments = parser.parse_args()
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)  # ns; the default of 50 us would make every token so late
    server = TruthServer(round(arguments.ttft_ms * 1e6), round(arguments.gap_ms * 1e6), arguments.tokens)
    listener, port = server.listen(arguments.port)
    gc.freeze()
    gc.disable()  # a collection would hold up what is due; nothing here makes cycles
    print(f"ready http://127.0.0.1:{port}", flush=True)
    server.serve(listener)


if __name__ == "__main__":
    main()
