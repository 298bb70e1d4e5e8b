"""Quantize a checkpoint block by block: GPTQ, AWQ, SmoothQuant and round-to-nearest.

Settings are resolved without numpy or torch, so that a typo or a cache hit costs no import of theirs.
"""

from __future__ import annotations

from pathlib import Path

from llmopt.artifacts.outcome import Outcome, Progress
from llmopt.quantizers.settings import METHODS, QuantizeSettings, resolve

__all__ = ["METHODS", "OP_VERSION", "QuantizeSettings", "check", "check_model", "deps", "quantize", "resolve"]

OP_VERSION = 1


def deps(settings: QuantizeSettings) -> tuple[str, ...]:
    """The distributions whose versions may change the bytes."""
    return ("numpy", "safetensors", "torch")


def check(model: Path, settings: QuantizeSettings, calibration: Path | None, *, adapter: Path | None = None) -> None:
    """Everything that can be found wrong before the work, without torch; raises LlmoptError."""
    from llmopt.quantizers import preflight

    preflight.check(model, settings, calibration, adapter=adapter)


def check_model(model: Path, settings: QuantizeSettings, *, adapter: Path | None = None) -> None:
    """As much of `check` as small files tell, before there is a calibration set."""
    from llmopt.quantizers import preflight

    preflight.check_model(model, settings, adapter=adapter)


def quantize(
    model: Path,
    settings: QuantizeSettings,
    calibration: Path | None,
    out: Path,
    progress: Progress,
    *,
    adapter: Path | None = None,
) -> Outcome:
    """Write the quantized checkpoint to `out`, an empty folder. Peak memory is one block and the calibration set.

    `calibration` is the folder of a calibration set; `adapter` that of a LoRA adapter, which is merged first.
    """
    from llmopt.models.adapter import open_checkpoint
    from llmopt.models.config import DecoderConfig
    from llmopt.models.parallel import Workers
    from llmopt.quantizers.driver import Driver
    from llmopt.quantizers.preflight import calibration_windows

    checkpoint = open_checkpoint(model, adapter)
    config = DecoderConfig.read(checkpoint)
    tokens = calibration_windows(settings, config, calibration) if settings.needs_calibration else None
    with Workers() as workers:
        return Driver(checkpoint, config, settings, tokens, workers, progress).run(out)
