"""Rotary position embedding: the inverse frequencies of each supported type, in numpy, for every backend.

Source: Su et al., arXiv:2104.09864; `linear`: Chen et al., arXiv:2306.15595; `llama3`: as published with Llama 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmopt.errors import LlmoptError

TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """theta: base of the geometric series; the rest is used by `linear` (factor) and `llama3` (all)."""

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Rope:
        """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
        section = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = section.get("rope_type") or section.get("type") or "default"
        if kind not in TYPES:
            raise LlmoptError(
                f"the rope type `{kind}` is not supported",
                hint="supported: " + ", ".join(f"`{t}`" for t in TYPES),
            )
        if section.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
            raise LlmoptError("a partial rotary embedding (`partial_rotary_factor`) is not supported")
        return cls(
            type=kind,
            theta=float(section.get("rope_theta", config.get("rope_theta", 10000.0))),
            factor=float(section.get("factor", 1.0)),
            low_freq_factor=float(section.get("low_freq_factor", 1.0)),
            high_freq_factor=float(section.get("high_freq_factor", 4.0)),
            original_max_positions=int(section.get("original_max_position_embeddings", 8192)),
        )


def inv_freq(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position of each pair of channels, float32 [head_dim / 2]."""
    frequencies = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.type == "linear":
        frequencies = frequencies / rope.factor
    elif rope.type == "llama3":
        frequencies = _llama3(frequencies, rope)
    return frequencies.astype(np.float32)


def _llama3(frequencies: np.ndarray, rope: Rope) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    turns = rope.original_max_positions * frequencies / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return frequencies * (np.clip(blend, 0.0, 1.0) * (1 - 1 / rope.factor) + 1 / rope.factor)
