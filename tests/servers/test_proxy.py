"""The proxy passes everything as it is, except for what it is told to break; and counts right."""

from __future__ import annotations

import hashlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from servers import SLOW_DOWN, Answer, Cut, Flip, Hang, LoseReply, Proxy, Server, Slow, Truncate

BODY = bytes(range(256)) * 4000  # 1 MB


@pytest.fixture
def proxy(rclone: Server) -> Iterator[Proxy]:
    with Proxy(rclone) as proxy:
        yield proxy


@pytest.fixture
def path(rclone: Server) -> str:
    """An object that is there already, stored around the proxy."""
    path = f"/{rclone.new_bucket()}/key"
    assert rclone.request("PUT", path, body=BODY).status == 200
    return path


def stored(server: Server, path: str) -> bytes | None:
    reply = server.request("GET", path)
    return reply.body if reply.status == 200 else None


def test_passes_and_counts_bodies(proxy: Proxy, path: str) -> None:
    assert proxy.server.request("PUT", path, body=BODY[:1000]).status == 200
    assert proxy.server.request("GET", path).body == BODY[:1000]
    assert proxy.server.request("HEAD", path).headers["content-length"] == "1000"
    assert (proxy.count(), proxy.count("PUT"), proxy.count("GET", "HEAD")) == (3, 1, 2)
    assert (proxy.sent_bytes(), proxy.sent_bytes("GET"), proxy.received_bytes("GET", "HEAD")) == (1000, 0, 1000)


def test_records_what_was_asked(proxy: Proxy, path: str) -> None:
    bucket = path.split("/")[1]
    proxy.server.request("GET", f"/{bucket}/no such key")
    proxy.server.request("GET", f"/{bucket}", query={"list-type": "2", "prefix": "a/b"})
    assert proxy.log() == [
        ("GET", f"/{bucket}/no such key", {}, 404),
        ("GET", f"/{bucket}", {"list-type": "2", "prefix": "a/b"}, 200),
    ]


def test_forgets(proxy: Proxy, path: str) -> None:
    proxy.server.request("GET", path)
    proxy.forget()
    assert proxy.count() == 0


def test_many_connections_pass_at_once(proxy: Proxy, path: str) -> None:
    with ThreadPoolExecutor(64) as pool:
        bodies = list(pool.map(lambda _: proxy.server.request("GET", path).body, range(256)))
    assert all(body == BODY for body in bodies)


def test_hits_so_many_of_those_that_match_and_no_others(proxy: Proxy, path: str) -> None:
    rule = proxy.fail(match=lambda request: request.method == "GET", times=2, skip=1, with_=Answer())
    assert [proxy.server.request(method, path).status for method in ("HEAD", "GET", "GET", "HEAD", "GET", "GET")] == [
        200, 200, 500, 200, 500, 200,
    ]  # fmt: skip
    assert rule.hits == 2
    assert [exchange.fault is not None for exchange in proxy.exchanges] == [False, False, True, False, True, False]


def test_heals(proxy: Proxy, path: str) -> None:
    proxy.fail(times=None, with_=Answer())
    assert [proxy.server.request("GET", path).status for _ in range(3)] == [500] * 3
    proxy.heal()
    assert proxy.server.request("GET", path).status == 200


def test_answers_in_the_form_of_s3_without_asking_the_server(proxy: Proxy, rclone: Server, path: str) -> None:
    proxy.fail(with_=SLOW_DOWN)
    reply = proxy.server.request("PUT", path, body=b"new")
    assert (reply.status, reply.code) == (503, "SlowDown")
    assert stored(rclone, path) == BODY


def test_cuts_a_request(proxy: Proxy, rclone: Server, path: str) -> None:
    proxy.fail(with_=Cut(after_request_bytes=1000))
    with pytest.raises(ConnectionError):
        proxy.server.request("PUT", f"{path}2", body=BODY)
    assert stored(rclone, f"{path}2") != BODY
    assert proxy.exchanges[0].status is None


def test_cuts_a_response(proxy: Proxy, path: str) -> None:
    proxy.fail(with_=Cut(after_response_bytes=1000))
    with pytest.raises(ConnectionError):
        proxy.server.request("GET", path)
    assert proxy.received_bytes() == 1000


def test_truncates_a_response(proxy: Proxy, path: str) -> None:
    proxy.fail(with_=Truncate(after_response_bytes=1000))
    with pytest.raises(http.client.IncompleteRead) as caught:
        proxy.server.request("GET", path)
    assert caught.value.partial == BODY[:1000]


def test_what_is_done_is_done_though_the_reply_is_lost(proxy: Proxy, rclone: Server, path: str) -> None:
    proxy.fail(with_=LoseReply())
    with pytest.raises(ConnectionError):
        proxy.server.request("PUT", path, body=b"new")
    assert stored(rclone, path) == b"new"
    assert proxy.exchanges[0].status == 200


def test_flips_a_bit_of_a_response(proxy: Proxy, path: str) -> None:
    proxy.fail(with_=Flip(response_byte=700_000))
    body = proxy.server.request("GET", path).body
    assert [place for place, (is_, was) in enumerate(zip(body, BODY, strict=True)) if is_ != was] == [700_000]


def test_flips_a_bit_of_a_request(proxy: Proxy, rclone: Server, path: str) -> None:
    proxy.fail(with_=Flip(request_byte=700_000))
    proxy.server.request("PUT", path, body=BODY, sha256="UNSIGNED-PAYLOAD")
    body = stored(rclone, path) or b""
    assert [place for place, (is_, was) in enumerate(zip(body, BODY, strict=True)) if is_ != was] == [700_000]


@pytest.mark.parametrize("forward", [False, True])
def test_hangs(proxy: Proxy, rclone: Server, path: str, forward: bool) -> None:
    proxy.fail(with_=Hang(forward=forward))
    with pytest.raises(TimeoutError):
        proxy.server.request("PUT", path, body=b"new", timeout_s=0.5)
    assert stored(rclone, path) == (b"new" if forward else BODY)


def test_is_slow(proxy: Proxy, path: str) -> None:
    proxy.fail(with_=Slow(response_bytes_per_s=2 * len(BODY)))
    proxy.fail(with_=Slow(request_bytes_per_s=2 * len(BODY)))
    proxy.fail(with_=Slow(delay_s=0.5))
    for method, body in (("GET", b""), ("PUT", BODY), ("HEAD", b"")):
        began = time.monotonic()
        assert proxy.server.request(method, path, body=body).status == 200
        assert time.monotonic() - began > 0.45


def test_a_server_that_is_gone_is_no_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Proxy(Server(name="", endpoint=f"http://127.0.0.1:{port}", access_key="a", secret_key="b")) as proxy:
        with pytest.raises(ConnectionError):
            proxy.server.request("GET", "/")
        assert proxy.exchanges[0].status is None


def test_closing_ends_those_who_wait(rclone: Server) -> None:
    with ThreadPoolExecutor() as pool, Proxy(rclone) as proxy:
        proxy.fail(with_=Hang())
        waiting = pool.submit(proxy.server.request, "GET", "/")
        while not proxy.count():
            time.sleep(0.01)
        proxy.close()
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            waiting.result(10)
    assert not [thread for thread in threading.enumerate() if thread.name == "proxy" and thread in proxy._threads]


class Echo(BaseHTTPRequestHandler):
    """Answers with what it got, in chunks; /refused is answered before the body is read; /old closes after it."""

    protocol_version = "HTTP/1.1"

    def handle_expect_100(self) -> bool:
        return self.path == "/refused" or super().handle_expect_100()

    def do_PUT(self) -> None:
        if self.path == "/refused":
            self.send_response(403)
            self.send_header("Content-Length", "2")
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(b"no")
            return
        if self.headers["Transfer-Encoding"]:
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            while (trailer := self.rfile.readline()) != b"\r\n":
                body += trailer
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        if self.path == "/old":
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)
            return
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for start in range(0, len(body), 70_000):
            part = body[start : start + 70_000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        self.wfile.write(b"0\r\nX-Sha: %s\r\n\r\n" % hashlib.sha256(body).hexdigest().encode())

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def echo() -> Iterator[Proxy]:
    with running(ThreadingHTTPServer(("127.0.0.1", 0), Echo)) as server, Proxy(server) as proxy:
        yield proxy


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield Server(name="", endpoint=f"http://127.0.0.1:{server.server_port}", access_key="", secret_key="")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def exchange(proxy: Proxy, head: bytes, *rest: bytes) -> bytes:
    """All that comes back to a client that shows `head`, waits for an answer's beginning, and shows the rest."""
    with socket.create_connection(("127.0.0.1", proxy.server.port), timeout=10) as connection:
        connection.sendall(head)
        got = b""
        for more in rest:
            got += connection.recv(65536)
            connection.sendall(more)
        while part := connection.recv(65536):
            got += part
            if got.endswith(b"\r\n\r\n") and b"\r\n0\r\n" in got:
                break
        return got


def test_chunks_pass_both_ways_with_their_trailers(echo: Proxy) -> None:
    content = b"".join(b"%x\r\n%s\r\n" % (n, BODY[:n]) for n in (1, 300_000, 7)) + b"0\r\nX-Checksum: abc\r\n\r\n"
    got = exchange(echo, b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + content)
    echoed = BODY[:1] + BODY[:300_000] + BODY[:7] + b"X-Checksum: abc\r\n"
    assert f"X-Sha: {hashlib.sha256(echoed).hexdigest()}".encode() in got
    assert echo.sent_bytes() == 300_008
    assert echo.received_bytes() == len(echoed)


def test_a_connection_is_used_again(echo: Proxy) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", echo.server.port, timeout=10)
    connection.connect()
    first = connection.sock
    for body in (BODY, b"", BODY[:7]):
        connection.request("PUT", "/", body=body)
        assert connection.getresponse().read() == body
        assert connection.sock is first
    connection.close()


def test_leave_to_send_a_body_is_passed_on(echo: Proxy) -> None:
    head = b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\nExpect: 100-continue\r\n\r\n"
    got = exchange(echo, head, b"content")
    assert got.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
    assert b"\r\ncontent\r\n" in got


def test_a_body_that_the_server_does_not_want_is_not_sent(echo: Proxy) -> None:
    head = b"PUT /refused HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\nExpect: 100-continue\r\n\r\n"
    assert exchange(echo, head).startswith(b"HTTP/1.1 403 ")
    assert [(seen.status, seen.request_bytes) for seen in echo.exchanges] == [(403, 0)]


def test_an_answer_comes_before_the_body_of_one_who_waits(echo: Proxy) -> None:
    echo.fail(with_=SLOW_DOWN)
    head = b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\nExpect: 100-continue\r\n\r\n"
    assert exchange(echo, head).startswith(b"HTTP/1.1 503 ")


def test_a_refusal_amid_a_body_reaches_the_client(echo: Proxy) -> None:
    with socket.create_connection(("127.0.0.1", echo.server.port), timeout=10) as connection:
        connection.sendall(b"PUT /refused HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + BODY[:1000])
        assert connection.recv(65536).startswith(b"HTTP/1.1 403 ")


def test_a_body_without_a_length_passes(echo: Proxy) -> None:
    assert exchange(echo, b"PUT /old HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\n\r\ncontent").endswith(b"content")
