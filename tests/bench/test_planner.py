"""The planner's predictions for our CPU engine beside what bench measures on this machine, and the error.

LLMOPT_PLAN_REQUESTS sets how many requests a level gets for each client.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmopt.planner.choose import options
from llmopt.planner.machine import machine
from llmopt.planner.precision import find
from llmopt.planner.roofline import Placement, Workload, predict
from llmopt.planner.shape import read

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]

REQUESTS = int(os.environ.get("LLMOPT_PLAN_REQUESTS", "6"))
CLIENTS = (1, 4, 16)
PROMPT, OUTPUT = 128, 64
#: 141M parameters in the blocks: past a cache of 32 MB even at 4 bits.
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 256,
}
PRECISIONS = {"w4a16": ("--method", "rtn", "--bits", 4, "--group-size", 128), "fp16": None}


def llmopt(store: Path, *arguments: object) -> dict[str, Any]:
    """The JSON of one command."""
    command = [sys.executable, "-m", "llmopt", *map(str, arguments), "--json", "--store", str(store), "--quiet"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def measured(store: Path, engine: str) -> dict[int, dict[str, float]]:
    """The figures of each number of clients: of the whole, closed loop, prompts of exact length."""
    found = {}
    for clients in CLIENTS:
        level = ("--concurrency", clients, "--requests", max(8, REQUESTS * clients), "--rounds", 1)
        lengths = ("--prompt-tokens", PROMPT, "--output-tokens", OUTPUT)
        report = llmopt(store, "bench", engine, *level, *lengths, "--warmup", 2)
        file = Path(report["path"]) / "report.json"
        found[clients] = json.loads(file.read_text())
    return found


def test_predictions_for_the_cpu_engine(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    model = make_checkpoint("llama", **SIZES)
    store = tmp_path / "store"
    for name, method in PRECISIONS.items():
        source = str(model) if method is None else llmopt(store, "quantize", model, *method)["artifact"]
        engine = llmopt(store, "compile", source)["artifact"]
        print(json.dumps(measured(store, engine)[1], indent=1)[:3000])
        break
