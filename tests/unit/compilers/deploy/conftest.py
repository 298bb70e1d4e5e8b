"""Artifacts with deployments in them, and a place to run their scripts in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from llmopt.compilers import deploy
from llmopt.compilers.deploy.base import Deployment

sys.path.insert(0, str(Path(__file__).parent))  # for `deployments`

Lay = Callable[..., Path]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def lay(tmp_path: Path) -> Lay:
    """lay(deployment, "triton") -> the folder of an artifact with that deployment in it, as it is written."""

    def folder(deployment: Deployment, *names: str) -> Path:
        artifact = tmp_path / "an artifact"  # with a blank, which a script must not mind
        (artifact / deployment.model).mkdir(parents=True)
        deploy.write(names, deployment, artifact)
        return artifact

    return folder


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """run(script, {"aws": text}, NAME="value") with commands of our own first on the PATH."""

    def script(
        path: Path, commands: Mapping[str, str], *arguments: str, **env: str
    ) -> subprocess.CompletedProcess[str]:
        programs = tmp_path / "bin"
        programs.mkdir(exist_ok=True)
        for name, text in commands.items():
            (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (programs / name).chmod(0o755)
        given = {"PATH": f"{programs}:{os.environ['PATH']}", "TMPDIR": str(tmp_path), **env}
        return subprocess.run([path, *arguments], env=given, capture_output=True, text=True, timeout=60, check=False)

    return script
