"""From tensors of a checkpoint to constants of an OpenVINO graph; the checkpoint's integers and bits stay as they are.

Shape suffixes: O out features, I in features, G groups of consecutive in-features.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from llmopt.backends import load
from llmopt.formats.base import E4M3, QuantizedReader, QuantizedWeight
from llmopt.models.checkpoint import Checkpoint, bfloat16_to_float32, float32_to_bfloat16

ov, op = load("openvino"), load("openvino.opset13")

Node: TypeAlias = Any  # openvino.Node; OpenVINO ships no types

#: A Convert whose name ends so is marked as a decompression when the IR is saved (save.py).
DECOMPRESSED = "/decompressed"
_ELEMENT = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_ROWS_AT_ONCE = 4096
_INT8_LEVELS = 256


class Scratch:
    """Arrays that constants point at, in a file without a name: they take room on the disk and not in memory.

    OpenVINO's constants share memory with numpy without owning it: an array that is freed before the IR is saved
    gives silently wrong weights. So the arrays live as long as this object.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._kept: list[np.ndarray] = []

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator[Scratch]:
        """The file lies in `folder` and is gone with the context, or with the process."""
        with tempfile.TemporaryFile(dir=folder) as file:
            scratch = cls(file)
            yield scratch
            scratch._kept.clear()

    def keep(self, array: np.ndarray) -> np.ndarray:
        """The same array, read-only and backed by the file."""
        offset = self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(array).data)
        self._file.flush()
        return self.share(np.memmap(self._file, array.dtype, "r", offset, array.shape).view(np.ndarray))

    def share(self, array: np.ndarray) -> np.ndarray:
        """Keep an array that has its memory elsewhere (a checkpoint's memory map)."""
        self._kept.append(array)
        return array


class Constants:
    """Makes the constants of one model. `bytes_by_type` counts what they hold, by OpenVINO element type."""

    def __init__(self, checkpoint: Checkpoint, reader: QuantizedReader | None, scratch: Scratch) -> None:
        self._checkpoint, self._reader, self._scratch = checkpoint, reader, scratch
        self.bytes_by_type: Counter[str] = Counter()

    def vector(self, name: str) -> Node:
        """A norm's weight or a bias, as float32: exact, and small."""
        return self._constant(self._scratch.keep(self._checkpoint.float_array(name)), "f32", name)

    def matrix(self, name: str) -> Node:
        """A plain matrix [O, I] in the dtype that it has in the checkpoint, seen by the graph as float32."""
        info = self._checkpoint.tensors[name]
        if info.dtype not in _ELEMENT:  # F64
            return self._constant(self._scratch.keep(self._checkpoint.float_array(name)), "f32", name)
        constant = self._constant(self._scratch.share(self._checkpoint.array(name)), _ELEMENT[info.dtype], name)
        return constant if info.dtype == "F32" else _named(op.convert(constant, np.float32), name + DECOMPRESSED)

    def linear(self, prefix: str, shape: tuple[int, int], x: Node) -> Node:
        """`x` through a linear of (O, I) without its bias: as integers and scales where it is quantized."""
        weight = self._reader.linear(prefix, shape) if self._reader else None
        if weight is None:
            return op.matmul(x, self.matrix(f"{prefix}.weight"), False, True)
        if weight.smooth_I is not None:
            x = op.multiply(x, self._constant(self._scratch.keep(weight.smooth_I), "f32", f"{prefix}.smooth"))
        scale = None if self._reader is None else self._reader.input_scale(prefix)
        if scale is not None and weight.kind == "int":
            low, high = np.array(-128 * scale, np.float32), np.array(127 * scale, np.float32)
            x = op.fake_quantize(x, low, high, low, high, _INT8_LEVELS)
        if weight.order_I is not None:
            x = op.gather(x, weight.order_I, np.array(-1, np.int64))
        node = self._fp8(prefix, weight) if weight.kind == "float" else self.packed(prefix, weight)
        return op.matmul(x, node, False, True)

    def _fp8(self, prefix: str, weight: QuantizedWeight) -> Node:
        """The graph codes * scale over codes as BF16, which holds E4M3 exactly.

        The plugin folds it into float32 when it loads the engine; constants of FP8 it would convert at every call. The
        CPU has no arithmetic in FP8 either, so that inputs stay as they are, whatever the checkpoint says of them.
        """
        rows, groups = weight.scale_OG.shape
        codes = float32_to_bfloat16(E4M3[weight.codes_OI]).reshape(rows, groups, -1)
        node = op.convert(self._constant(self._scratch.keep(codes), "bf16", f"{prefix}.weight"), np.float32)
        scale = self._constant(self._scratch.keep(weight.scale_OG[:, :, None]), "f32", f"{prefix}.scale")
        return op.reshape(op.multiply(node, scale), np.array(weight.codes_OI.shape, np.int64), False)

    def is_plain(self, prefix: str) -> bool:
        """Whether the checkpoint has a linear as floats."""
        return self._reader is None or self._reader.scheme(prefix) is None

    def packed(self, prefix: str, weight: QuantizedWeight) -> Node:
        """The graph (codes - zero) * scale over constants that hold exactly the integers of `weight`.

        Symmetric: i4 or i8 with the middle already taken off. Asymmetric: u4 or u8 with zero points. Codes of fewer
        bits go in the next wider type. The graph computes in the dtype of the scales; the CPU plugin never rounds to
        it (it multiplies in float32).
        """
        rows, groups = weight.scale_OG.shape
        grouped = groups > 1
        codes = weight.codes_OI.reshape(rows, groups, -1) if grouped else weight.codes_OI
        scale = weight.scale_OG[:, :, None] if grouped else weight.scale_OG
        with np.errstate(over="ignore"):
            half = grouped and bool((scale.astype(np.float16) == scale).all())
        compute = np.float16 if half else np.float32
        symmetric = weight.zero_OG is None
        middle = np.uint8(1 << (weight.bits - 1)) if symmetric else np.uint8(0)
        width = "4" if weight.bits <= 4 else "8"
        element = ("i" if symmetric else "u") + width
        node = op.convert(self._integers(codes - middle, element, f"{prefix}.weight"), compute)
        if weight.zero_OG is not None:
            zero = weight.zero_OG[:, :, None] if grouped else weight.zero_OG
            zero_point = self._integers(zero, "u" + width, f"{prefix}.zero_point")
            node = op.subtract(node, op.convert(zero_point, compute))
        stored = self._scratch.keep(scale.astype(compute))
        node = op.multiply(node, self._constant(stored, "f16" if half else "f32", f"{prefix}.scale"))
        if grouped:
            node = op.reshape(node, np.array(weight.codes_OI.shape, np.int64), False)
        return op.convert(node, np.float32) if half else node

    def rounded(self, name: str, prefix: str) -> Node:
        """The plain matrix `name` [O, I] rounded to int8 with one float32 scale a row, as the linear `prefix`."""
        info = self._checkpoint.tensors[name]
        bits, wide = self._checkpoint.array(name), info.dtype == "BF16"
        codes_OI = np.empty(info.shape, np.uint8)
        scale_OG = np.empty((info.shape[0], 1), np.float32)
        for start in range(0, info.shape[0], _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            values = bfloat16_to_float32(bits[rows]) if wide else bits[rows].astype(np.float32)
            scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
            scale[scale == 0] = 1
            codes_OI[rows] = np.rint(values / scale).clip(-127, 127).astype(np.int8).view(np.uint8) ^ np.uint8(128)
            scale_OG[rows] = scale
        return self.packed(prefix, QuantizedWeight(codes_OI=codes_OI, scale_OG=scale_OG, zero_OG=None, bits=8))

    def _integers(self, codes: np.ndarray, element: str, name: str) -> Node:
        """uint8 codes (two's complement where signed) as a constant; 4-bit ones two to a byte, the first one low."""
        if element.endswith("8"):
            return self._constant(self._scratch.keep(codes), element, name)
        flat = codes.reshape(-1)
        packed = flat[0::2] & np.uint8(15)
        packed[: flat.size // 2] |= flat[1::2] << np.uint8(4)
        return self._constant(self._scratch.keep(packed), element, name, codes.shape)

    def _constant(self, array: np.ndarray, element: str, name: str, shape: tuple[int, ...] | None = None) -> Node:
        """A constant that points at `array`, which the scratch must keep."""
        self.bytes_by_type[element] += array.nbytes
        tensor = ov.Tensor(array, list(array.shape if shape is None else shape), getattr(ov.Type, element))
        return _named(op.constant(tensor), name)


def _named(node: Node, name: str) -> Node:
    node.set_friendly_name(name)
    return node
