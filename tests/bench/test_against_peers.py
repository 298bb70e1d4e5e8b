"""Ours against the other quantizers on the same token ids, one thread each: the tables of docs/decisions/0012.

`make bench-quantize` installs the peers. What is asserted are the figures that the project set itself; each test prints
its table first.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from comparison import KEPT, Comparison, Figures, table

pytestmark = [pytest.mark.peers, pytest.mark.timeout(7200)]

LINEARS = {"targets": "Linear", "ignore": ["lm_head"]}


def w4(observer: str) -> dict[str, Any]:
    """llmcompressor's W4A16 with groups of 128, symmetric, with an observer for the scales."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    return {
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**weights, "observer": observer}}},
    }


GPTQMODEL = {"bits": 4, "group_size": 128, "offload_to_disk": False, "desc_act": False, "mse": 2.4}
#: W4 g128 symmetric, 128 x 512 tokens: the ways of the peers that are worth a comparison.
PEERS_W4: dict[str, tuple[str, dict[str, Any]]] = {
    "llmcompressor GPTQ": ("llmcompressor", {"recipe": [["GPTQModifier", w4("memoryless_minmax")]], "batch": 8}),
    "llmcompressor GPTQ mse": ("llmcompressor", {"recipe": [["GPTQModifier", w4("memoryless_mse")]], "batch": 8}),
    "llmcompressor AWQ + GPTQ mse": (
        "llmcompressor",
        {"recipe": [["AWQModifier", {}], ["GPTQModifier", w4("memoryless_mse")]], "batch": 8},
    ),
    "GPTQModel GPTQ mse": ("gptqmodel", {"config": GPTQMODEL, "batch": 8}),
    "GPTQModel GPTAQ mse": ("gptqmodel", {"config": {**GPTQMODEL, "gptaq": {"alpha": 0.25}}, "batch": 8}),
    "auto-round": ("autoround", {"config": {"scheme": "W4A16"}}),
}
if only := os.environ.get("LLMOPT_BENCH_PEERS"):  # "llmcompressor", say
    PEERS_W4 = {name: run for name, run in PEERS_W4.items() if run[0] in only.split(",")}
OURS_W4 = {
    "llmopt GPTQ plain": ["--method", "gptq", "--no-compensate", "--sweeps", "0"],
    "llmopt GPTQ fast": ["--method", "gptq", "--no-compensate", "--sweeps", "1"],
    "llmopt GPTQ": ["--method", "gptq"],
    "llmopt AWQ + GPTQ": ["--method", "gptq", "--scaling", "awq"],
    "llmopt AWQ + GPTQ, bits chosen": ["--method", "gptq", "--scaling", "awq", "--target-bpw", "4.127"],
}
AWQ_SAMPLES = 16  # of 512 tokens; llmcompressor takes four and a half minutes of CPU for 128


@dataclass(frozen=True)
class Case:
    """A model and a choice of calibration windows, and what all runs share."""

    name: str
    model: Path
    seed: int
    comparison: Comparison

    def ids(self, samples: int) -> Path:
        return self.comparison.ids(self.model, samples=samples, seq_len=512, seed=self.seed)

    def ours(self, *arguments: str, samples: int = 128) -> Figures:
        shared = ("--samples", str(samples), "--seq-len", "512", "--seed", str(self.seed))
        return self.comparison.ours(self.model, (*arguments, *shared))

    def peer(self, peer: str, settings: dict[str, Any], samples: int = 128) -> Figures:
        return self.comparison.peer(peer, self.model, self.ids(samples), settings)


@pytest.fixture(scope="session")
def comparison() -> Comparison:
    return Comparison(KEPT, fresh=bool(os.environ.get("LLMOPT_BENCH_FRESH")))


@pytest.fixture(params=["demo-0", "demo-1", "outliers-0", "outliers-1"])
def case(request: pytest.FixtureRequest, comparison: Comparison, demo_model: Path, outlier_model: Path) -> Case:
    model, seed = request.param.split("-")
    return Case(request.param, demo_model if model == "demo" else outlier_model, int(seed), comparison)


def gptq_runs(case: Case) -> dict[str, Figures]:
    """All runs at W4 g128 symmetric: the same size but for scales' dtypes and headers."""
    theirs = {name: case.peer(peer, settings) for name, (peer, settings) in PEERS_W4.items()}
    return theirs | {name: case.ours(*arguments) for name, arguments in OURS_W4.items()}


def show(case: Case, what: str, rows: dict[str, Figures], against: str) -> None:
    print(f"\n{what}, {case.name}; ratios to {against}\n{table(rows, against=against)}")


def kl(figures: Figures) -> float:
    assert figures.kl_mean is not None
    return figures.kl_mean


def test_gptq_takes_a_third_of_the_cpu_and_stays_as_near(case: Case) -> None:
    rows = gptq_runs(case)
    theirs = rows["llmcompressor GPTQ mse"]
    show(case, "W4 g128 symmetric, 128 x 512 tokens", rows, "llmcompressor GPTQ mse")
    assert rows["llmopt GPTQ fast"].core_cpu_s <= theirs.core_cpu_s / 3
    for name in OURS_W4.keys() - {"llmopt GPTQ plain"}:
        assert kl(rows[name]) <= kl(theirs), name


def test_the_best_recipe_stays_nearer_than_any_peers(case: Case) -> None:
    rows = gptq_runs(case)
    best_peer = min(PEERS_W4, key=lambda name: kl(rows[name]))
    best = min(OURS_W4, key=lambda name: kl(rows[name]))
    print(f"\n{case.name}: {best} {kl(rows[best]):.6f}, {best_peer} {kl(rows[best_peer]):.6f}")
    assert rows[best].model_bytes <= rows[best_peer].model_bytes * 1.01
    assert kl(rows[best]) <= kl(rows[best_peer]) * 0.75


def test_awq_takes_a_third_of_the_cpu_and_stays_as_near(case: Case) -> None:
    recipe = [["AWQModifier", {}], ["QuantizationModifier", {**LINEARS, "scheme": "W4A16_ASYM"}]]
    theirs = case.peer("llmcompressor", {"recipe": recipe, "batch": 8}, AWQ_SAMPLES)
    ours = case.ours("--method", "awq", samples=AWQ_SAMPLES)
    rows = {"llmcompressor AWQ": theirs, "llmopt AWQ": ours}
    show(case, f"W4 g128 asymmetric, {AWQ_SAMPLES} x 512 tokens", rows, "llmcompressor AWQ")
    assert ours.core_cpu_s <= theirs.core_cpu_s / 3
    assert kl(ours) <= kl(theirs)


def test_smoothquant_takes_half_the_cpu_and_stays_as_near(case: Case) -> None:
    smooth = ["SmoothQuantModifier", {"smoothing_strength": 0.5}]
    theirs = {
        f"llmcompressor SmoothQuant + {name}": case.peer(
            "llmcompressor", {"recipe": [smooth, [modifier, {**LINEARS, "scheme": "W8A8"}]], "batch": 8}
        )
        for name, modifier in (("RTN", "QuantizationModifier"), ("GPTQ", "GPTQModifier"))
    }
    ours = case.ours("--method", "smoothquant")
    rows = {**theirs, "llmopt SmoothQuant": ours}
    show(case, "W8A8 dynamic, 128 x 512 tokens", rows, "llmcompressor SmoothQuant + RTN")
    assert ours.core_cpu_s <= theirs["llmcompressor SmoothQuant + RTN"].core_cpu_s / 2
    assert kl(ours) <= kl(theirs["llmcompressor SmoothQuant + RTN"])


def test_transformers_agrees_with_the_evaluator(comparison: Comparison, demo_model: Path) -> None:
    """The one figure that all are judged by, computed once more by another library's forward pass."""
    import torch
    from transformers import AutoModelForCausalLM

    from llmopt.models.text import read_tokens, windows
    from llmopt.profiles import HELDOUT_TEXT

    ids_file = comparison.ids(demo_model, samples=128, seq_len=512, seed=0)
    peer, settings = PEERS_W4["llmcompressor GPTQ mse"]
    expected = comparison.peer(peer, demo_model, ids_file, settings).kl_mean
    tokens = windows(read_tokens(demo_model, HELDOUT_TEXT), count=64, length=512, seed=None, what="held-out text")
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (demo_model, comparison.checkpoint(peer, demo_model, ids_file, settings))
    ]
    total = 0.0
    with torch.no_grad():
        for row in torch.from_numpy(tokens).split(4):
            base, made = (torch.log_softmax(model(row).logits[:, :-1], dim=-1) for model in models)
            total += float((base.exp() * (base - made)).sum())
    assert total / (64 * 511) == pytest.approx(expected, rel=0.01)
