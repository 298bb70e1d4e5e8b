"""Run a command under a hard limit of memory, and end it at a moment of one's choice.

Two ways, the stricter that this machine allows:
- a memory cgroup (v2 `memory.max`, v1 `memory.limit_in_bytes`) below the one this process is in: counts anonymous
  memory and the page cache that the command fills, mapped files too (the kernel drops clean pages to stay below);
- RLIMIT_DATA, where no cgroup may be made: private writable memory, touched or not. Mapped files are not counted.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit in force: `folder` is the cgroup's, None for RLIMIT_DATA."""

    limit_bytes: int
    folder: Path | None

    @property
    def name(self) -> str:
        return "RLIMIT_DATA" if self.folder is None else "memory cgroup"

    def enter(self) -> None:
        """Put the calling process, about to become the command, under the limit."""
        if self.folder is None:
            resource.setrlimit(resource.RLIMIT_DATA, (self.limit_bytes, self.limit_bytes))
        else:
            (self.folder / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")

    def peak_bytes(self) -> int | None:
        """Most that the cgroup ever held, page cache included; None for RLIMIT_DATA."""
        if self.folder is None:
            return None
        for name in ("memory.peak", "memory.max_usage_in_bytes"):
            if (self.folder / name).is_file():
                return int((self.folder / name).read_text(encoding="ascii"))
        return None


@contextmanager
def memory_limit(limit_bytes: int) -> Iterator[Limit]:
    """A limit for commands to run under."""
    folder = _make_cgroup(limit_bytes)
    try:
        yield Limit(limit_bytes, folder)
    finally:
        if folder is not None:
            _remove(folder)


def _make_cgroup(limit_bytes: int) -> Path | None:
    """A cgroup below our own with that limit and no swap; None where the kernel or our rights do not allow it."""
    for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            parent, limits = _ROOT / "memory", ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        elif not controllers:
            parent, limits = _ROOT, ("memory.max", "memory.swap.max")
        else:
            continue
        folder = parent / path.lstrip("/") / f"llmopt-bench-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / limits[0]).write_text(str(limit_bytes), encoding="ascii")
        except OSError:  # the controller is not handed down to us
            folder.rmdir()
            continue
        swap = folder / limits[1]
        if swap.is_file():
            swap.write_text("0" if limits[1] == "memory.swap.max" else str(limit_bytes), encoding="ascii")
        return folder
    return None


def _remove(folder: Path) -> None:
    """Processes that were just killed may take a moment to leave."""
    for _ in range(50):
        try:
            folder.rmdir()
        except OSError:
            time.sleep(0.1)
        else:
            return


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that ended; `killed` if we ended it. Peaks are its own, `rss` with the files that it maps."""

    code: int
    out: str
    err: str
    wall_s: float
    killed: bool
    peak_rss_bytes: int
    peak_anonymous_bytes: int


def run(
    command: Sequence[object], limit: Limit, *, log: Path, kill_after_s: float | None = None, counting_from: str = ""
) -> Ran:
    """Run the command under the limit, its output in files beside `log`.

    With `kill_after_s`, kill -9 that long after stderr first holds `counting_from`, by default after the start.
    """
    start, counted_from = time.monotonic(), None
    rss, anonymous, killed = 0, 0, False
    said = {ending: log.with_suffix(ending) for ending in (".out", ".err")}
    with said[".out"].open("w") as out, said[".err"].open("w") as err:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=out, stderr=err, start_new_session=True, preexec_fn=limit.enter
        )
        try:
            while process.poll() is None:
                status = _status(process.pid)
                rss, anonymous = max(rss, status.get("VmHWM", 0)), max(anonymous, status.get("RssAnon", 0))
                if counted_from is None and counting_from in said[".err"].read_text(errors="replace"):
                    counted_from = time.monotonic() if counting_from else start
                if None not in (kill_after_s, counted_from) and time.monotonic() - counted_from >= kill_after_s:
                    killed = True
                    break
                time.sleep(0.02 if kill_after_s is not None else 0.1)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = [file.read_text(encoding="utf-8", errors="replace") for file in said.values()]
    return Ran(process.returncode, text[0], text[1], time.monotonic() - start, killed, rss, anonymous)


def _status(pid: int) -> dict[str, int]:
    """Sizes in bytes from /proc; empty when the process has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    sizes = (line.split() for line in lines if line.endswith(" kB"))
    return {parts[0].rstrip(":"): int(parts[1]) * 1024 for parts in sizes}
