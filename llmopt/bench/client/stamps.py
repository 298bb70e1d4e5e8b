"""When bytes came, on the monotonic clock, and how much later they were read."""

from __future__ import annotations

import socket
import struct
import time
from time import monotonic_ns

ANCILLARY_BYTES = 64  # room for one stamp

_SO_TIMESTAMPNS = 35  # on x86 and Arm; Python's socket module has no name for it
_LAG_SAMPLES = 20_000
_AT_ONCE_NS = 1_000  # two readings that are further apart had something between them
_TRIES = 5
_LOOK_EVERY_NS = 1_000_000
_PATIENCE_NS = 50_000_000
_TRY_EVERY_S = 0.0005


def ask_kernel(sock: socket.socket) -> None:
    """Have the kernel stamp what this socket receives; where it will not, `Stamps` stamps on reading."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    except OSError:
        return


def await_kernel() -> None:
    """Come back when the kernel stamps: it begins some ms after the first socket of the machine has asked for it."""
    patient_until_ns = monotonic_ns() + _PATIENCE_NS
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as ours:
            ask_kernel(ours)
            ours.connect(listener.getsockname())
            theirs, _ = listener.accept()
            with theirs:
                while monotonic_ns() < patient_until_ns:
                    theirs.send(b"?")
                    if ours.recvmsg(1, ANCILLARY_BYTES)[1]:
                        return
                    time.sleep(_TRY_EVERY_S)
    except OSError:
        return


class Stamps:
    """Stamps of receives: the kernel's where there is one, else of the moment of reading.

    The kernel stamps by the wall clock, and that may be moved: `look`, before each batch of receives, compares the two
    clocks anew, and keeps the last comparison where the processor was taken from us between two readings.
    """

    def __init__(self, kernel: bool) -> None:
        self._wanted = kernel
        self._by_kernel = self._by_us = 0
        self._lags_ns: list[int] = []
        self._every = 1  # so many receives make a sample of the lag
        self._countdown = 1
        self._offset_ns = 0
        self._look_ns = 0  # when the clocks are to be compared again
        self._woken_ns = 0
        self._unpack = struct.Struct("@qq").unpack

    @property
    def kind(self) -> str:
        if self._by_kernel and self._by_us:
            return "mixed"
        return "kernel" if self._by_kernel or (self._wanted and not self._by_us) else "user"

    @property
    def lags_ms(self) -> list[float]:
        """Samples: from stamp to reading; without the kernel's stamps, from the end of the wait to the reading."""
        return [lag / 1e6 for lag in self._lags_ns]

    def look(self) -> None:
        self._woken_ns = before = monotonic_ns()
        if before < self._look_ns:
            return
        for _ in range(_TRIES):
            before = monotonic_ns()
            wall = time.time_ns()
            after = monotonic_ns()
            if after - before < _AT_ONCE_NS:
                self._offset_ns = wall - (before + after) // 2
                self._look_ns = after + _LOOK_EVERY_NS
                return
        if not self._offset_ns:
            self._offset_ns = wall - after

    def of(self, ancillary: list[tuple[int, int, bytes]], sent_ns: int) -> int:
        """The stamp of what `recvmsg` has just brought for a request that was sent at `sent_ns`."""
        stamp_ns = now = monotonic_ns()
        since_ns = self._woken_ns
        kernel_ns = sent_ns - 1
        if ancillary:
            seconds, nanoseconds = self._unpack(ancillary[0][2])
            kernel_ns = seconds * 1_000_000_000 + nanoseconds - self._offset_ns
        if sent_ns <= kernel_ns <= now:
            self._by_kernel += 1
            stamp_ns = since_ns = kernel_ns
        else:
            self._by_us += 1
        self._countdown -= 1
        if not self._countdown:
            self._sample(now - since_ns)
        return stamp_ns

    def _sample(self, lag_ns: int) -> None:
        self._lags_ns.append(lag_ns)
        if len(self._lags_ns) >= _LAG_SAMPLES:
            self._lags_ns = self._lags_ns[::2]
            self._every *= 2
        self._countdown = self._every
