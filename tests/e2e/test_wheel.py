"""What a user installs: the wheel has all that the commands need, and its entry script runs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it, and this environment's libraries beside it."""
    folder = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run([*pip, "wheel", "--no-deps", *isolation, "--wheel-dir", str(folder), str(REPOSITORY)])
    (wheel,) = folder.glob("llmopt-*.whl")
    environment = folder / "environment"
    run([sys.executable, "-m", "venv", "--without-pip", str(environment)])
    python = str(environment / "bin" / "python")
    run([*pip, "--python", python, "install", "--no-deps", "--no-index", str(wheel)])
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
    (Path(site) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin"


def run(command: list[str]) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd="/")
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_entry_script_runs(installed: Path) -> None:
    assert run([str(installed / "llmopt"), "--help"]).startswith("Usage: llmopt")


def test_the_package_is_the_one_in_the_wheel(installed: Path) -> None:
    where = run([str(installed / "python"), "-c", "import llmopt; print(llmopt.__file__)"])
    assert Path(where).is_relative_to(installed.parent)


def test_profiles_and_texts_are_in_the_wheel(installed: Path) -> None:
    assert "int4-gptq" in run([str(installed / "llmopt"), "profiles", "ls"])
    code = "from llmopt import profiles as p; print(p.CALIBRATION_TEXT.stat().st_size, p.HELDOUT_TEXT.stat().st_size)"
    assert all(int(size) > 10_000 for size in run([str(installed / "python"), "-c", code]).split())
