"""Every file of every deployment, byte for byte, against tests/golden/deploy.

To write them again, and look at the difference: `PYTHONPATH=. python tests/unit/compilers/deploy/test_golden.py`.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from deployments import CASES

from llmopt.compilers.deploy import EMITTERS, emit
from llmopt.errors import SettingsError

GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "deploy"


def files(case: str) -> dict[str, str]:
    """What each emitter writes, or the words in which it refuses."""
    found: dict[str, str] = {}
    for name in EMITTERS:
        try:
            found |= emit([name], CASES[case])
        except SettingsError as error:
            found[f"deploy/{name}/refused.txt"] = f"{error.message}\n{error.hint}\n"
    return found


@pytest.mark.parametrize("case", CASES)
def test_files_are_those_that_were_looked_at(case: str) -> None:
    golden = {str(file.relative_to(GOLDEN / case)): file.read_text() for file in (GOLDEN / case).rglob("*.*")}
    assert files(case) == golden


@pytest.mark.parametrize("case", CASES)
def test_scripts_are_bash(case: str) -> None:
    scripts = [text for path, text in files(case).items() if path.endswith(".sh")]
    assert scripts
    for script in scripts:
        assert script.startswith("#!/usr/bin/env bash\n")
        assert "set -euo pipefail" in script
        subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=10)


def test_an_unknown_emitter_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(SettingsError) as caught:
        emit(["trition"], CASES["bundle"])
    assert caught.value.hint == "did you mean `triton`?"


if __name__ == "__main__":
    for case in CASES:
        for path, text in files(case).items():
            (GOLDEN / case / path).parent.mkdir(parents=True, exist_ok=True)
            (GOLDEN / case / path).write_text(text)
