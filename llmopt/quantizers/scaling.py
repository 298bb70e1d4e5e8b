"""Fold a scale of a site's input into the block without changing what the block computes."""

from __future__ import annotations

import torch

from llmopt.models.decoder import DecoderBlock
from llmopt.models.families import Rows, Site

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def tie_heads(scale_I: torch.Tensor, site: Site) -> torch.Tensor:
    """Give channels that one row makes, and which so must have one scale, their geometric mean.

    Those are the channels of the query heads of a KV head.
    """
    rows = None if site.scaled_by is None else site.scaled_by.rows
    if rows is None or rows.repeats == 1:
        return scale_I
    shape = (rows.count, rows.repeats, rows.size)
    return scale_I.view(shape).log().mean(1, keepdim=True).exp().expand(shape).reshape(-1)


def fold_scale(block: DecoderBlock, site: Site, scale_I: torch.Tensor, dtype: str) -> torch.Tensor:
    """Divide what makes the site's input by scale_I and multiply the site's columns, in place.

    A norm's weight is kept in the checkpoint's `dtype`: it is rounded first, and the columns take the exact ratio of
    old to new; its bias, if any, is divided by that and rounded too. Returns the scale that was folded, which is that
    ratio. The site must have a `scaled_by`.
    """
    fold = site.scaled_by
    assert fold is not None
    if fold.rows is None:
        scale_I = _fold_into_norm(block, fold.name, scale_I, _DTYPES[dtype])
    else:
        _fold_into_rows(block, fold.name, fold.rows, scale_I)
    for name in site.linears:
        block.tensors[f"{name}.weight"] = block.tensors[f"{name}.weight"] * scale_I
    return scale_I


def _fold_into_norm(block: DecoderBlock, name: str, scale_I: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Channels whose new weight would be zero stay as they are."""
    tensors, offset = block.tensors, block.config.family.norm_offset
    stored = tensors[f"{name}.weight"]
    source = stored + offset
    rounded = (source / scale_I - offset).to(dtype).float()
    kept = rounded + offset == 0
    scale_I = torch.where(kept, torch.ones_like(scale_I), source / (rounded + offset))
    tensors[f"{name}.weight"] = torch.where(kept, stored, rounded)
    if f"{name}.bias" in tensors:
        bias = tensors[f"{name}.bias"]
        tensors[f"{name}.bias"] = torch.where(kept, bias, (bias / scale_I).to(dtype).float())
    return scale_I


def _fold_into_rows(block: DecoderBlock, name: str, rows: Rows, scale_I: torch.Tensor) -> None:
    scale = scale_I.view(rows.count, rows.repeats, rows.size)[:, 0].reshape(-1)
    runs = torch.arange(rows.count)[:, None] * rows.stride + torch.arange(rows.size)
    index = (runs + rows.start).reshape(-1)
    for suffix in ("weight", "bias"):
        source = block.tensors.get(f"{name}.{suffix}")
        if source is not None:
            changed = source.clone()
            changed[index] = source[index] / (scale[:, None] if suffix == "weight" else scale)
            block.tensors[f"{name}.{suffix}"] = changed
