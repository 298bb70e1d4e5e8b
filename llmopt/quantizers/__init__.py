"""Quantize a checkpoint block by block: GPTQ, AWQ, SmoothQuant and round-to-nearest.

Settings are resolved without numpy or torch, so that a typo or a cache hit costs no import of theirs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.artifacts.outcome import Outcome, Progress
from llmopt.quantizers.execution import DEFAULT, Execution
from llmopt.quantizers.settings import METHODS, ConvertSettings, QuantizeSettings, resolve

if TYPE_CHECKING:
    from llmopt.models.parallel import Workers
    from llmopt.quantizers.driver import Driver

__all__ = [
    "METHODS",
    "OP_VERSION",
    "ConvertSettings",
    "Execution",
    "QuantizeSettings",
    "check",
    "check_block",
    "deps",
    "quantize",
    "resolve",
]

OP_VERSION = 2


def deps(settings: QuantizeSettings | ConvertSettings) -> tuple[str, ...]:
    """The distributions whose versions may change the bytes."""
    return ("numpy", "safetensors", "tokenizers", "torch")


def check(
    model: Path,
    settings: QuantizeSettings | ConvertSettings,
    calibration: Path | None,
    execution: Execution = DEFAULT,
) -> None:
    """Everything that can be found wrong before the work, without torch; raises LlmoptError."""
    if isinstance(settings, ConvertSettings):
        from llmopt.formats.convert import check_convert

        return check_convert(model, settings.common.format)
    from llmopt.quantizers import preflight

    return preflight.check(model, settings, calibration, execution)


def quantize(
    model: Path,
    settings: QuantizeSettings | ConvertSettings,
    calibration: Path | None,
    out: Path,
    progress: Progress,
    execution: Execution = DEFAULT,
) -> Outcome:
    """Write the quantized checkpoint to `out`. Peak memory is one block and what the calibration set may take.

    `out` is empty, or holds what the very same call left when it was ended early: then it goes on from there.
    """
    if isinstance(settings, ConvertSettings):
        from llmopt.formats.convert import convert

        return convert(model, settings.common.format, out, progress)
    from llmopt.models.parallel import Workers

    with Workers(bfloat16=execution.bfloat16) as workers:
        return _driver(model, settings, calibration, workers, progress, execution).run(out)


def check_block(
    model: Path,
    settings: QuantizeSettings,
    calibration: Path | None,
    quantized: Path,
    index: int,
    progress: Progress,
    execution: Execution = DEFAULT,
) -> list[str]:
    """Quantize one block of `quantized` again and name the tensors that come out other than they are there."""
    from llmopt.models.parallel import Workers

    with Workers(bfloat16=execution.bfloat16) as workers:
        return _driver(model, settings, calibration, workers, progress, execution).check_block(quantized, index)


def _driver(
    model: Path,
    settings: QuantizeSettings,
    calibration: Path | None,
    workers: Workers,
    progress: Progress,
    execution: Execution,
) -> Driver:
    from llmopt.models.checkpoint import Checkpoint
    from llmopt.models.config import DecoderConfig
    from llmopt.quantizers.driver import Driver
    from llmopt.quantizers.preflight import calibration_windows

    checkpoint = Checkpoint.open(model)
    config = DecoderConfig.read(checkpoint)
    tokens = calibration_windows(model, settings, config, calibration) if settings.needs_calibration else None
    return Driver(checkpoint, config, settings, tokens, workers, progress, execution)
