"""Quantize a checkpoint block by block: GPTQ, AWQ, SmoothQuant and round-to-nearest.

Settings are resolved without numpy or torch, so that a typo or a cache hit costs no import of theirs.
"""

from __future__ import annotations

from pathlib import Path

from llmopt.artifacts.outcome import Outcome, Progress
from llmopt.quantizers.settings import METHODS, ConvertSettings, QuantizeSettings, resolve

__all__ = ["METHODS", "OP_VERSION", "ConvertSettings", "QuantizeSettings", "check", "deps", "quantize", "resolve"]

OP_VERSION = 1


def deps(settings: QuantizeSettings | ConvertSettings) -> tuple[str, ...]:
    """The distributions whose versions may change the bytes."""
    return ("numpy", "safetensors", "tokenizers", "torch")


def check(model: Path, settings: QuantizeSettings | ConvertSettings, calibration: Path | None) -> None:
    """Everything that can be found wrong before the work, without torch; raises LlmoptError."""
    if isinstance(settings, ConvertSettings):
        from llmopt.formats.convert import check_convert

        return check_convert(model, settings.common.format)
    from llmopt.quantizers import preflight

    return preflight.check(model, settings, calibration)


def quantize(
    model: Path,
    settings: QuantizeSettings | ConvertSettings,
    calibration: Path | None,
    out: Path,
    progress: Progress,
) -> Outcome:
    """Write the quantized checkpoint to `out`, an empty folder. Peak memory is one block and the calibration set."""
    if isinstance(settings, ConvertSettings):
        from llmopt.formats.convert import convert

        return convert(model, settings.common.format, out, progress)
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
