"""This machine's CPU as a row of hardware: "use the CPU you already rent"."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llmopt import backends
from llmopt.planner.hardware import Hardware

_TOKENS, _IN, _OUT = 512, 2048, 4096  # of the product that measures operations: 8.6 Gop, weights within a cache
_WIDE_IN, _WIDE_OUT = 4096, 65536  # of the one that measures bandwidth: 256 MiB of int8 weights, past any cache but few
_GROUP = 128  # in-features that share a scale of int4
_PEAKS = {
    "fp32": ("f32", {"INFERENCE_PRECISION_HINT": "f32"}),
    "fp16": ("f32", {}),  # the plugin's own choice: BF16 where the CPU has it
    "int8": ("i8", {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"}),
}


def machine(*, bandwidth_bytes_s: float | None = None, seconds: float = 0.3) -> Hardware:
    """Measured in a few seconds by the products that our CPU engine runs, so they are reached, not peaks.

    bandwidth_bytes_s: given, not measured. seconds: spent on each measurement. Raises BackendMissingError without
    OpenVINO. What else runs on the machine meanwhile is in the figures.
    """
    ov = backends.load("openvino")
    flops = {}
    for name, (weights, properties) in _PEAKS.items():
        elapsed = _product_s(ov, weights, _TOKENS, _IN, _OUT, properties, seconds)
        flops[name] = 2.0 * _TOKENS * _IN * _OUT / elapsed
    if bandwidth_bytes_s is None:
        elapsed = _product_s(ov, "i8", 1, _WIDE_IN, _WIDE_OUT, _PEAKS["int8"][1], seconds)
        bandwidth_bytes_s = _WIDE_IN * _WIDE_OUT / elapsed
    elapsed = _product_s(ov, "i4", 1, _WIDE_IN, _WIDE_OUT, _PEAKS["int8"][1], seconds)
    int4_bytes_s = min(_WIDE_IN * _WIDE_OUT / 2 / elapsed, bandwidth_bytes_s)
    memory, cores = _memory_bytes(), len(os.sched_getaffinity(0))
    reached = f"{bandwidth_bytes_s / 1e9:.1f} GB/s of memory, {int4_bytes_s / 1e9:.1f} of int4 weights, Gop/s of "
    reached += ", ".join(f"{rate / 1e9:,.0f} in {name}" for name, rate in flops.items())
    return Hardware(
        name="here",
        kind="cpu",
        memory_bytes=memory,
        bandwidth_bytes_s=bandwidth_bytes_s,
        bandwidth_efficiency=1.0,
        flops=flops,
        streams={"w4a16": int4_bytes_s},
        compute_efficiency=1.0,
        source=f"{cores} cores, {memory / 1e9:.0f} GB; OpenVINO's products reach, beside whatever else runs: {reached}",
    )


def _product_s(
    ov: Any, weights: str, tokens: int, inner: int, outer: int, properties: dict[str, str], seconds: float
) -> float:
    """The fastest of repeated products of [tokens, inner] by [inner, outer]."""
    op = backends.load("openvino.opset13")
    values = np.arange(inner * outer, dtype=np.int8).reshape(outer, inner)
    x = op.parameter([tokens, inner], np.float32)
    if weights == "i8":
        scale = op.constant(np.full((outer, 1), 0.01, np.float16))
        w = op.convert(op.multiply(op.convert(op.constant(values), "f16"), scale), "f32")
    elif weights == "i4":
        packed = values.reshape(-1).view(np.uint8)[: inner * outer // 2]  # outlives the model, which points at it
        codes = op.constant(ov.Tensor(packed, [outer, inner // _GROUP, _GROUP], ov.Type.i4))
        scale = op.constant(np.full((outer, inner // _GROUP, 1), 0.01, np.float16))
        grouped = op.multiply(op.convert(codes, "f16"), scale)
        w = op.convert(op.reshape(grouped, np.array([outer, inner]), False), "f32")
    else:
        w = op.constant(values.astype(np.float32) / 64)
    model = ov.Model([op.result(op.matmul(x, w, False, True))], [x])
    request = ov.Core().compile_model(model, "CPU", properties).create_infer_request()
    inputs = [np.ones((tokens, inner), np.float32)]
    return _fastest(lambda: request.infer(inputs), seconds)


def _fastest(work: Callable[[], object], seconds: float) -> float:
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def _memory_bytes() -> int:
    """Of the machine, or of the container where that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
