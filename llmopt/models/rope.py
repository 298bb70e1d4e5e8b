"""Rotary position embedding: the inverse frequencies of each supported type, in numpy, for every backend.

Source: Su et al., arXiv:2104.09864; `linear`: Chen et al., arXiv:2306.15595; `llama3`: as published with Llama 3.1;
`longrope`: Ding et al., arXiv:2402.13753, as published with Phi-3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmopt.errors import LlmoptError


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """theta: base of the geometric series; share: of a head's channels that turn, the first ones.

    The rest is used by `linear` (factor), `llama3` (factor to original_max_positions) and `longrope`: one divisor for
    each frequency, short up to original_max_positions and long beyond, and magnitude, by which cos and sin are scaled.
    """

    type: str = "default"
    theta: float = 10000.0
    share: float = 1.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    magnitude: float = 1.0

    @classmethod
    def from_config(cls, section: Mapping[str, Any], *, theta: float, share: float, max_positions: int) -> Rope:
        """From `rope_parameters` (transformers 5) or `rope_scaling` (before), with what holds where it is silent."""
        kind = section.get("rope_type") or section.get("type") or "default"
        original = int(section.get("original_max_position_embeddings", 8192))
        rope = cls(
            type="longrope" if kind == "su" else kind,
            theta=float(section.get("rope_theta", theta)),
            share=float(section.get("partial_rotary_factor", share)),
            factor=float(section.get("factor") or 1.0),
            low_freq_factor=float(section.get("low_freq_factor", 1.0)),
            high_freq_factor=float(section.get("high_freq_factor", 4.0)),
            original_max_positions=original,
            short_factors=tuple(section.get("short_factor") or ()),
            long_factors=tuple(section.get("long_factor") or ()),
            magnitude=_magnitude(section, max_positions / original) if kind in ("longrope", "su") else 1.0,
        )
        if rope.theta <= 0 or rope.factor <= 0:
            raise LlmoptError(f"a rotary embedding with theta {rope.theta} and factor {rope.factor} makes no sense")
        return rope

    def channels(self, head_dim: int) -> int:
        """How many channels of a head turn."""
        return int(head_dim * self.share)

    def check(self, head_dim: int) -> None:
        """Raises LlmoptError unless the embedding fits heads of `head_dim` channels."""
        channels = self.channels(head_dim)
        if not 0 < channels <= head_dim or channels % 2:
            raise LlmoptError(f"a rotary embedding cannot turn {channels} of {head_dim} channels")
        for name, factors in (("short_factor", self.short_factors), ("long_factor", self.long_factors)):
            if self.type == "longrope" and len(factors) != channels // 2:
                raise LlmoptError(
                    f"`{name}` of the rotary embedding has {len(factors)} entries where the heads need {channels // 2}",
                    hint="does config.json belong to another model?",
                )


def inv_freq(rope: Rope, head_dim: int, tokens: int = 0) -> np.ndarray:
    """Radians per position of each pair of channels that turn, for windows of `tokens`: float32 [channels / 2]."""
    channels = rope.channels(head_dim)
    frequencies = 1.0 / rope.theta ** (np.arange(0, channels, 2, dtype=np.float64) / channels)
    if rope.type == "linear":
        frequencies = frequencies / rope.factor
    elif rope.type == "llama3":
        frequencies = _llama3(frequencies, rope)
    elif rope.type == "longrope":
        long = tokens > rope.original_max_positions
        frequencies = frequencies / np.array(rope.long_factors if long else rope.short_factors)
    return frequencies.astype(np.float32)


def _llama3(frequencies: np.ndarray, rope: Rope) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    turns = rope.original_max_positions * frequencies / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return frequencies * (np.clip(blend, 0.0, 1.0) * (1 - 1 / rope.factor) + 1 / rope.factor)


def _magnitude(section: Mapping[str, Any], stretch: float) -> float:
    """The scale of cos and sin with `longrope`; `stretch`: positions now over positions at first."""
    given = section.get("attention_factor")
    if given is not None:
        return float(given)
    stretch = float(section.get("factor") or stretch)
    original = int(section.get("original_max_position_embeddings", 8192))
    return 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
