"""Convert a quantized checkpoint into another format where that loses nothing: the same codes, zero points and scales.

Tensor by tensor, a block in memory at a time; what is no quantized linear is passed on as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmopt.artifacts.outcome import Outcome, Progress
from llmopt.errors import LlmoptError
from llmopt.formats.base import Format, Grid, QuantizedReader, Stored, as_float, store_float
from llmopt.formats.reading import Source, all_modules, get_format, linears, open_model
from llmopt.formats.scheme import Scheme, check_schemes

if TYPE_CHECKING:
    from llmopt.models.writer import Writable


@dataclass(frozen=True, slots=True)
class _Plan:
    """What becomes of a checkpoint: the scheme of each linear in the new format, None where it is plain."""

    source: Source
    reader: QuantizedReader
    target: Format
    schemes: dict[str, Scheme | None]
    shapes: dict[str, tuple[int, int]]

    @property
    def quantized(self) -> dict[str, Scheme]:
        return {prefix: scheme for prefix in self.shapes if (scheme := self.schemes[prefix]) is not None}


def check_convert(model: Path, format: str) -> None:
    """Raise LlmoptError unless `model` can be had in `format` without loss; reads its scales and zero points."""
    _plan(model, format)


def convert(model: Path, format: str, out: Path, progress: Progress) -> Outcome:
    """Write `model` in `format` into the empty folder `out`. Peak memory is the largest block, or the embedding."""
    from llmopt.formats.dequantized import to_torch
    from llmopt.models.companions import copy_companions, write_json
    from llmopt.models.writer import CheckpointWriter

    plan = _plan(model, format)
    checkpoint, config = plan.source.checkpoint, plan.source.config
    scales = plan.reader.kv_scales()
    shards = _shards(plan)
    writer = CheckpointWriter(out, len(shards))
    for number, (name, (prefixes, passed)) in enumerate(shards.items(), 1):
        tensors: dict[str, Writable] = {each: checkpoint.tensors[each] for each in passed}
        for prefix in prefixes:
            tensors |= {each: to_torch(stored) for each, stored in _encode(plan, prefix)}
        for module in (module for module in scales if module.startswith(f"{name}.")):
            stored_kv = plan.target.encode_kv(*scales[module])
            tensors |= {f"{module}.{suffix}": to_torch(stored) for suffix, stored in stored_kv.items()}
        writer.write(number, tensors)
        checkpoint.release()
        progress(f"converted {name}")
    values = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    kv_cache = plan.reader.encoding.kv_cache
    values["quantization_config"] = plan.target.config(plan.schemes, kv_cache=kv_cache)
    total = writer.finish(values)
    for file, content in plan.target.extra_files(plan.schemes, kv_cache).items():
        write_json(out / file, content)
    copy_companions(checkpoint.path, out)
    return Outcome(metrics={"weight_bytes": total, "linears": len(plan.quantized), "blocks": config.layers})


def _plan(model: Path, format: str) -> _Plan:
    """Every reason against a conversion is found here."""
    source, target = open_model(model), get_format(format)
    reader = source.reader
    if reader is None:
        raise LlmoptError(f"`{model}` is not quantized", hint="choose a method that quantizes, such as `--method gptq`")
    shapes, dtype = linears(source.config), target.scale_dtype or source.config.dtype
    schemes: dict[str, Scheme | None] = {}
    centred: dict[Scheme, bool] = {}
    changed = scales = 0
    for prefix, shape in shapes.items():
        scheme = schemes[prefix] = reader.scheme(prefix)
        if scheme is None:
            continue
        grid = reader.grid(prefix, shape)
        _check_inputs(prefix, grid)
        centred[scheme] = centred.get(scheme, True) and grid.zero_OG is None
        input_scale = reader.input_scale(prefix)
        values = np.append(grid.scale_OG, [] if input_scale is None else [input_scale]).astype(np.float32)
        with np.errstate(over="ignore"):
            changed += int((as_float(store_float(values, dtype)) != values).sum())
        scales += values.size
    if not scales:
        raise LlmoptError(f"no linear of `{model}` is quantized", hint="there is nothing to convert")
    # What an encoding says is asymmetric may be so in name only: AWQ and GPTQ always have zero points.
    renamed = all_modules(
        source.config,
        {prefix: scheme and replace(scheme, symmetric=centred[scheme]) for prefix, scheme in schemes.items()},
    )
    plan = _Plan(source, reader, target, renamed, shapes)
    if reader.encoding.kv_cache == "none" and reader.kv_scales():
        raise LlmoptError("the checkpoint has scales of a KV cache that its `quantization_config` says nothing of")
    check_schemes(format, {prefix: renamed[prefix] for prefix in shapes}, reader.encoding.kv_cache)
    for prefix, scheme in plan.quantized.items():
        target.layout(shapes[prefix], scheme)
    if changed:
        raise LlmoptError(
            f"{changed} of {scales} scales would change: `{format}` has them in {dtype} here",
            hint="quantize the original into the format that you need",
        )
    source.checkpoint.release()
    return plan


def _check_inputs(prefix: str, grid: Grid) -> None:
    """No format that we write changes the input of a linear."""
    hint = "quantize the original into the format that you need"
    if grid.order_I is not None:
        raise LlmoptError(
            f"`{prefix}` has groups of scattered columns (`desc_act`), which cannot be converted", hint=hint
        )
    if grid.smooth_I is not None:
        raise LlmoptError(f"`{prefix}` has a `pre_quant_scale`, which cannot be converted", hint=hint)


def _encode(plan: _Plan, prefix: str) -> Iterator[tuple[str, Stored]]:
    """The tensors of one linear in the new format."""
    scheme, weight = plan.quantized[prefix], plan.reader.linear(prefix, plan.shapes[prefix])
    assert weight is not None
    dtype, input_scale = plan.source.config.dtype, plan.reader.input_scale(prefix)
    for suffix, stored in plan.target.encode(weight, scheme, dtype, input_scale).items():
        yield f"{prefix}.{suffix}", stored


def _shards(plan: _Plan) -> dict[str, tuple[list[str], list[str]]]:
    """By a name for progress: the quantized linears of each shard, and the tensors that it passes on."""
    checkpoint, config = plan.source.checkpoint, plan.source.config
    blocks = [config.block(index) for index in range(config.layers)]
    shards: dict[str, tuple[list[str], list[str]]] = {name: ([], []) for name in ("embedding", *blocks, "head")}

    def home(name: str) -> str:
        if name.startswith(f"{config.family.head}."):
            return "head"
        return next((block for block in blocks if name.startswith(f"{block}.")), "embedding")

    for prefix in plan.quantized:
        shards[home(f"{prefix}.")][0].append(prefix)
    for name in checkpoint.tensors:
        prefix, _, suffix = name.rpartition(".")
        encoded = prefix in plan.quantized and suffix != "bias"
        if not encoded and suffix not in ("k_scale", "v_scale"):
            shards[home(name)][1].append(name)
    return {name: parts for name, parts in shards.items() if any(parts)}
