"""CPU seconds of what every command and every cache hit costs before it does anything."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    (),
    *((name,) for name in ("quantize", "compile", "bench", "eval", "run", "serve", "doctor", "store", "profiles")),
)


def cpu_s(arguments: Sequence[str], store: Path) -> float:
    """User and system time of one whole process, the least of five: the rest is the machine's noise."""
    best = float("inf")
    for _ in range(5):
        before = os.times()
        subprocess.run(
            [Path(sys.executable).with_name("llmopt"), *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "LLMOPT_STORE": str(store)},
            cwd=ROOT,
        )
        after = os.times()
        best = min(best, after.children_user + after.children_system - before.children_user - before.children_system)
    return best


def test_help(tmp_path: Path) -> None:
    figures = {" ".join(("llmopt", *command, "--help")): cpu_s((*command, "--help"), tmp_path) for command in COMMANDS}
    print()
    for line, seconds in figures.items():
        print(f"{line:30} {seconds:.3f} s of CPU")
    assert max(figures.values()) <= 0.15


def test_a_cached_run(tmp_path: Path) -> None:
    arguments = ("run", "demo/pipeline.yaml", "--json")
    subprocess.run(
        [Path(sys.executable).with_name("llmopt"), *arguments],
        check=True,
        capture_output=True,
        env={**os.environ, "LLMOPT_STORE": str(tmp_path)},
        cwd=ROOT,
    )
    seconds = cpu_s(arguments, tmp_path)
    print(f"\nllmopt run demo/pipeline.yaml, all cached: {seconds:.3f} s of CPU")
    assert seconds <= 0.4
