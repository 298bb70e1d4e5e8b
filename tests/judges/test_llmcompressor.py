"""llmcompressor's environment (its transformers, its compressed-tensors) computes what `llmopt eval` says it does.

Perplexity and KL on held-out text, to four and two digits: a wrong scale or a shifted zero point in a single linear
moves both. Activations in int8 or FP8 are rounded by both sides, and float rounding tips some of them to the next step.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmopt.models.text import read_tokens, windows
from llmopt.profiles import HELDOUT_TEXT

pytestmark = pytest.mark.judge

MODEL = Path(__file__).resolve().parents[2] / "demo" / "model"
CALIBRATION = ("--samples", "8", "--seq-len", "256")
WINDOWS, LENGTH = 8, 256
WEIGHTS = {
    "int4": ("--method", "rtn"),
    "int4, one scale a row": ("--method", "rtn", "--group-size", "-1"),
    "int4, zero points": ("--method", "awq"),
    "int4, groups of 32": ("--method", "gptq", "--group-size", "32"),
    "int4, zero points, GPTQ": ("--method", "gptq", "--asymmetric"),
    "int8": ("--method", "rtn", "--bits", "8"),
    "int8, zero points": ("--method", "rtn", "--bits", "8", "--asymmetric"),
    "int2": ("--method", "gptq", "--bits", "2"),
    "int3": ("--method", "gptq", "--bits", "3"),
    "int5": ("--method", "rtn", "--bits", "5"),
    "int6, zero points": ("--method", "rtn", "--bits", "6", "--asymmetric"),
    "int7": ("--method", "rtn", "--bits", "7"),
}
ACTIVATIONS = {
    "W8A8 dynamic": ("--method", "smoothquant"),
    "W8A8 static": ("--method", "smoothquant", "--activations", "static"),
}


def llmopt(*arguments: object) -> dict[str, Any]:
    """A command of the working tree, run by this environment's Python."""
    ran = subprocess.run(
        [sys.executable, "-m", "llmopt", *map(str, arguments), "--json", "--quiet"], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return dict(json.loads(ran.stdout))


@pytest.fixture(scope="module")
def base_logits() -> torch.Tensor:
    return logits(MODEL)


def logits(folder: Path) -> torch.Tensor:
    """Of the first held-out windows, by the forward pass of this environment's transformers."""
    tokens = windows(read_tokens(MODEL, HELDOUT_TEXT), count=WINDOWS, length=LENGTH, seed=None, what="held-out text")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits


def figures(made: torch.Tensor, base: torch.Tensor) -> tuple[float, float]:
    """Perplexity and KL."""
    tokens = windows(read_tokens(MODEL, HELDOUT_TEXT), count=WINDOWS, length=LENGTH, seed=None, what="held-out text")
    own, other = (torch.log_softmax(each[:, :-1].double(), dim=-1) for each in (made, base))
    target = torch.from_numpy(tokens)[:, 1:, None]
    loss = -own.gather(2, target).mean()
    return math.exp(float(loss)), float((other.exp() * (other - own)).sum(dim=-1).mean())


@pytest.mark.parametrize("name", [*WEIGHTS, *ACTIVATIONS])
def test_llmcompressors_transformers_computes_what_we_evaluate(
    name: str, base_logits: torch.Tensor, tmp_path: Path
) -> None:
    store = ("--store", tmp_path / "store")
    made = llmopt("quantize", MODEL, *{**WEIGHTS, **ACTIVATIONS}[name], *CALIBRATION, *store)
    shape = ("--windows", WINDOWS, "--seq-len", LENGTH)
    ours = llmopt("eval", made["artifact"], "--against", MODEL, *shape, *store)["metrics"]
    perplexity, divergence = figures(logits(Path(made["path"])), base_logits)
    assert perplexity == pytest.approx(ours["perplexity"], rel=1e-4 if name in WEIGHTS else 5e-3)
    assert divergence == pytest.approx(ours["kl_mean"], rel=1e-2 if name in WEIGHTS else 0.2)


def test_this_is_llmcompressors_environment() -> None:
    """Its pins differ from ours, which is why it judges at all."""
    assert importlib.metadata.version("llmcompressor")
