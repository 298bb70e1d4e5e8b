"""What `llmopt bench` loads before its first request, which is what a user waits for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any


def test_numpy_and_pyarrow_wait_until_the_first_load_is_over(truth: Any, tmp_path: Path) -> None:
    code = f"""
import sys
from llmopt.bench.client import workers
drive = workers.drive
def watched(*arguments, **named):
    heavy = {{"numpy", "pyarrow", "rich", "torch"}} & sys.modules.keys()
    assert not heavy, heavy
    workers.drive = drive
    return drive(*arguments, **named)
workers.drive = watched
from llmopt.cli.app import main
sys.exit(main(["bench", {truth.url()!r}, "--requests", "2", "--concurrency", "1", "--store", {str(tmp_path)!r}]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)
