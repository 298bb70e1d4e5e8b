"""Processes that end with the tests, even where the tests are killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PORTS = range(20000, 32000)  # below those that the kernel gives to connections


class DidNotStartError(AssertionError):
    pass


def environment(**more: str) -> dict[str, str]:
    """What a server sees: where programs are, and nothing of the user's or of this virtual environment's settings."""
    return {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "LANG": "C.UTF-8", "HOME": os.devnull} | more


def free_ports(count: int) -> list[int]:
    """Ports on 127.0.0.1 that nobody listens on. They are drawn, so that two who ask at once are given others."""
    held: list[socket.socket] = []
    try:
        while len(held) < count:
            probe = socket.socket()
            try:
                probe.bind(("127.0.0.1", random.choice(PORTS)))
            except OSError:
                probe.close()
            else:
                held.append(probe)
        return [probe.getsockname()[1] for probe in held]
    finally:
        for probe in held:
            probe.close()


def start(command: Sequence[str | Path], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A process in the foreground that the kernel kills when the thread that called this ends, however it ends."""
    tied = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
    with log.open("ab") as output:
        return subprocess.Popen(
            [*tied, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, start_new_session=True
        )


def stop(process: subprocess.Popen[bytes], patience_s: float = 10, how: signal.Signals = signal.SIGTERM) -> None:
    """Returns when the process has ended."""
    if process.poll() is None:
        process.send_signal(how)
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_until(
    ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, timeout_s: float = 90, every_s: float = 0.05
) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            why = f"ended with {process.returncode}" if process.returncode is not None else f"not up in {timeout_s} s"
            raise DidNotStartError(f"{process.args}: {why}\n{log.read_text(errors='replace')[-4000:]}")
        time.sleep(every_s)


def answers(port: int) -> bool:
    """Whether something on the port answers HTTP, with whatever status."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            return connection.recv(5) == b"HTTP/"
    except OSError:
        return False


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True
