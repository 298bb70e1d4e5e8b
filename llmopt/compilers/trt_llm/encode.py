"""One rank's tensors of a linear, from its codes or floats. Pure functions; shape suffixes as in formats/base.py.

Rows of q, k and v and columns are picked before anything is packed, so that a rank's part is encoded as a whole linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmopt.compilers.trt_llm.config import EngineConfig
from llmopt.compilers.trt_llm.families import AWQ, FP8, SMOOTH_DYNAMIC, SMOOTH_STATIC
from llmopt.compilers.trt_llm.layout import Module
from llmopt.formats.base import E4M3, QuantizedWeight, Stored, of_tensor, store_codes, store_float
from llmopt.models.families import Family


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What a rank has of a module: the rows of each of its linears, and the columns."""

    rows: tuple[np.ndarray, ...]
    columns: slice

    def of(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The rows, one linear's after the other's, without the columns of the others."""
        picked = [array[rows] for array, rows in zip(arrays, self.rows, strict=True)]
        joined = picked[0] if len(picked) == 1 else np.concatenate(picked)
        return joined[:, self.columns] if joined.ndim == 2 else joined


def qkv_piece(config: EngineConfig, family: Family, rank: int) -> Piece:
    """Heads `rank` of the tensor-parallel ranks: all of q, then k, then v.

    Where there are fewer KV heads than ranks, consecutive ranks have the same (ModelOpt's `dup_kv_weight`).
    """
    size, group, kv_heads = config.head_size, config.heads // config.kv_heads, config.kv_heads
    each = config.heads // config.tensor_parallel
    q = np.arange(rank * each, (rank + 1) * each)
    first = rank * kv_heads // config.tensor_parallel
    kv = np.arange(first, first + config.kv_heads_of_rank)

    def rows(heads: np.ndarray) -> np.ndarray:
        return (heads[:, None] * size + np.arange(size)).reshape(-1)

    if family.qkv_layout == "separate":
        return Piece(rows=(rows(q), rows(kv), rows(kv)), columns=slice(None))
    if family.qkv_layout == "stacked":
        heads = np.concatenate([q, config.heads + kv, config.heads + kv_heads + kv])
    else:
        heads = np.concatenate(
            [q // group * (group + 2) + q % group, kv * (group + 2) + group, kv * (group + 2) + group + 1]
        )
    return Piece(rows=(rows(heads),), columns=slice(None))


def split_piece(shape: tuple[int, int], split: str, rank: int, ranks: int) -> Piece:
    """Part `rank` of a linear's rows or columns."""
    out_features, in_features = shape
    if split == "rows":
        each = out_features // ranks
        return Piece(rows=(np.arange(rank * each, (rank + 1) * each),), columns=slice(None))
    each = in_features // ranks
    return Piece(rows=(np.arange(out_features),), columns=slice(rank * each, (rank + 1) * each))


def encode(
    config: EngineConfig, module: Module, weights: Sequence[QuantizedWeight], piece: Piece, input_scale: float | None
) -> dict[str, Stored]:
    """The tensors of a quantized module on a rank, by suffix; the linears share `smooth_I`, and FP8's scale."""
    codes_OI = piece.of([weight.codes_OI for weight in weights])
    scale_OG = Piece(rows=piece.rows, columns=slice(None)).of([weight.scale_OG for weight in weights])
    smooth_I = weights[0].smooth_I
    if smooth_I is None:
        smooth_I = np.ones(weights[0].codes_OI.shape[1], np.float32)
    smooth_I = smooth_I[piece.columns]
    smooth = {"prequant_scaling_factor": store_float(smooth_I, config.stored_dtype)}
    inputs = {} if input_scale is None else {"activation_scaling_factor": _scalar(input_scale)}
    if config.algorithm == FP8:
        scale = store_float(of_tensor(scale_OG), "F32")
        return {"weight": store_codes(codes_OI), "weights_scaling_factor": scale, **inputs}
    if config.algorithm == AWQ:
        start, stop, _ = piece.columns.indices(weights[0].codes_OI.shape[1])
        groups = slice(start // config.group_size, stop // config.group_size)
        signed = codes_OI ^ np.uint8(8)
        packed = signed[0::2] | signed[1::2] << np.uint8(4)
        scale = store_float(np.ascontiguousarray(scale_OG[:, groups]), "F32")
        return {"weight": Stored("I8", packed.view(np.int8)), "weights_scaling_factor": scale, **smooth}
    weight = Stored("I8", (codes_OI ^ np.uint8(128)).view(np.int8))
    if config.algorithm == SMOOTH_STATIC:
        return {"weight": weight, "weights_scaling_factor": store_float(scale_OG[:, 0], "F32"), **smooth, **inputs}
    assert config.algorithm == SMOOTH_DYNAMIC
    tensors = {"weight": weight, "per_channel_scale": store_float(scale_OG.reshape(1, -1), "F32")}
    if module.split == "columns":  # the others' inputs come from a norm; the engine divides by it
        tensors["smoother"] = store_float((1 / smooth_I).reshape(1, -1), "F32")
    return tensors


def to_largest_scale(weights: Sequence[QuantizedWeight]) -> tuple[list[QuantizedWeight], int]:
    """FP8 linears that are multiplied as one, with the largest of their scales; and how many values that changed.

    The loader's own rule (FP8Linear.postprocess): value times its scale over the largest, to the nearest code.
    """
    scales = [float(of_tensor(weight.scale_OG)[0]) for weight in weights]
    largest = np.float32(max(scales))
    found, changed = [], 0
    for weight, scale in zip(weights, scales, strict=True):
        if scale == largest:
            found.append(weight)
            continue
        values = E4M3 * np.float32(scale)
        table = nearest_e4m3(values / largest)
        inexact = (E4M3[table] * largest != values) & np.isfinite(values)
        counts = np.bincount(weight.codes_OI.reshape(-1), minlength=256)
        changed += int(counts[inexact].sum())
        found.append(replace(weight, codes_OI=table[weight.codes_OI], scale_OG=np.full_like(weight.scale_OG, largest)))
    return found, changed


def nearest_e4m3(values: np.ndarray) -> np.ndarray:
    """E4M3 codes of float32 values within its range, ties to the even code; NaN stays NaN."""
    sizes = E4M3[:0x7F]  # ascending, none negative
    size = np.abs(values)
    above = np.searchsorted(sizes, size).clip(1, 0x7E)
    below = above - 1
    low, high = size - sizes[below], sizes[above] - size
    up = (high < low) | ((high == low) & (above % 2 == 0))
    code = np.where(up, above, below).astype(np.uint8)
    code = np.where(np.isnan(values), np.uint8(0x7F), code)
    return np.where(np.signbit(values), code | np.uint8(0x80), code)


def _scalar(value: float) -> Stored:
    return Stored("F32", np.array([value], np.float32))
