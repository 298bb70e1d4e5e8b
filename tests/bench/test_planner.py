"""The planner's predictions for our CPU engine beside what bench measures on this machine, and the error.

LLMOPT_PLAN_REQUESTS sets how many requests each level gets.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmopt.bench.metrics.figures import compact
from llmopt.planner.hardware import Hardware
from llmopt.planner.machine import machine
from llmopt.planner.precision import find
from llmopt.planner.roofline import Placement, Workload, predict
from llmopt.planner.shape import read

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]

REQUESTS = int(os.environ.get("LLMOPT_PLAN_REQUESTS", "96"))
CLIENTS = (1, 4, 16)
FIGURES = ("steady_tokens_per_s", "ttft_ms_p50", "tpot_ms_p50")
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


def measured(store: Path, engine: str) -> dict[str, dict[str, Any]]:
    """The figures of each level of a closed loop with prompts and answers of exact length."""
    level = ("--concurrency", ",".join(map(str, CLIENTS)), "--requests", REQUESTS, "--rounds", 1, "--warmup", 2)
    lengths = ("--prompt-tokens", PROMPT, "--output-tokens", OUTPUT)
    report = llmopt(store, "bench", engine, *level, *lengths)
    found = json.loads((Path(report["path"]) / "report.json").read_text())["results"]["candidate"]
    return {name: compact(level) for name, level in found.items()}


def share_had() -> float:
    """The part of this machine's cores that a process which wants them all gets for a second."""
    square = np.ones((1024, 1024), np.float32)
    wall, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() < wall + 1:
        square @ square
    return (time.process_time() - cpu) / (time.perf_counter() - wall) / len(os.sched_getaffinity(0))


def require_quiet() -> None:
    """Skip where nothing that is measured now would mean anything."""
    if (share := share_had()) < 0.85:
        pytest.skip(f"other processes take {1 - share:.0%} of this machine: run it when it has nothing else to do")


def faster(one: Hardware, other: Hardware) -> Hardware:
    """The best of two measurements of one machine: what else ran meanwhile makes it slower only."""
    flops = {name: max(rate, other.flops[name]) for name, rate in one.flops.items()}
    return replace(one, flops=flops, bandwidth_bytes_s=max(one.bandwidth_bytes_s, other.bandwidth_bytes_s))


def test_predictions_for_the_cpu_engine(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    """Within a factor of two in the geometric mean of the rates."""
    require_quiet()
    model, store = make_checkpoint("llama", **SIZES), tmp_path / "store"
    shape, workload = read(str(model)), Workload(prompt_tokens=PROMPT, output_tokens=OUTPUT)
    print(f"\n{shape.parameters / 1e6:.0f}M parameters, {PROMPT} tokens in, {OUTPUT} out")
    print(f"{'':18} {'tokens/s':>24} {'TTFT ms':>24} {'TPOT ms':>24}\n{'':18}" + " predicted measured error" * 3)
    errors = []
    for name, method in PRECISIONS.items():
        source = str(model) if method is None else llmopt(store, "quantize", model, *method)["artifact"]
        engine = llmopt(store, "compile", source)["artifact"]
        before = machine()
        found = measured(store, engine)
        require_quiet()
        placement = Placement(
            shape=shape, precision=find(name), hardware=faster(before, machine()), kv_precision="int8"
        )
        for clients in CLIENTS:
            own, seen = predict(placement, workload, clients), found[f"c{clients}"]
            predicted = (own.tokens_s, 1e3 * own.ttft_s, 1e3 * own.tpot_s)
            pairs = [(value, seen[key]) for value, key in zip(predicted, FIGURES, strict=True)]
            cells = " ".join(f"{mine:9.1f} {theirs:8.1f} {mine / theirs - 1:+5.0%}" for mine, theirs in pairs)
            print(f"{name:6} {clients:2} clients  {cells}")
            errors.append(abs(math.log(own.tokens_s / seen[FIGURES[0]])))
        rates = ", ".join(f"{key} {rate / 1e9:.0f}" for key, rate in placement.hardware.flops.items())
        print(f"machine: {placement.hardware.bandwidth_bytes_s / 1e9:.1f} GB/s; Gop/s: {rates}")
    mean = math.exp(sum(errors) / len(errors)) - 1
    print(f"mean error of the rates: {mean:.0%}")
    assert mean < 1.0
