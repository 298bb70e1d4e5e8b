"""`rclone serve s3` over a folder: up in a second, and lax.

Version 1.75 ignores `If-None-Match` and `If-Match` on `PUT`, wrong sha256 and `x-amz-checksum-*`; answers a range with
the right bytes and Content-Range, but 200, which obstore refuses; and drops an upload whose completion it refuses.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from servers.processes import answers, environment, free_ports, start, stop, wait_until
from servers.server import Server

RCLONE = Path(sys.executable).with_name("rclone")


@contextmanager
def running(folder: Path) -> Iterator[Server]:
    """Serves `folder`/data, whose folders are the buckets."""
    [port] = free_ports(1)
    data, log = folder / "data", folder / "rclone.log"
    data.mkdir()
    server = Server(
        name="rclone", endpoint=f"http://127.0.0.1:{port}", access_key="rclonekey", secret_key="rclonesecret"
    )
    keys = f"{server.access_key},{server.secret_key}"
    command: list[str | Path] = [RCLONE, "serve", "s3", data, "--addr", f"127.0.0.1:{port}", "--auth-key", keys]
    process = start([*command, "--config", "/dev/null"], log, environment(XDG_CACHE_HOME=str(folder / "cache")))
    try:
        wait_until(lambda: answers(port), process, log)
        yield server
    finally:
        stop(process)
