"""A Llama-shaped model of one billion parameters, random weights: CPU seconds and memory beside llmcompressor's.

LLMOPT_BENCH_LAYERS (16) sets the number of blocks: with fewer, the ratio of CPU seconds is that of so many blocks,
and so is memory, of which a streaming quantizer needs no more for more blocks.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from comparison import KEPT, Comparison, table
from generate import Shape, generate

pytestmark = [pytest.mark.peers, pytest.mark.timeout(4 * 3600)]

LAYERS = int(os.environ.get("LLMOPT_BENCH_LAYERS", "16"))
SHAPE = Shape(hidden=2048, mlp=8192, layers=LAYERS, heads=32, kv_heads=8, vocab=32000)
W4A16 = {"targets": "Linear", "ignore": ["lm_head"], "scheme": "W4A16"}
PLAIN = ("--method", "gptq", "--no-compensate", "--sweeps", "0", "--samples", "32", "--seq-len", "512")


def test_a_billion_parameters(tmp_path: Path) -> None:
    model = tmp_path / "model"
    size = generate(model, SHAPE)
    comparison = Comparison(KEPT, fresh=bool(os.environ.get("LLMOPT_BENCH_FRESH")))
    ids = comparison.ids(model, samples=32, seq_len=512, seed=0)
    recipe = {"recipe": [["GPTQModifier", W4A16]], "batch": 1}
    rows = {
        "llmcompressor GPTQ": comparison.peer("llmcompressor", model, ids, recipe, evaluate=False),
        "llmopt GPTQ plain": comparison.ours(model, PLAIN, evaluate=False),
    }
    theirs, ours = rows.values()
    print(f"\n{LAYERS} blocks, {size / 1e9:.2f} GB; W4 g128 symmetric, 32 x 512 tokens")
    print(table(rows, against="llmcompressor GPTQ"))
    print(f"peak memory: {ours.peak_bytes / theirs.peak_bytes:.2f} of llmcompressor's")
    assert ours.peak_bytes <= theirs.peak_bytes / 2
