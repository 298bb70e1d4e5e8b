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
    "check_model",
    "deps",
    "quantize",
    "resolve",
]

OP_VERSION = 3


def deps(settings: QuantizeSettings | ConvertSettings) -> tuple[str, ...]:
    """The distributions whose versions may change the bytes."""
    return ("numpy", "safetensors", "torch")


def check(
    model: Path,
    settings: QuantizeSettings | ConvertSettings,
    calibration: Path | None,
    execution: Execution = DEFAULT,
    *,
    adapter: Path | None = None,
) -> None:
    """Everything that can be found wrong before the work, without torch; raises LlmoptError."""
    if isinstance(settings, ConvertSettings):
        from llmopt.formats.convert import check_convert

        check_convert(model, settings.common.format)
        return
    from llmopt.quantizers import preflight

    preflight.check(model, settings, calibration, execution, adapter=adapter)


def check_model(
    model: Path,
    settings: QuantizeSettings,
    execution: Execution = DEFAULT,
    *,
    adapter: Path | None = None,
) -> None:
    """As much of `check` as small files tell, before there is a calibration set."""
    from llmopt.quantizers import preflight

    preflight.check_model(model, settings, execution, adapter=adapter)


def quantize(
    model: Path,
    settings: QuantizeSettings | ConvertSettings,
    calibration: Path | None,
    out: Path,
    progress: Progress,
    execution: Execution = DEFAULT,
    *,
    adapter: Path | None = None,
) -> Outcome:
    """Write the quantized checkpoint to `out`. Peak memory is one block and what the calibration set may take.

    `calibration` is the folder of a calibration set; `adapter` that of a LoRA adapter, which is merged first.
    `out` is empty, or holds what the very same call left when it was ended early: then it goes on from there.
    """
    if isinstance(settings, ConvertSettings):
        from llmopt.formats.convert import convert

        return convert(model, settings.common.format, out, progress)
    from llmopt.models.parallel import Workers

    with Workers(bfloat16=execution.bfloat16) as workers:
        return _driver(model, settings, calibration, workers, progress, execution, adapter).run(out)


def check_block(
    model: Path,
    settings: QuantizeSettings,
    calibration: Path | None,
    quantized: Path,
    index: int,
    scratch: Path,
    progress: Progress,
    execution: Execution = DEFAULT,
    *,
    adapter: Path | None = None,
) -> list[str]:
    """Quantize one block of `quantized` again and name the tensors that come out other than they are there."""
    from llmopt.models.parallel import Workers

    with Workers(bfloat16=execution.bfloat16) as workers:
        return _driver(model, settings, calibration, workers, progress, execution, adapter).check_block(
            quantized, index, scratch
        )


def _driver(
    model: Path,
    settings: QuantizeSettings,
    calibration: Path | None,
    workers: Workers,
    progress: Progress,
    execution: Execution,
    adapter: Path | None,
) -> Driver:
    from llmopt.models.adapter import open_checkpoint
    from llmopt.models.config import DecoderConfig
    from llmopt.quantizers.driver import Driver
    from llmopt.quantizers.preflight import calibration_windows

    checkpoint = open_checkpoint(model, adapter)
    config = DecoderConfig.read(checkpoint)
    tokens = calibration_windows(settings, config, calibration) if settings.needs_calibration else None
    return Driver(checkpoint, config, settings, tokens, workers, progress, execution)
