"""Write a Llama of any size with random weights, one block in memory at a time: for what a trained model is too small.

python tests/bench/generate.py OUT --hidden 2048 --mlp 8192 --layers 16 --heads 32 --kv-heads 8 --vocab 32000
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

TOKENIZER = Path(__file__).resolve().parents[2] / "demo" / "model"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of a Llama; head_dim is hidden / heads."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    positions: int = 2048

    @property
    def block(self) -> dict[str, tuple[int, ...]]:
        """The tensors of a block and their shapes."""
        key = self.hidden // self.heads * self.kv_heads
        return {
            "input_layernorm.weight": (self.hidden,),
            "self_attn.q_proj.weight": (self.hidden, self.hidden),
            "self_attn.k_proj.weight": (key, self.hidden),
            "self_attn.v_proj.weight": (key, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, self.hidden),
            "post_attention_layernorm.weight": (self.hidden,),
            "mlp.gate_proj.weight": (self.mlp, self.hidden),
            "mlp.up_proj.weight": (self.mlp, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.mlp),
        }

    @property
    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.positions,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "dtype": "bfloat16",
            "bos_token_id": None,
            "eos_token_id": 0,
        }


def generate(out: Path, shape: Shape, *, seed: int = 0, shard_bytes: int = 1 << 30) -> int:
    """Write the checkpoint to `out` (made here), shards of at most `shard_bytes`; returns the bytes of its tensors."""
    out.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    total = held = number = 0

    def flush() -> None:
        nonlocal held, number
        number += 1
        file = f"model-{number:05d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()
        held = 0

    for tensors in _parts(shape, seed):
        size = sum(tensor.nbytes for tensor in tensors.values())
        if shard and held + size > shard_bytes:
            flush()
        shard |= tensors
        held, total = held + size, total + size
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (out / "config.json").write_text(json.dumps(shape.config, indent=2), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, out / name)
    return total


def _parts(shape: Shape, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Embedding, blocks, and the rest; weights small enough that no activation grows from block to block."""
    random = torch.Generator().manual_seed(seed)

    def draw(sizes: tuple[int, ...]) -> torch.Tensor:
        if len(sizes) == 1:
            return torch.ones(sizes, dtype=torch.bfloat16)
        return torch.empty(sizes, dtype=torch.bfloat16).normal_(0.0, sizes[1] ** -0.5, generator=random)

    yield {"model.embed_tokens.weight": draw((shape.vocab, shape.hidden))}
    for index in range(shape.layers):
        yield {f"model.layers.{index}.{name}": draw(sizes) for name, sizes in shape.block.items()}
    yield {"model.norm.weight": draw((shape.hidden,)), "lm_head.weight": draw((shape.vocab, shape.hidden))}


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a Llama with random weights.")
    parser.add_argument("out", type=Path, help="folder to make")
    for name in ("hidden", "mlp", "layers", "heads", "kv-heads", "vocab"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    values = vars(parser.parse_args())
    out, seed = values.pop("out"), values.pop("seed")
    print(f"{generate(out, Shape(**values), seed=seed) / 1e9:.2f} GB in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
