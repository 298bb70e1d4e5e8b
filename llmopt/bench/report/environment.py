"""What the figures depend on and a reader can know: the machine that made the load, its limits, and the versions."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import llmopt
from llmopt.artifacts.outcome import Json

_PACKAGES = ("numpy", "orjson", "pyarrow", "tokenizers")
#: What bears on many short exchanges over many connections.
_TCP = (
    "ipv4/tcp_congestion_control", "ipv4/tcp_slow_start_after_idle", "ipv4/tcp_autocorking", "ipv4/tcp_tw_reuse",
    "ipv4/ip_local_port_range", "core/somaxconn", "core/rmem_max", "core/busy_poll", "core/default_qdisc",
)  # fmt: skip


def environment(root: Path = Path("/")) -> dict[str, Json]:
    """The fingerprint; `root` holds `proc` and `sys`. What a system does not tell is None or left out."""
    load = os.getloadavg()
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(root) or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cores_of_machine": os.cpu_count(),
        "smt": _flag(root / "sys/devices/system/cpu/smt/active"),
        "governor": _governor(root),
        "turbo": _turbo(root),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": [round(value, 2) for value in load],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "clock": _clock(root),
        "limits": _limits(root),
        "tcp": {key.partition("/")[2]: _read(root / "proc/sys/net" / key) for key in _TCP},
        "versions": {
            "llmopt": llmopt.__version__,
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            **{name: _version(name) for name in _PACKAGES},
        },
    }


def _clock(root: Path) -> dict[str, Json]:
    """Of the stamps: what the kernel reads, and how fine the monotonic clock is."""
    source = root / "sys/devices/system/clocksource/clocksource0/current_clocksource"
    return {"source": _read(source), "resolution_ns": round(time.clock_getres(time.CLOCK_MONOTONIC) * 1e9)}


def _governor(root: Path) -> str | None:
    """Of all cores, the different ones joined; None where the machine (or its host) keeps it to itself."""
    found = (_read(file) for file in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor"))
    return ", ".join(sorted({name for name in found if name})) or None


def _turbo(root: Path) -> bool | None:
    cpu = root / "sys/devices/system/cpu"
    off = _flag(cpu / "intel_pstate/no_turbo")
    return _flag(cpu / "cpufreq/boost") if off is None else not off


def _limits(root: Path) -> dict[str, Json]:
    """What a container or a shell allows. With fewer `cpus` than cores the process is stopped now and then."""
    cpus = [quota for folder in _groups(root) if (quota := _cpus(folder)) is not None]
    memory = [int(text) for folder in _groups(root) for text in _memory(folder) if text.isdigit()]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "container": (root / ".dockerenv").exists() or (root / "run/.containerenv").exists(),
        "cpus": min(cpus, default=None),
        "memory_bytes": min((size for size in memory if size < total), default=None),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def _groups(root: Path) -> Iterator[Path]:
    """The control groups of this process, of version 2 or 1, and those above them."""
    mount = root / "sys/fs/cgroup"
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        names, _, path = line.partition(":")[2].partition(":")
        top = mount / names if names else mount
        inner = top / path.lstrip("/")
        yield inner
        while inner != top:
            inner = inner.parent
            yield inner


def _cpus(group: Path) -> float | None:
    quota, period = [*(_read(group / "cpu.max") or "").split(), "", ""][:2]
    if not quota:
        quota, period = _read(group / "cpu.cfs_quota_us") or "", _read(group / "cpu.cfs_period_us") or ""
    return round(int(quota) / int(period), 2) if quota.isdigit() and period.isdigit() else None


def _memory(group: Path) -> Iterator[str]:
    for name in ("memory.max", "memory.limit_in_bytes"):
        yield _read(group / name) or ""


def _cpu_model(root: Path) -> str | None:
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return None


def _flag(file: Path) -> bool | None:
    text = _read(file)
    return None if text is None else text == "1"


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip().replace("\t", " ")
    except OSError:
        return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
