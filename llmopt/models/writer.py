"""Write a checkpoint shard by shard, so that no more than one block is ever in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class CheckpointWriter:
    """Shards are numbered in the order in which they come; their count is known before the first."""

    def __init__(self, out: Path, shards: int) -> None:
        self._out, self._shards = out, shards
        self._weight_map: dict[str, str] = {}
        self._total_bytes = 0

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the next shard."""
        from safetensors.torch import save_file

        number = len(set(self._weight_map.values())) + 1
        name = f"model-{number:05d}-of-{self._shards:05d}.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, self._out / name, metadata={"format": "pt"})
        self._weight_map |= dict.fromkeys(tensors, name)
        self._total_bytes += sum(t.numel() * t.element_size() for t in tensors.values())

    def finish(self, config: Mapping[str, Any]) -> int:
        """Write the index and config.json; returns the bytes of all tensors."""
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(self._weight_map.items()))}
        write_json(self._out / "model.safetensors.index.json", index)
        write_json(self._out / "config.json", config)
        return self._total_bytes


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
