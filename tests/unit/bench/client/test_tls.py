"""Loads over TLS, against Python's own server side; the authority is one that `openssl` makes for the test."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmopt.bench.client.base import Exchange, Plan
from llmopt.bench.client.loop import drive

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificates with `openssl`")

MakePlan = Callable[..., Plan]
EVENT = b'data: {"choices": [{"text": "a"}]}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
ANSWER = HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"%x\r\n%b\r\n" % (len(EVENT), EVENT) * 3 + b"0\r\n\r\n"


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for `localhost` that signs itself, with its key."""
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    names = ["-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command.split(), *files, *names], check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_text((folder / "cert.pem").read_text() + (folder / "key.pem").read_text())
    return both


class Server:
    """Answers each request on each of its connections; `alpn` is what they agreed on."""

    def __init__(self, certificate: Path, answer: bytes, newest: ssl.TLSVersion) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate)
        self.context.maximum_version = newest
        self.context.set_alpn_protocols(["h2", "http/1.1"])
        self.answer = answer
        self.alpn: set[str | None] = set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                raw, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=(raw,), daemon=True).start()

    def serve(self, raw: socket.socket) -> None:
        with raw, contextlib.suppress(OSError), self.context.wrap_socket(raw, server_side=True) as connection:
            self.alpn.add(connection.selected_alpn_protocol())
            while self.take_request(connection):
                connection.sendall(self.answer)
                if b"chunked" not in self.answer:
                    connection.unwrap()
                    return

    def take_request(self, connection: ssl.SSLSocket) -> bool:
        head = b""
        while b"\r\n\r\n" not in head:
            if not (data := connection.recv(65536)):
                return False
            head += data
        head, _, body = head.partition(b"\r\n\r\n")
        left = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]) - len(body)
        while left > 0:
            left -= len(connection.recv(65536))
        return True


@pytest.fixture
def serve(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    servers: list[Server] = []

    def start(answer: bytes = ANSWER, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> Server:
        servers.append(Server(certificate, answer, newest))
        return servers[-1]

    yield start
    for server in servers:
        server.listener.close()


def kinds(records: list[Exchange]) -> set[str | None]:
    return {exchange.failure and exchange.failure.kind for exchange in records}


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_load_over_tls_is_as_one_without(serve: Any, plan: MakePlan, keep: Any, newest: ssl.TLSVersion) -> None:
    server = serve(newest=newest)
    found = drive(plan(f"https://localhost:{server.port}", jobs=12, streams=3), keep)
    assert kinds(found.records) == {None}
    assert {exchange.response.body() for exchange in found.records if exchange.response} == {EVENT * 3}
    assert (len(found.records), found.reconnects, found.stamps) == (12, 0, "kernel")
    assert server.alpn == {"http/1.1"}


def test_a_request_larger_than_the_socket_takes_arrives_whole(serve: Any, plan: MakePlan, keep: Any) -> None:
    server = serve()
    made = plan(f"https://localhost:{server.port}", jobs=2, streams=2)
    for job in made.jobs:
        job.request = made.targets[0].request(b"x" * 8_000_000)
    assert kinds(drive(made, keep).records) == {None}


def test_an_answer_that_ends_with_the_connection_is_whole(serve: Any, plan: MakePlan, keep: Any) -> None:
    server = serve(answer=HEAD + b"\r\n" + EVENT * 5000)
    found = drive(plan(f"https://localhost:{server.port}", jobs=3, streams=1), keep)
    assert kinds(found.records) == {None}
    assert {len(exchange.response.body()) for exchange in found.records if exchange.response} == {len(EVENT) * 5000}


def test_a_certificate_that_nobody_trusts_is_a_failure_of_tls(
    serve: Any, plan: MakePlan, keep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    found = drive(plan(f"https://localhost:{serve().port}", jobs=4, streams=2), keep)
    assert kinds(found.records) == {"tls"}
    assert {"certificate" in exchange.failure.detail for exchange in found.records if exchange.failure} == {True}


def test_a_certificate_for_another_name_is_a_failure_of_tls(serve: Any, plan: MakePlan, keep: Any) -> None:
    found = drive(plan(f"https://127.0.0.1:{serve().port}", jobs=2, streams=1), keep)
    assert kinds(found.records) == {"tls"}


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""], ids=["speaks", "hangs up"])
def test_a_server_without_tls_is_a_failure_of_tls(plan: MakePlan, keep: Any, answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        found = drive(plan(f"https://127.0.0.1:{listener.getsockname()[1]}", jobs=2, streams=1), keep)
        listener.shutdown(socket.SHUT_RDWR)
    assert kinds(found.records) == {"tls"}


def test_a_handshake_that_does_not_end_is_a_failure_of_tls(
    plan: MakePlan, keep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmopt.bench.client.connections._CONNECT_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = drive(plan(f"https://127.0.0.1:{silent.getsockname()[1]}", jobs=2, streams=1), keep)
    assert kinds(found.records) == {"tls"}


def test_a_server_that_lets_nobody_in_is_not_tried_for_every_stream(
    plan: MakePlan, keep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmopt.bench.client.connections._CONNECT_TIMEOUT_S", 0.2)
    monkeypatch.setattr("llmopt.bench.client.connections._OPENING", 4)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = drive(plan(f"https://127.0.0.1:{silent.getsockname()[1]}", jobs=20, streams=20), keep)
        silent.setblocking(False)
        tried = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                silent.accept()[0].close()
                tried += 1
    assert [exchange.failure and exchange.failure.kind for exchange in found.records] == ["tls"] * 20
    assert 4 <= tried <= 8
