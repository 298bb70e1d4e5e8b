"""What one run of a quantizer costs: standard library alone, so that every peer's own venv can import it.

A runner is called with a job (JSON) and adds its figures to it: CPU seconds of the core (the work, without imports and
without loading the model), CPU seconds of the whole process, and the peak of its memory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Figures:
    """Times one stretch of this process; `write` tells what it and the whole process came to."""

    def __init__(self) -> None:
        self.core_cpu_s = 0.0
        self.core_wall_s = 0.0

    @contextmanager
    def core(self) -> Iterator[None]:
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.core_cpu_s += time.process_time() - cpu
        self.core_wall_s += time.perf_counter() - wall

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, each call of which counts as core."""

        def measured(*arguments: Any, **keywords: Any) -> Any:
            with self.core():
                return function(*arguments, **keywords)

        return measured

    def write(self, file: Path) -> None:
        figures = {
            "core_cpu_s": round(self.core_cpu_s, 3),
            "core_wall_s": round(self.core_wall_s, 3),
            "process_cpu_s": round(time.process_time(), 3),
            "peak_bytes": peak_bytes(),
        }
        file.write_text(json.dumps(figures) + "\n", encoding="utf-8")


def peak_bytes() -> int:
    """Most resident memory this program ever had; not `ru_maxrss`, which starts with that of the parent."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def start() -> dict[str, Any]:
    """The job named on the command line; this process is tied to one core for as long as it lives."""
    if "cores" not in (job := json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return dict(job)
