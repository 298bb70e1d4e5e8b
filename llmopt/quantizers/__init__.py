"""Quantize a checkpoint block by block: GPTQ, AWQ, SmoothQuant and round-to-nearest.

Settings are resolved without numpy or torch, so that a typo or a cache hit costs no import of theirs.
"""

from __future__ import annotations

from pathlib import Path

from llmopt.artifacts.outcome import Outcome, Progress
from llmopt.quantizers.settings import METHODS, QuantizeSettings, resolve

__all__ = ["METHODS", "OP_VERSION", "QuantizeSettings", "check", "deps", "quantize", "resolve"]

OP_VERSION = 1


def deps(settings: QuantizeSettings) -> tuple[str, ...]:
    """The distributions whose versions may change the bytes."""
    return ("numpy", "safetensors", "tokenizers", "torch")


def check(model: Path, settings: QuantizeSettings, calibration: Path | None) -> None:
    """Everything that can be found wrong before the work, without torch; raises LlmoptError."""
    from llmopt.quantizers import preflight

    preflight.check(model, settings, calibration)


def quantize(
    model: Path, settings: QuantizeSettings, calibration: Path | None, out: Path, progress: Progress
) -> Outcome:
    """Write the quantized checkpoint to `out`, an empty folder. Peak memory is one block and the calibration set."""
    from llmopt.models.checkpoint import Checkpoint
    from llmopt.models.config import DecoderConfig
    from llmopt.models.parallel import Workers
    from llmopt.quantizers.driver import Driver
    from llmopt.quantizers.preflight import calibration_windows

    checkpoint = Checkpoint.open(model)
    config = DecoderConfig.read(checkpoint)
    tokens = calibration_windows(model, settings, config, calibration) if settings.needs_calibration else None
    with Workers() as workers:
        return Driver(checkpoint, config, settings, tokens, workers, progress).run(out)
