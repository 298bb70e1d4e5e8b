"""Write a checkpoint shard by shard, each durable before the next, so that no more than one is ever in memory.

Format: https://huggingface.co/docs/safetensors. The library's own writer makes a second copy of a shard in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch

from llmopt.models.checkpoint import TensorInfo, read_header
from llmopt.models.companions import write_json

#: What can be written: a tensor, or one that lies in a file and is copied from there without passing through memory.
Writable: TypeAlias = torch.Tensor | TensorInfo

_DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_CHUNK = 1 << 23


class CheckpointWriter:
    """Shards are numbered from 1; their count is known before the first."""

    def __init__(self, out: Path, shards: int) -> None:
        self._out, self._shards = out, shards

    def shard(self, number: int) -> Path:
        return self._out / f"model-{number:05d}-of-{self._shards:05d}.safetensors"

    def write(self, number: int, tensors: Mapping[str, Writable]) -> str:
        """Write a shard, all of it or nothing; returns its sha256."""
        return write_safetensors(self.shard(number), tensors)

    def finish(self, config: Mapping[str, Any]) -> int:
        """Write the index and config.json; returns the bytes of all tensors."""
        weight_map: dict[str, str] = {}
        total = 0
        for number in range(1, self._shards + 1):
            found = read_header(self.shard(number))
            weight_map |= dict.fromkeys(found, self.shard(number).name)
            total += sum(info.size for info in found.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self._out / "model.safetensors.index.json", index)
        write_json(self._out / "config.json", config)
        return total


def write_safetensors(file: Path, tensors: Mapping[str, Writable], *, sync: bool = True) -> str:
    """One file, written aside, synced (unless it is not meant to last) and renamed into place; returns its sha256.

    Tensors are ordered by the size of their elements, then by name, as the safetensors library has it: all are aligned.
    """
    described = {name: _describe(value) for name, value in tensors.items()}
    order = sorted(described, key=lambda name: (-described[name][2], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        dtype, shape, _, size = described[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    digest, aside = hashlib.sha256(), file.with_name(file.name + ".part")
    with aside.open("wb") as stream:
        for part in (struct.pack("<Q", len(head)), head):
            digest.update(part)
            stream.write(part)
        for name in order:
            for chunk in _chunks(tensors[name]):
                digest.update(chunk)
                stream.write(chunk)
        if sync:
            stream.flush()
            os.fsync(stream.fileno())
    aside.replace(file)
    return digest.hexdigest()


def _describe(value: Writable) -> tuple[str, list[int], int, int]:
    """Its dtype, shape, bytes of an element and of all."""
    if isinstance(value, TensorInfo):
        count = 1
        for length in value.shape:
            count *= length
        return value.dtype, list(value.shape), value.size // max(1, count), value.size
    return _DTYPES[value.dtype], list(value.shape), value.element_size(), value.numel() * value.element_size()


def _chunks(value: Writable) -> Iterator[memoryview | bytes]:
    if not isinstance(value, TensorInfo):
        flat = value.contiguous().reshape(-1).view(torch.uint8).numpy()
        for start in range(0, len(flat), _CHUNK):
            yield flat[start : start + _CHUNK].data
        return
    with value.file.open("rb", buffering=0) as source:
        source.seek(value.offset)
        left = value.size
        while left:
            data = source.read(min(left, _CHUNK))
            if not data:
                raise OSError(f"`{value.file}` became shorter while it was read")
            left -= len(data)
            yield data
