"""Everything that can be found wrong with a `quantize` before the work."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from llmopt.errors import LlmoptError, SettingsError
from llmopt.formats.reading import get_format
from llmopt.models.checkpoint import FLOATS, Checkpoint
from llmopt.models.config import DecoderConfig
from llmopt.models.text import read_tokens, windows
from llmopt.quantizers.settings import QuantizeSettings


def check(model: Path, settings: QuantizeSettings, calibration: Path | None) -> None:
    """Family, shapes, settings, text, and weights that are not finite; raises LlmoptError."""
    checkpoint = Checkpoint.open(model)
    config = DecoderConfig.read(checkpoint)
    if "quantization_config" in checkpoint.config:
        raise LlmoptError(f"`{model}` is quantized already", hint="quantize the checkpoint that it was made from")
    _check_shapes(config, settings)
    if settings.needs_calibration:
        calibration_windows(model, settings, config, calibration)
    _check_finite(checkpoint)


def calibration_windows(
    model: Path, settings: QuantizeSettings, config: DecoderConfig, calibration: Path | None
) -> np.ndarray:
    """Token ids [samples, seq_len], int64."""
    common = settings.common
    if calibration is None:
        raise LlmoptError(f"the method `{common.method}` needs a calibration text", hint="give one with `--calib FILE`")
    if common.seq_len > config.max_positions:
        raise SettingsError(
            f"`seq_len` cannot be {common.seq_len}: the model has {config.max_positions} positions",
            hint=f"use `seq_len: {config.max_positions}` or less",
        )
    tokens = read_tokens(model, calibration)
    if tokens.max(initial=0) >= config.vocab_size:
        raise LlmoptError("the tokenizer has more tokens than the model", hint="do they belong together?")
    return windows(tokens, count=common.samples, length=common.seq_len, seed=common.seed, what="calibration text")


def linear_shapes(config: DecoderConfig, settings: QuantizeSettings) -> dict[str, tuple[int, int]]:
    """(O, I) of every linear that the settings can speak of, by its full name: those of the blocks, and the head."""
    blocks = {
        f"{config.block(index)}.{name}": config.linear_shape(name)
        for index in range(config.layers)
        for site in config.family.sites
        for name in site.linears
    }
    head = {config.family.head: (config.vocab_size, config.hidden_size)} if settings.common.lm_head else {}
    return blocks | head


def _check_shapes(config: DecoderConfig, settings: QuantizeSettings) -> None:
    if settings.common.lm_head and config.tie_embeddings:
        raise SettingsError(
            "`lm_head` cannot be quantized: the model ties it to its embedding", hint="leave `lm_head` out"
        )
    layout, linears = get_format(settings.common.format).layout, linear_shapes(config, settings)
    _check_overrides(config, settings, list(linears))
    for name, shape in linears.items():
        scheme = settings.scheme_of(name)
        if scheme is None:
            continue
        if scheme.group_size > 0 and shape[1] % scheme.group_size:
            fitting = [size for size in (128, 64, 32) if all(s[1] % size == 0 for s in linears.values())]
            use = f"use `group_size: {fitting[0]}`" if fitting else "use `group_size: -1`"
            raise SettingsError(
                f"`{name}` has {shape[1]} in-features, which a group size of {scheme.group_size} does not divide",
                hint=use,
            )
        layout(shape, scheme)


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


def _check_finite(checkpoint: Checkpoint) -> None:
    for name, info in checkpoint.tensors.items():
        if info.dtype not in FLOATS:
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
    checkpoint.release()
