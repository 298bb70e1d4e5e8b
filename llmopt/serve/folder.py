"""The engine folder as the server sees it: what engine.json says, and how much KV cache to reserve."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmopt.errors import LlmoptError
from llmopt.models.companions import read_json

SCHEMA = "llmopt.engine/1"
FILES = (
    "openvino_model.xml",
    "openvino_model.bin",
    "openvino_tokenizer.xml",
    "openvino_detokenizer.xml",
    "config.json",
    "tokenizer.json",
)
BLOCK_TOKENS = 32  # positions in one block of the CPU plugin's paged KV cache


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFolder:
    """What engine.json says, checked. `properties` go to the runtime as they are."""

    path: Path
    max_context_tokens: int  # prompt and completion together
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    properties: Mapping[str, str | int | float | bool]
    kv_bytes_per_token: int  # an upper bound

    @classmethod
    def read(cls, path: Path) -> EngineFolder:
        """Raises LlmoptError for a folder that is not an engine, or not one that this server can run."""
        if not (path / "engine.json").is_file():
            raise LlmoptError(
                f"`{path}` is not an engine: it has no `engine.json`", hint="make one with `llmopt compile MODEL`"
            )
        values = read_json(path / "engine.json")
        if values.get("schema") != SCHEMA:
            raise LlmoptError(
                f"`{path / 'engine.json'}` has the schema `{values.get('schema')}`, not `{SCHEMA}`",
                hint="compile the model again with this version",
            )
        if values.get("target") != "openvino":
            raise LlmoptError(
                f"an engine for `{values.get('target')}` cannot be served here",
                hint="run its `serve.sh` where its GPU is and give the server's URL, or compile for `openvino`",
            )
        for name in FILES:
            if not (path / name).is_file():
                raise LlmoptError(f"the engine `{path}` lacks `{name}`", hint="compile the model again")
        return cls(
            path=path.absolute(),
            max_context_tokens=_field(values, "max_context_tokens", int, path),
            vocab_size=_field(values, "vocab_size", int, path),
            eos_token_ids=tuple(_field(values, "eos_token_ids", list, path)),
            properties=_field(values, "properties", dict, path),
            kv_bytes_per_token=_kv_bytes_per_token(path, _field(values, "properties", dict, path)),
        )

    def kv_blocks(self, max_batch: int, memory_bytes: int) -> int:
        """Blocks of KV cache for `max_batch` full contexts, or for as many as half of `memory_bytes` holds.

        The runtime reserves address space at once and touches pages only when tokens fill them, so a generous
        number costs nothing while the server idles.
        """
        wanted = max_batch * blocks_for(self.max_context_tokens)
        return min(wanted, max(memory_bytes // 2 // (self.kv_bytes_per_token * BLOCK_TOKENS), 2))

    def configuration(self, blocks: int, max_batch: int, cache_dir: Path | None = None) -> dict[str, Any]:
        """What the process that owns the runtime is told, as JSON."""
        return {
            "path": str(self.path),
            "properties": {**self.properties, **({} if cache_dir is None else {"CACHE_DIR": str(cache_dir)})},
            "kv_blocks": blocks,
            "max_batch": max_batch,
            "eos_token_ids": list(self.eos_token_ids),
        }


def blocks_for(tokens: int) -> int:
    """Blocks that a sequence of `tokens` can hold at most: one more than it fills, for the step in flight."""
    return -(-tokens // BLOCK_TOKENS) + 1


def available_bytes() -> int:
    """Memory that new processes can have without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _field(values: Mapping[str, Any], name: str, kind: type, path: Path) -> Any:
    value = values.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise LlmoptError(f"`{path / 'engine.json'}` has no usable `{name}`", hint="compile the model again")
    return value


def _kv_bytes_per_token(path: Path, properties: Mapping[str, Any]) -> int:
    """Keys and values of every layer. u8 caches with their scales stay below the two bytes assumed here."""
    config = read_json(path / "config.json")
    try:
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        values = 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * head_dim
    except (KeyError, TypeError) as error:
        raise LlmoptError(f"`{path / 'config.json'}` has no usable `{error.args[0]}`") from None
    return int(values) * (4 if properties.get("KV_CACHE_PRECISION") == "f32" else 2)
