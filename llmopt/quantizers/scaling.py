"""Fold a scale of a site's input into the block without changing what the block computes."""

from __future__ import annotations

import torch

from llmopt.models.config import DecoderConfig
from llmopt.models.decoder import DecoderBlock
from llmopt.models.families import Site, V

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def tie_heads(scale_I: torch.Tensor, site: Site, config: DecoderConfig) -> torch.Tensor:
    """Give channels that must have one scale their geometric mean: where V makes them, the query heads of a KV head."""
    if site.scaled_by != V or config.heads == config.kv_heads:
        return scale_I
    shape = (config.kv_heads, config.heads // config.kv_heads, config.head_dim)
    return scale_I.view(shape).log().mean(1, keepdim=True).exp().expand(shape).reshape(-1)


def fold_scale(
    block: DecoderBlock, site: Site, scale_I: torch.Tensor, config: DecoderConfig, dtype: str
) -> torch.Tensor:
    """Divide what makes the site's input by scale_I and multiply the site's columns, in place.

    A norm's weight is kept in the checkpoint's `dtype`: it is rounded first, and the columns take the exact ratio of
    old to new. Returns the scale that was folded, which is that ratio.
    """
    source = block.tensors[f"{site.scaled_by}.weight"]
    if source.ndim == 1:
        rounded = (source / scale_I).to(_DTYPES[dtype]).float()
        scale_I = torch.where(rounded == 0, torch.ones_like(scale_I), source / rounded)
        block.tensors[f"{site.scaled_by}.weight"] = torch.where(rounded == 0, source, rounded)
    else:
        scale_O = scale_I
        if site.scaled_by == V and config.heads != config.kv_heads:
            scale_O = scale_I.view(config.kv_heads, -1, config.head_dim)[:, 0].reshape(-1)
        block.tensors[f"{site.scaled_by}.weight"] = source / scale_O[:, None]
        bias = block.tensors.get(f"{site.scaled_by}.bias")
        if bias is not None:
            block.tensors[f"{site.scaled_by}.bias"] = bias / scale_O
    for name in site.linears:
        block.tensors[f"{name}.weight"] = block.tensors[f"{name}.weight"] * scale_I
    return scale_I
