"""How a quantization is carried out on this machine, beside what is computed; torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """Only `bfloat16` changes the bytes: the action's target tells it. The rest is speed, memory and safety."""

    bfloat16: bool = False  # forward pass and Hessians multiply in BF16 and sum in float32
    memory_bytes: int | None = None  # of the process; what activations take past it lies in files
    save_after_s: float = 60.0  # work that may have to be repeated, as a forward pass alone, after a kill


DEFAULT = Execution()
