"""Everything that can be found wrong with a `quantize` before the work."""

from __future__ import annotations

from collections.abc import Container
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from llmopt.errors import LlmoptError, SettingsError
from llmopt.formats.reading import get_format, linears
from llmopt.formats.scheme import check_schemes
from llmopt.models.adapter import open_checkpoint, plain_parts
from llmopt.models.checkpoint import FLOATS, Checkpoint
from llmopt.models.config import DecoderConfig
from llmopt.models.text import read_calibration
from llmopt.quantizers.budget import bit_candidates
from llmopt.quantizers.execution import Execution
from llmopt.quantizers.memory import shelf_bytes
from llmopt.quantizers.settings import QuantizeSettings


def check(
    model: Path,
    settings: QuantizeSettings,
    calibration: Path | None,
    execution: Execution,
    *,
    adapter: Path | None = None,
) -> None:
    """Family, shapes, settings, calibration set, and weights that are not finite; raises LlmoptError."""
    checkpoint, config = check_model(model, settings, execution, adapter=adapter)
    if settings.needs_calibration:
        calibration_windows(settings, config, calibration)
    model_part, *adapter_parts = plain_parts(checkpoint)
    _check_finite(model_part, _computed_with(config))
    for each in adapter_parts:
        _check_finite(each, each.tensors)


def check_model(
    model: Path, settings: QuantizeSettings, execution: Execution, *, adapter: Path | None = None
) -> tuple[Checkpoint, DecoderConfig]:
    """What headers and config files tell: what a calibration set is not worth making without."""
    checkpoint = open_checkpoint(model, adapter)
    config = DecoderConfig.read(checkpoint)
    if "quantization_config" in checkpoint.config:
        raise LlmoptError(f"`{model}` is quantized already", hint="quantize the checkpoint that it was made from")
    _check_shapes(config, settings)
    shelf_bytes(config, settings, settings.common.seq_len, execution.memory_bytes)
    if settings.needs_calibration:
        _check_positions(settings.common.seq_len, config)
    return checkpoint, config


def calibration_windows(settings: QuantizeSettings, config: DecoderConfig, calibration: Path | None) -> np.ndarray:
    """Token ids [samples, seq_len], int64, of a calibration set that fits the model."""
    if calibration is None:
        method = settings.common.method
        raise LlmoptError(f"the method `{method}` needs a calibration text", hint="give one with `--calib FILE`")
    ids = read_calibration(calibration)
    _check_positions(ids.shape[1], config)
    if ids.max(initial=0) >= config.vocab_size:
        raise LlmoptError("the tokenizer has more tokens than the model", hint="do they belong together?")
    return ids


def _check_positions(seq_len: int, config: DecoderConfig) -> None:
    if seq_len > config.max_positions:
        raise SettingsError(
            f"`seq_len` cannot be {seq_len}: the model has {config.max_positions} positions",
            hint=f"use `seq_len: {config.max_positions}` or less",
        )


def linear_shapes(config: DecoderConfig, settings: QuantizeSettings) -> dict[str, tuple[int, int]]:
    """(O, I) of every linear that the settings can speak of, by its full name: those of the blocks, and the head."""
    found = linears(config)
    if not settings.common.lm_head:
        found.pop(config.family.head, None)
    return found


def _check_shapes(config: DecoderConfig, settings: QuantizeSettings) -> None:
    if config.mixture is not None and settings.method.scheme.activations == "static":
        raise SettingsError(
            "the experts of a mixture cannot have static activation scales: some may see no calibration token",
            hint="use `activations: dynamic`",
        )
    if settings.common.lm_head and config.tie_embeddings:
        raise SettingsError(
            "`lm_head` cannot be quantized: the model ties it to its embedding", hint="leave `lm_head` out"
        )
    layout, shapes = get_format(settings.common.format).layout, linear_shapes(config, settings)
    _check_overrides(config, settings, list(shapes))
    check_schemes(settings.common.format, {name: settings.scheme_of(name) for name in shapes}, settings.common.kv_cache)
    for name, shape in shapes.items():
        scheme = settings.scheme_of(name)
        if scheme is None:
            continue
        if scheme.group_size > 0 and shape[1] % scheme.group_size:
            fitting = [size for size in (128, 64, 32) if all(s[1] % size == 0 for s in shapes.values())]
            use = f"use `group_size: {fitting[0]}`" if fitting else "use `group_size: -1`"
            raise SettingsError(
                f"`{name}` has {shape[1]} in-features, which a group size of {scheme.group_size} does not divide",
                hint=use,
            )
        layout(shape, scheme)
    if settings.common.target_bpw is not None:
        bit_candidates(config, settings)


def _computed_with(config: DecoderConfig) -> set[str]:
    """The tensors that the model computes with: old GPT-NeoX checkpoints also store a mask of infinities."""
    names = set(config.outer_shapes())
    for index in range(config.layers):
        names |= {f"{config.block(index)}.{name}" for name in config.block_shapes(index)}
    return names


def _check_overrides(config: DecoderConfig, settings: QuantizeSettings, names: list[str]) -> None:
    for pattern in settings.common.overrides:
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        hint = f"linears are named like `{names[0]}`, and `*` stands for any part of a name"
        if fnmatchcase(config.family.head, pattern):
            hint = "the head is quantized only with `lm_head: true`"
        raise SettingsError(f"no linear of the model matches the pattern `{pattern}` of `overrides`", hint=hint)
    if all(settings.scheme_of(name) is None for name in names):
        raise SettingsError("`overrides` skips every linear of the model", hint="skip fewer")


def _check_finite(checkpoint: Checkpoint, names: Container[str]) -> None:
    for name, info in checkpoint.tensors.items():
        if name not in names or info.dtype not in FLOATS:
            continue
        flat = checkpoint.array(name).reshape(-1)
        step = 1 << 24
        for start in range(0, flat.size, step):
            part = flat[start : start + step]
            finite = (part & 0x7F80) != 0x7F80 if info.dtype == "BF16" else np.isfinite(part)
            if not finite.all():
                raise LlmoptError(
                    f"`{name}` holds values that are not finite (NaN or infinity)",
                    hint="the checkpoint is damaged, or its training diverged",
                )
        checkpoint.release()  # what has been read need not count as ours
