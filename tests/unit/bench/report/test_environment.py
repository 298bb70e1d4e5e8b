"""The fingerprint of the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmopt.bench.report.environment import environment


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def limits(root: Path) -> Any:
    return environment(root)["limits"]


def test_this_machine_can_be_told() -> None:
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["cpu"]
    assert found["cores"]


def test_a_system_that_tells_nothing_is_no_error(tmp_path: Path) -> None:
    found = environment(tmp_path)
    assert found["governor"] is None
    assert found["smt"] is None
    assert limits(tmp_path)["cpus"] is None


@pytest.mark.parametrize(
    "files",
    [
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/a/b/cpu.max": "max",
        },
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"},
        {
            "proc/self/cgroup": "3:cpu,cpuacct:/pod\n",
            "sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_quota_us": "150000",
            "sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_period_us": "100000",
        },
    ],
)
def test_the_quota_of_a_container_is_seen(tmp_path: Path, files: dict[str, str]) -> None:
    assert limits(put(tmp_path, files))["cpus"] == 1.5


def test_the_narrowest_of_nested_quotas_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/cpu.max": "50000 100000",
        "sys/fs/cgroup/a/b/cpu.max": "150000 100000",
    }
    assert limits(put(tmp_path, files))["cpus"] == 0.5


def test_no_quota_is_no_limit(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/x\n1:cpu:/x\n",
        "sys/fs/cgroup/x/cpu.max": "max 100000",
        "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/x/memory.max": "max",
    }
    found = limits(put(tmp_path, files))
    assert found["cpus"] is None
    assert found["memory_bytes"] is None


def test_different_governors_are_both_told(tmp_path: Path) -> None:
    cpu = "sys/devices/system/cpu"
    files = {
        f"{cpu}/cpu{n}/cpufreq/scaling_governor": g for n, g in enumerate(("powersave", "performance", "powersave"))
    }
    assert environment(put(tmp_path, files))["governor"] == "performance, powersave"
