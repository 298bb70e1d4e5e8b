"""Sensitivities against autograd on the whole model, and predicted against measured KL."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmopt.artifacts.outcome import silent
from llmopt.formats.dequantized import load_block, load_head
from llmopt.formats.scheme import Scheme
from llmopt.models.checkpoint import Checkpoint
from llmopt.models.config import DecoderConfig
from llmopt.models.decoder import embed, final_norm, logits, position_tables
from llmopt.models.parallel import Workers
from llmopt.models.text import read_tokens
from llmopt.quantizers.base import Grid, grouped
from llmopt.quantizers.budget import fused
from llmopt.quantizers.gptq import factorize, gptq
from llmopt.quantizers.rtn import rtn
from llmopt.quantizers.sensitivity import (
    candidate_costs,
    measure_costs,
    sample_fisher,
    sensitivities,
)

DEMO = Path(__file__).resolve().parents[3] / "demo" / "model"


def scheme(bits: int, symmetric: bool = True) -> Scheme:
    return Scheme(bits=bits, group_size=128, symmetric=symmetric)


def opened(model: Path) -> tuple[Checkpoint, DecoderConfig]:
    checkpoint = Checkpoint.open(model)
    return checkpoint, DecoderConfig.read(checkpoint)


def some_windows(config: DecoderConfig, count: int, tokens: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(0)).integers(0, config.vocab_size, (count, tokens))


def fishers(model: Path, windows: np.ndarray, spill: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Of every linear, the sum of g^2 over tokens."""
    with Workers() as workers:
        found = sensitivities(*opened(model), windows, workers, silent, spill=spill, **options)
        return {name: fisher_O for _, felt in found for name, fisher_O in felt.fisher_O.items()}


def test_samples_have_the_covariance_of_the_softmax() -> None:
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0])
    p_V = logits_V.softmax(dim=0)
    samples_NV = sample_fisher(logits_V.expand(100_000, -1), torch.Generator().manual_seed(0))
    covariance_VV = samples_NV.T @ samples_NV / len(samples_NV)
    torch.testing.assert_close(covariance_VV, p_V.diag() - torch.outer(p_V, p_V), atol=3e-3, rtol=0)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "phi3"])
def test_gradients_are_those_of_the_whole_model(
    make_checkpoint: Callable[..., Path], model_type: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_checkpoint(model_type, tie_word_embeddings=False)
    windows = some_windows(opened(folder)[1], 2, 48)
    found = fishers(folder, windows, tmp_path, head=True)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    outputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, __, y, name=name: outputs.update({name: y}))
    logits_NV = model(torch.from_numpy(windows)).logits.flatten(0, 1)
    seed = int(np.random.SeedSequence([0, 0]).generate_state(1)[0])
    sample_NV = sample_fisher(logits_NV.detach(), torch.Generator().manual_seed(seed))
    gradients = torch.autograd.grad(logits_NV, list(outputs.values()), sample_NV)
    squares = {name: g.flatten(0, 1).square() for name, g in zip(outputs, gradients, strict=True)}
    assert found.keys() == squares.keys()
    for name, square_NO in squares.items():
        fisher_O = square_NO.sum(dim=0)
        torch.testing.assert_close(found[name], fisher_O, rtol=2e-3, atol=1e-4 * float(fisher_O.max()))


def test_the_number_of_cores_changes_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = some_windows(opened(tiny)[1], 80, 64)  # three batches
    found = []
    for cores in (1, 2):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cores: set(range(n)))
        found.append(fishers(tiny, windows, tmp_path))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_nothing_is_left_on_the_disk(tiny: Path, tmp_path: Path) -> None:
    fishers(tiny, some_windows(opened(tiny)[1], 2, 16), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_predicted_kl_is_that_of_the_perturbed_model(text: Path, tmp_path: Path) -> None:
    """Of a trained model, each site rounded alone."""
    checkpoint, config = opened(DEMO)
    windows = read_tokens(DEMO, text)[: 16 * 128].reshape(16, 128)
    groups = fused(config)
    candidates = {name: [scheme(4)] for linears in groups.values() for name in linears}
    with Workers() as workers:
        costs = measure_costs(checkpoint, config, candidates, windows, workers, silent, spill=tmp_path, factorize=None)
    base = log_probabilities(checkpoint, config, windows)
    for group in ("model.layers.0.down", "model.layers.2.o", "model.layers.2.qkv", "model.layers.4.gate_up"):
        predicted = sum(costs[name][scheme(4)] for name in groups[group])
        ours = log_probabilities(checkpoint, config, windows, groups[group])
        measured = float((base.exp() * (base - ours)).sum(dim=-1).mean())
        assert predicted == pytest.approx(measured, rel=0.4), group


@torch.no_grad()
def log_probabilities(
    checkpoint: Checkpoint, config: DecoderConfig, windows: np.ndarray, rounded: tuple[str, ...] = ()
) -> torch.Tensor:
    """Of the model with these linears rounded to four bits, all inputs weighing equally; float64."""
    x_BTH = embed(checkpoint, config, torch.from_numpy(windows))
    for index in range(config.layers):
        block = load_block(checkpoint, config, None, index)
        for name in rounded:
            if name.startswith(f"{config.block(index)}."):
                tensor = name.removeprefix(f"{config.block(index)}.") + ".weight"
                weight_OGS = grouped(block.tensors[tensor], scheme(4))
                grid = Grid.fit(weight_OGS, scheme(4), torch.ones(weight_OGS.shape[1:]))
                block.tensors[tensor] = rtn(block.tensors[tensor], scheme(4), grid).dequantize()
        x_BTH = block.forward(x_BTH, position_tables(config, windows.shape[1]))
    found = logits(final_norm(checkpoint, config)(x_BTH), load_head(checkpoint, config, None), config)
    return found.log_softmax(dim=-1).double()


def inputs(tokens: int = 4000, features: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shared_NI = torch.randn(tokens, 24, generator=generator) @ torch.randn(24, features, generator=generator)
    return shared_NI + torch.randn(tokens, features, generator=generator)


def weights(rows: int = 64, features: int = 256) -> torch.Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_cost_with_feedback_is_that_of_gptq(symmetric: bool) -> None:
    x_NI, weight_OI = inputs(), weights()
    hessian_II, fisher_O = x_NI.T @ x_NI / len(x_NI), torch.linspace(0.1, 3, 64)
    curvature = factorize(hessian_II, damping=0.01, act_order=True)
    assert curvature is not None
    schemes = [scheme(bits, symmetric) for bits in (2, 3, 4, 6, 8)]
    for each, cost in zip(schemes, candidate_costs(weight_OI, hessian_II, fisher_O, schemes, curvature), strict=True):
        error_OI = gptq(weight_OI, curvature, each, act_order=True).dequantize() - weight_OI
        actual = 0.5 * float((((error_OI @ hessian_II) * error_OI).sum(dim=1) * fisher_O).sum())
        assert cost == pytest.approx(actual, rel=0.25)
        (nearest,) = candidate_costs(weight_OI, hessian_II, fisher_O, [each], None)
        assert nearest > 1.5 * actual


def test_feedback_gains_nothing_where_inputs_are_uncorrelated() -> None:
    curvature = factorize(torch.eye(256), damping=0.0, act_order=True)
    with_feedback, nearest = (
        candidate_costs(weights(), torch.eye(256), torch.ones(64), [scheme(4)], c) for c in (curvature, None)
    )
    assert with_feedback == pytest.approx(nearest, rel=1e-5)


def test_each_bit_costs_less_and_plain_weights_cost_nothing() -> None:
    schemes = [*(scheme(bits) for bits in range(2, 9)), None]
    costs = candidate_costs(weights(), torch.eye(256), torch.ones(64), schemes, None)
    assert all(more < less for less, more in itertools.pairwise(costs))
    assert costs[-1] == 0


def test_some_rows_stand_for_all_of_a_large_linear() -> None:
    x_NI, weight_OI = inputs(), weights(rows=2500)
    hessian_II, fisher_O = x_NI.T @ x_NI / len(x_NI), torch.linspace(0.1, 3, 2500)
    (cost,) = candidate_costs(weight_OI, hessian_II, fisher_O, [scheme(3)], None)
    parts = zip(weight_OI.split(500), fisher_O.split(500), strict=True)
    exact = sum(candidate_costs(w, hessian_II, f, [scheme(3)], None)[0] for w, f in parts)
    assert cost == pytest.approx(exact, rel=0.03)


def test_inputs_that_never_occur_cost_nothing() -> None:
    x_NI = inputs()
    x_NI[:, :128] = 0
    hessian_II = x_NI.T @ x_NI / len(x_NI)
    curvature = factorize(hessian_II, damping=0.01, act_order=True)
    weight_OI = weights()
    weight_OI[:, 128:] = 0
    for c in (curvature, None):
        assert candidate_costs(weight_OI, hessian_II, torch.ones(64), [scheme(2)], c) == [0.0]


def test_costs_are_measured_for_the_linears_that_are_asked_for(tiny: Path, tmp_path: Path) -> None:
    checkpoint, config = opened(tiny)
    candidates = {"model.layers.1.mlp.up_proj": [scheme(2), None]}
    method = partial(factorize, damping=0.01, act_order=True)
    with Workers() as workers:
        windows = some_windows(config, 4, 64)
        costs = measure_costs(
            checkpoint, config, candidates, windows, workers, silent, spill=tmp_path, factorize=method
        )
    assert costs.keys() == candidates.keys()
    found = costs["model.layers.1.mlp.up_proj"]
    assert found[scheme(2)] > 0
    assert found[None] == 0


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "falcon", "gpt_neox", "opt"])
def test_every_linear_of_a_family_has_a_cost(
    make_checkpoint: Callable[..., Path], model_type: str, tmp_path: Path
) -> None:
    checkpoint, config = opened(make_checkpoint(model_type))
    linears = [name for group in fused(config).values() for name in group]
    with Workers() as workers:
        costs = measure_costs(
            checkpoint,
            config,
            dict.fromkeys(linears, (Scheme(bits=4, group_size=32, symmetric=True),)),
            some_windows(config, 4, 64),
            workers,
            silent,
            spill=tmp_path,
            factorize=partial(factorize, damping=0.01, act_order=True),
        )
    assert costs.keys() == set(linears)
    assert all(cost >= 0 for found in costs.values() for cost in found.values())
