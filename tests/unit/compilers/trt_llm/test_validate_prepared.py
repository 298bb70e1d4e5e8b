"""What the target prepares carries its digests, and no bit of it can change unnoticed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from llmopt import compilers
from llmopt.artifacts.outcome import silent
from llmopt.compilers.base import Staged
from llmopt.compilers.inspection import CHECKSUMS
from llmopt.compilers.trt_llm.validate import validate
from llmopt.errors import CorruptError


@pytest.mark.parametrize(
    ("weights", "settings"),
    [("checkpoint", {"mode": "engine", "tensor_parallel": 2, "pipeline_parallel": 2}), ("model", {"mode": "bundle"})],
)
def test_every_flipped_bit_is_found(
    make_checkpoint: Any, tmp_path: Path, weights: str, settings: dict[str, Any]
) -> None:
    model = make_checkpoint("llama")
    target = compilers.resolve({"target": "tensorrt-llm", "version": "1.2.1", "max_seq_len": 256, **settings})
    assert isinstance(target, Staged)
    plan, out = tmp_path / "plan", tmp_path / "out"
    plan.mkdir()
    out.mkdir()
    target.plan(model, plan, silent)
    validated = target.prepare(model, plan, out, silent).metrics["validated"]
    assert isinstance(validated, dict)
    assert validated["digests"] == validate(out).digests
    draw = random.Random(0)
    for file in sorted((out / weights).iterdir()):
        if file.name == CHECKSUMS:
            continue
        data = file.read_bytes()
        for _ in range(12):
            place, bit = draw.randrange(len(data)), 1 << draw.randrange(8)
            file.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
            with pytest.raises(CorruptError):
                validate(out)
        file.write_bytes(data)
    validate(out)
