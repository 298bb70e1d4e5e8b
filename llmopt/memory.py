"""How much memory this process has and had, for the figures that progress shows. Imports nothing heavy."""

from __future__ import annotations

import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")


def usage() -> dict[str, int]:
    """`rss_bytes`, resident now, and `peak_rss_bytes`, the most so far; where there is no /proc only the latter."""
    try:
        fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    except (OSError, ValueError):
        fields = {}
    found = {
        name: int(fields[field].split()[0]) << 10
        for name, field in (("rss_bytes", "VmRSS"), ("peak_rss_bytes", "VmHWM"))
        if field in fields
    }
    # The kernel's other account; it starts from the parent's at a fork, so it is the second choice.
    found.setdefault("peak_rss_bytes", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
    return found
