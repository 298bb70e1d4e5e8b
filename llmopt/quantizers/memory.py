"""How much memory a quantization needs beside the activations of its calibration set: it depends on one block alone."""

from __future__ import annotations

import os

from llmopt.errors import LlmoptError
from llmopt.models.config import DecoderConfig
from llmopt.quantizers.settings import GPTQ, QuantizeSettings

BATCH_TOKENS = 2048  # of one forward pass; fixed, as what decides the order of sums
ROWS = 512  # rounded together; fixed, so that the partition never depends on the machine
_PROGRAM_BYTES = 500 << 20  # the interpreter and torch
_MATRICES = 3  # of a Hessian's size while it is factorized


def working_bytes(config: DecoderConfig, settings: QuantizeSettings, seq_len: int) -> int:
    """What the walk over one block may take, by its largest site; an upper estimate."""
    blocks = [list(config.linear_shapes(index).values()) for index in range(config.layers)]
    shapes = max(blocks, key=lambda block: sum(rows * columns for rows, columns in block))
    streams = 2 if isinstance(settings.method, GPTQ) and settings.method.compensate else 1  # ours and the original's
    weights = 4 * streams * sum(rows * columns for rows, columns in shapes)
    site = 3 * 4 * max(rows * columns for rows, columns in shapes) * 2  # the largest, rounded; two linears may share it
    widest = max(columns for _, columns in shapes)
    cores = len(os.sched_getaffinity(0))
    matrices = 4 * widest * widest * (_MATRICES + streams - 1) if settings.needs_calibration else 0
    tokens = max(BATCH_TOKENS, seq_len) if settings.needs_calibration else 0
    batches = (cores + 2) * tokens * streams * 4 * (3 * config.hidden_size + 3 * max(widest, config.hidden_size))
    rounding = cores * min(ROWS, max(rows for rows, _ in shapes)) * widest * 4 * 12
    return _PROGRAM_BYTES + weights + max(matrices + rounding, site + rounding, batches + matrices // _MATRICES)


def shelf_bytes(config: DecoderConfig, settings: QuantizeSettings, seq_len: int, budget_bytes: int | None) -> int:
    """What is left for activations of a budget, by default of four fifths of the memory that is free.

    Raises LlmoptError when the budget does not even hold the walk over one block.
    """
    needed = working_bytes(config, settings, seq_len)
    if budget_bytes is None:
        return max(0, available_bytes() * 4 // 5 - needed)
    if budget_bytes < needed:
        raise LlmoptError(
            f"a memory budget of {budget_bytes / 2**30:.2f} GiB is too small: one block of this model takes "
            f"{needed / 2**30:.2f} GiB",
            hint=f"use `--memory-budget {-(-needed * 11 // 10 // 2**20)}MiB` or more, or fewer cores (`taskset -c 0`)",
        )
    return budget_bytes - needed


def available_bytes() -> int:
    """Memory that this process may still take: of the machine, or of its container where that is less."""
    found = []
    with open("/proc/meminfo", encoding="ascii") as lines:  # noqa: PTH123
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        maximum, current = _number(limit), _number(used)
        if maximum is not None and current is not None:
            found.append(max(0, maximum - current))
    return min(found, default=4 << 30)


def _number(file: str) -> int | None:
    try:
        with open(file, encoding="ascii") as stream:  # noqa: PTH123
            text = stream.read().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
