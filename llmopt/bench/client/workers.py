"""A load shared by several processes, for machines where one core cannot hold it.

Each process is this module run as a program, with a part of the plan. It connects, says so, and all begin at one time
of the monotonic clock, which the processes of a machine share. What goes between them is pickled: a number of bytes,
then those bytes.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic_ns
from typing import Any

from llmopt.bench.client import loop
from llmopt.bench.client.base import Exchange, Interrupted, Load, Plan, R, Watch
from llmopt.bench.client.interrupts import came, ctrl_c
from llmopt.errors import LlmoptError

_SIZE = struct.Struct("!Q")
_BEGIN_AFTER_NS = 20_000_000  # until every process knows when to begin


def drive(
    plan: Plan,
    read: Callable[[Exchange], R],
    processes: int = 1,
    watch: Callable[[Watch], None] | None = None,
) -> Load[R]:
    """As `loop.drive`, by up to so many processes; `read`, its records and the jobs' `then` must be picklable.

    Raises Interrupted on Ctrl-C, and LlmoptError if a process dies.
    """
    parts = plan.split(processes)
    if len(parts) == 1:
        return loop.drive(plan, read, watch)
    workers = [_Worker.started() for _ in parts]
    try:
        with ctrl_c() as stop:
            for worker, part in zip(workers, parts, strict=True):
                worker.send((part, read, watch is not None))
            interrupted = _wait(workers, stop, watch)
    finally:
        for worker in workers:
            worker.end()
    load = Load.merged([worker.load for worker in workers if worker.load is not None])
    if interrupted:
        raise Interrupted(load)
    return load


def _wait(workers: Sequence[_Worker], stop: socket.socket, watch: Callable[[Watch], None] | None) -> bool:
    """Begin when all are connected and wait for their loads; True when Ctrl-C cut them short."""
    begun = interrupted = False
    while waiting := {worker.pipe: worker for worker in workers if worker.load is None}:
        if not begun and not interrupted and all(worker.connected for worker in workers):
            begun, begin_ns = True, monotonic_ns() + _BEGIN_AFTER_NS
            for worker in workers:
                worker.send(begin_ns)
        ready, _, _ = select.select([stop, *waiting], [], [])
        if stop in ready:
            interrupted = bool(stop.recv(1))
            for worker in waiting.values():
                worker.interrupt(begun=begun)
            continue
        for pipe in ready:
            waiting[pipe].take()
        states = [worker.state for worker in workers if worker.state is not None]
        if watch is not None and states:
            watch(Watch.joined(states))
    return interrupted or came(stop)


@dataclass(slots=True)
class _Worker:
    """One process, seen from the one that started it."""

    process: subprocess.Popen[bytes]
    pipe: socket.socket
    connected: bool = False
    interrupted: bool = False
    state: Watch | None = None
    load: Load[Any] | None = None

    @classmethod
    def started(cls) -> _Worker:
        """Outside the terminal's group of processes, so that Ctrl-C reaches it once, by `interrupt`."""
        ours, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "llmopt.bench.client.workers", str(number)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)},
                stdin=subprocess.DEVNULL,
                pass_fds=[number],
                process_group=0,
            )
        return cls(process, ours)

    def send(self, message: object) -> None:
        try:
            _send(self.pipe, message)
        except OSError:
            raise self._died() from None

    def take(self) -> None:
        """What it says: that it is connected, how it stands, or its load."""
        try:
            message = _receive(self.pipe)
        except (EOFError, OSError):
            if not self.interrupted:
                raise self._died() from None
            message = _nothing()
        if isinstance(message, Load):
            self.load = message
        elif isinstance(message, Watch):
            self.state = message
        else:
            self.connected = True

    def interrupt(self, *, begun: bool) -> None:
        self.interrupted = True
        self.process.send_signal(signal.SIGINT if begun else signal.SIGKILL)

    def end(self) -> None:
        self.pipe.close()
        if self.load is None:
            self.process.kill()
        self.process.wait()

    def _died(self) -> LlmoptError:
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return LlmoptError(
            f"a process of the load client {how} before its part of the load was over",
            hint="see what it wrote above; if there is nothing, the machine may have run out of memory",
        )


def _nothing() -> Load[Any]:
    return Load([], monotonic_ns(), 0.0, 0.0, [], [], 0)


def _send(pipe: socket.socket, message: object) -> None:
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.sendall(_SIZE.pack(len(data)))
    pipe.sendall(data)


def _receive(pipe: socket.socket) -> Any:
    (size,) = _SIZE.unpack(_receive_bytes(pipe, _SIZE.size))
    return pickle.loads(_receive_bytes(pipe, size))


def _receive_bytes(pipe: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = pipe.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]
    return data


def _work(pipe: socket.socket) -> None:
    """The process's side."""
    with ctrl_c() as stop:
        plan, read, watched = _receive(pipe)
        driver = loop.Driver(plan, read, stop, (lambda state: _send(pipe, state)) if watched else None)
        try:
            driver.connect()
            _send(pipe, "connected")
            begin_ns = _receive(pipe)
            threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
            load = driver.run(begin_ns)
        except Interrupted as interrupted:
            load = interrupted.load
        _send(pipe, load)


def _end_with_parent(pipe: socket.socket) -> None:
    """The parent says nothing more; when the pipe ends, it is gone and nobody wants this load."""
    if not pipe.recv(1):
        os._exit(1)


if __name__ == "__main__":
    _work(socket.socket(fileno=int(sys.argv[1])))
