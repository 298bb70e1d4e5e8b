"""Our TensorRT-LLM checkpoints against manifests of ModelOpt's; tests/judges/test_modelopt_engine.py made them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from llmopt.compilers.trt_llm.validate import validate

sys.path.insert(0, str(Path(__file__).parent))
from modelopt_cases import CASES, GOLDEN, differences, manifest, write_ours


@pytest.mark.parametrize("name", CASES)
def test_our_checkpoint_is_what_modelopt_writes(name: str, tmp_path: Path) -> None:
    """Names, shapes, dtypes and config.json; and every byte where the method only rounds to nearest."""
    out = write_ours(CASES[name], tmp_path)
    validate(out)
    assert differences(json.loads(GOLDEN.read_text())[name], manifest(out, digests=True)) == []
