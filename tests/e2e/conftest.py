"""The command as a user runs it, in processes of its own, on the model that the repository ships."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL_QUANTIZE = ("--samples", "4", "--seq-len", "64")


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str
    cpu_s: float

    @property
    def json(self) -> dict[str, Any]:
        """stdout, which must be one JSON object and nothing else."""
        assert self.code == 0, self.err
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


@dataclass(frozen=True)
class Cli:
    """llmopt("quantize", folder) -> Ran; `start` gives the running process instead."""

    store: Path

    @property
    def environment(self) -> dict[str, str]:
        mine = {name: value for name, value in os.environ.items() if not name.startswith("LLMOPT_")}
        return mine | {"LLMOPT_STORE": str(self.store), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def __call__(self, *arguments: object) -> Ran:
        before = os.times()
        ran = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, timeout=240, env=self.environment, cwd=REPOSITORY
        )
        after = os.times()
        cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
        return Ran(ran.returncode, ran.stdout, ran.stderr, cpu_s)

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
            cwd=REPOSITORY,
        )

    @staticmethod
    def command(*arguments: object) -> list[str]:
        return [sys.executable, "-m", "llmopt", *(str(argument) for argument in arguments)]


@pytest.fixture(scope="session")
def model() -> Path:
    return REPOSITORY / "demo" / "model"


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """With a store that all tests share: for what is made once and then read."""
    return Cli(tmp_path_factory.mktemp("shared") / "store")


@pytest.fixture
def llmopt(tmp_path: Path) -> Cli:
    """With a store of the test's own."""
    return Cli(tmp_path / "store")


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The demo, made small."""
    file = tmp_path_factory.mktemp("pipeline") / "small.yaml"
    file.write_text(
        f"extends: demo\nmodel: {model}\n"
        "quantize: {samples: 4, seq_len: 64}\neval: {windows: 4, seq_len: 64}\n"
        "bench: {concurrency: [1, 2], requests: 4, prompt_tokens: 16, output_tokens: 16, warmup: 1}\n",
        encoding="utf-8",
    )
    return file


@pytest.fixture(scope="session")
def chain(shared: Cli, pipeline: Path) -> Ran:
    """The whole pipeline, run once."""
    ran = shared("run", pipeline, "--json")
    assert ran.code == 0, ran.err
    return ran


@pytest.fixture(scope="session")
def stage(chain: Ran) -> Callable[[str], dict[str, Any]]:
    """stage("compile") -> what the run says of it."""
    return {stage["stage"]: stage for stage in chain.json["stages"]}.__getitem__
