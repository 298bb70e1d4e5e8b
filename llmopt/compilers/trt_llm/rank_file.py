"""A safetensors file whose tensors come in any order and in runs of rows, so that none of it has to be in memory.

Format: https://huggingface.co/docs/safetensors; tensors lie as `llmopt.models.writer` and the library put them.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from llmopt.formats.base import Part, Stored
from llmopt.models.checkpoint import STORAGE


class RankFile:
    """Written aside; `with` makes it whole, synced and renamed on leaving, or removes it where an error is leaving."""

    def __init__(self, file: Path, parts: Mapping[str, Part]) -> None:
        """`parts`: every tensor that will be put, with its one dtype and shape."""
        self._file, self._parts = file, parts
        self._aside = file.with_name(file.name + ".part")
        self._left = {name: _size(part) for name, part in parts.items()}
        order = sorted(parts, key=lambda name: (-_itemsize(parts[name]), name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets: dict[str, int] = {}
        end = 0
        for name in order:
            offsets[name], end = end, end + self._left[name]
            part = parts[name]
            header[name] = {
                "dtype": part.dtypes[0],
                "shape": list(part.shapes[0]),
                "data_offsets": [offsets[name], end],
            }
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        self._offsets = {name: 8 + len(head) + offset for name, offset in offsets.items()}
        self._stream = self._aside.open("wb", buffering=0)
        self._stream.write(struct.pack("<Q", len(head)) + head)

    def put(self, name: str, stored: Stored, row: int = 0) -> None:
        """Write a tensor, or a run of its rows from `row` on; each byte once."""
        part = self._parts[name]
        shape, array = part.shapes[0], np.ascontiguousarray(stored.array, STORAGE[stored.dtype])
        if stored.dtype != part.dtypes[0] or array.shape[1:] != shape[1:] or row + len(array) > shape[0]:
            raise ValueError(f"{name}: {stored.dtype} {array.shape} at row {row} where the layout has {part}")
        self._left[name] -= array.nbytes
        row_bytes = _size(part) // shape[0]
        self._stream.seek(self._offsets[name] + row * row_bytes)
        data = array.reshape(-1).view(np.uint8).data
        while data:
            data = data[self._stream.write(data) :]

    def __enter__(self) -> RankFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stream:
            if kind is None:
                wrong = [name for name, left in self._left.items() if left]
                if wrong:
                    raise ValueError(f"{self._file.name}: not written once: {wrong[:3]}")
                os.fsync(self._stream.fileno())
        if kind is None:
            self._aside.replace(self._file)
        else:
            self._aside.unlink()


def _itemsize(part: Part) -> int:
    return np.dtype(STORAGE[part.dtypes[0]]).itemsize


def _size(part: Part) -> int:
    return math.prod(part.shapes[0]) * _itemsize(part)
