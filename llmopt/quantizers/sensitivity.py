"""How much the model's distribution feels an error at each linear's output, and so what each rounding would cost.

For a small error dy of a linear's outputs, KL(model, model + dy) summed over all positions is 1/2 dy^T F dy, F being
the Fisher information of the model's own distribution at these outputs. F is the covariance of g = J^T v, where J takes
the outputs to the logits and v is random with the covariance diag(p) - p p^T of the softmax p. The textbook's v is
`onehot(sampled token) - p` (Martens, arXiv:1412.1193, section 9.2); ours is sqrt(p) e - p (sqrt(p) . e) with random
signs e: the same covariance, without the rare and large samples where the model is sure of itself.
Of F the diagonal is kept, averaged over tokens.

The forward pass leaves each block's inputs on disk; backwards, a block is read again, run with gradients and freed.
So memory holds one block and the activations of the windows at one place. Shape suffixes as in base.py, and B windows,
T tokens of each, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmopt.artifacts.outcome import Progress
from llmopt.formats.dequantized import load_block, load_head
from llmopt.formats.scheme import Scheme
from llmopt.models.checkpoint import Checkpoint
from llmopt.models.config import DecoderConfig
from llmopt.models.decoder import DecoderBlock, PositionTables, embed, final_norm, logits, position_tables
from llmopt.models.parallel import Workers
from llmopt.quantizers.base import Each, Grid, Statistics, grouped
from llmopt.quantizers.budget import bit_candidates, choose
from llmopt.quantizers.gptq import Curvature
from llmopt.quantizers.methods import curvature_of
from llmopt.quantizers.rtn import rtn
from llmopt.quantizers.settings import QuantizeSettings

_BATCH_TOKENS = 2048  # of one pass through a block; fixed, so that the sums never depend on the machine
_HEAD_TOKENS = 512  # logits held at once
_WINDOWS = 32  # on which costs are measured
_ROWS = 512  # of a linear, evenly spaced, whose rounding is tried


@dataclass(frozen=True, slots=True)
class _Part:
    """What the backward pass leaves of one site and one batch: its input x_NI and, by linear, the sum of g^2."""

    x_NI: torch.Tensor
    fisher_O: dict[str, torch.Tensor]

    @classmethod
    def of(cls, x: torch.Tensor, gradients: Mapping[str, torch.Tensor]) -> _Part:
        """x [..., I] is the site's input, `gradients` [..., O] those at its linears' outputs."""
        fisher_O = {name: g.square().reshape(-1, g.shape[-1]).sum(dim=0) for name, g in gradients.items()}
        return cls(x.reshape(-1, x.shape[-1]), fisher_O)


@dataclass(slots=True)
class Felt:
    """What the backward pass leaves of one site: its input's statistics and, by linear, the sum of g^2 over tokens."""

    statistics: Statistics = field(default_factory=Statistics)
    fisher_O: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, part: _Part, each: Each) -> None:
        """Take in the next batch, in place. The caller fixes the order, which fixes the bytes."""
        self.statistics.take(part.x_NI, frozenset({"hessian"}), each=each)
        for name, square_O in part.fisher_O.items():
            self.fisher_O[name] = self.fisher_O[name] + square_O if name in self.fisher_O else square_O


@dataclass
class _Watched(DecoderBlock):
    """A block that remembers what went into and came out of its linears."""

    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = super().linear(name, x)
        self.seen[name] = (x.detach(), y)
        return y


def choose_bits(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    settings: QuantizeSettings,
    windows: np.ndarray,
    workers: Workers,
    progress: Progress,
    *,
    spill: Path,
) -> dict[str, Any]:
    """The bits of each linear that keep the model nearest within `target_bpw`, judged on the first windows.

    `picked`: by linear, which of its `budget.bit_candidates`; those that `overrides` names have one. `choice`: for the
    manifest. spill: as for `sensitivities`.
    """
    assert settings.common.target_bpw is not None
    table, some = bit_candidates(config, settings), windows[:_WINDOWS]
    feedback = curvature_of(settings.method)
    costs = measure_costs(checkpoint, config, table.schemes, some, workers, progress, spill=spill, factorize=feedback)
    choice = choose(table.groups, costs, table.sizes, table.weights, settings.common.target_bpw)
    for line in choice.markdown().splitlines():
        progress(line)
    picked = {name: table.schemes[name].index(scheme) for name, scheme in choice.schemes.items()}
    return {"picked": picked, "choice": choice.to_json()}


def measure_costs(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    candidates: Mapping[str, Sequence[Scheme | None]],
    windows: np.ndarray,
    workers: Workers,
    progress: Progress,
    *,
    spill: Path,
    factorize: Callable[[torch.Tensor], Curvature | None] | None,
) -> dict[str, dict[Scheme | None, float]]:
    """The KL, in nats a token, that each candidate of each linear is predicted to cost by itself.

    candidates: by the linear's full name, the head's too if it is to be quantized; None stands for plain weights.
    windows: token ids [B, T]. factorize: how the method prepares a Hessian, None for methods that round to nearest.
    spill: as for `sensitivities`.
    """
    costs: dict[str, dict[Scheme | None, float]] = {}
    head = config.family.head in candidates
    for weights_OI, felt in sensitivities(checkpoint, config, windows, workers, progress, spill=spill, head=head):
        costs |= _site_costs(weights_OI, felt, candidates, windows.size, workers, factorize)
    return costs


def _site_costs(
    weights_OI: Mapping[str, torch.Tensor],
    felt: Felt,
    candidates: Mapping[str, Sequence[Scheme | None]],
    tokens: int,
    workers: Workers,
    factorize: Callable[[torch.Tensor], Curvature | None] | None,
) -> dict[str, dict[Scheme | None, float]]:
    """`tokens` counts those of the windows, of which the site may have seen a part or nothing."""
    assert felt.statistics.hessian_II is not None
    hessian_II = felt.statistics.hessian_II / max(felt.statistics.tokens, 1)
    curvature = None if factorize is None else factorize(hessian_II)
    names = [name for name in weights_OI if name in candidates]

    def price(name: str) -> list[float]:
        fisher_O = felt.fisher_O[name] / tokens
        return candidate_costs(weights_OI[name], hessian_II, fisher_O, candidates[name], curvature)

    found = zip(names, workers.map(price, names), strict=True)
    return {name: dict(zip(candidates[name], costs, strict=True)) for name, costs in found}


def candidate_costs(
    weight_OI: torch.Tensor,
    hessian_II: torch.Tensor,
    fisher_O: torch.Tensor,
    schemes: Sequence[Scheme | None],
    curvature: Curvature | None,
) -> list[float]:
    """1/2 sum over o of fisher_O (E H E^T)_oo for each scheme, E being the error of rounding to it; None costs nothing.

    hessian_II: mean of x x^T over tokens. fisher_O: mean of g^2. With `curvature`, the error is that of rounding with
    feedback (GPTQ), predicted without running it: what a column's error e costs once the columns after it have made
    the best of it is e^2 / U_ii^2, U being the factor of the inverse Hessian (Frantar et al., arXiv:2210.17323,
    equation 2). Large linears are judged by some of their rows.
    """
    some = slice(None, None, -(-len(weight_OI) // _ROWS))
    rows_OI, rows_fisher_O = weight_OI[some], fisher_O[some]
    scale = float(fisher_O.sum()) / max(float(rows_fisher_O.sum()), 1e-30)
    diagonal_I = hessian_II.diagonal()
    if curvature is not None:
        price_I = torch.empty_like(diagonal_I)
        price_I[curvature.order_P] = curvature.factor_PP.diagonal() ** -2
        price_I[diagonal_I == 0] = 0
    costs = []
    for scheme in schemes:
        if scheme is None:
            costs.append(0.0)
            continue
        grid = Grid.fit(grouped(rows_OI, scheme), scheme, diagonal_I.reshape(scheme.groups(len(diagonal_I)), -1))
        error_OI = rtn(rows_OI, scheme, grid).dequantize() - rows_OI
        pushed_OI = error_OI @ hessian_II if curvature is None else error_OI * price_I
        costs.append(0.5 * scale * float(((pushed_OI * error_OI).sum(dim=1) * rows_fisher_O).sum()))
    return costs


def sensitivities(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    windows: np.ndarray,
    workers: Workers,
    progress: Progress,
    *,
    spill: Path,
    head: bool = False,
    seed: int = 0,
) -> Iterator[tuple[dict[str, torch.Tensor], Felt]]:
    """Every site, the last block's first: its linears' original weights by their full names, and what is felt there.

    windows: token ids [B, T]. spill: an empty folder for the blocks' inputs (layers * B * T * H float32), which are
    deleted as they are used. head: begin with the output head. seed: of the random signs. The figures are the same on
    any number of cores.
    """
    tables = position_tables(config, windows.shape[1])
    parts = torch.split(torch.from_numpy(windows), max(1, _BATCH_TOKENS // windows.shape[1]))
    batches = [embed(checkpoint, config, part) for part in parts]
    for index in range(config.layers):
        for number, x_BTH in enumerate(batches):
            np.save(_file(spill, index, number), x_BTH.numpy())
        block = load_block(checkpoint, config, None, index)
        batches = list(workers.map(lambda x, block=block: block.forward(x, tables), batches))  # type: ignore[misc]
        checkpoint.release()
        progress(f"sensitivity: block {index + 1}/{config.layers} forwards")
    gradients, at_head = _back_through_head(checkpoint, config, batches, workers, seed)
    del batches
    if head:
        yield {config.family.head: load_head(checkpoint, config, None)}, at_head
    for index in reversed(range(config.layers)):
        block = load_block(checkpoint, config, None, index)
        felt = {site.name: Felt() for site in config.sites(index)}

        def back(number: int, index: int = index, block: DecoderBlock = block) -> tuple[torch.Tensor, dict[str, _Part]]:
            x_BTH = torch.from_numpy(np.load(_file(spill, index, number)))
            return _back_through_block(block, x_BTH, gradients[number], tables, config.block(index))

        for number, (gradient_BTH, seen) in enumerate(workers.map(back, range(len(gradients)), grad=True)):
            gradients[number] = gradient_BTH
            for name, part in seen.items():
                felt[name].add(part, workers.map)
            _file(spill, index, number).unlink()
        checkpoint.release()
        progress(f"sensitivity: block {index + 1}/{config.layers} backwards")
        for site in felt.values():
            site.statistics.finish()
            prefix = f"{config.block(index)}."
            yield {name: block.tensors[f"{name.removeprefix(prefix)}.weight"] for name in site.fisher_O}, site


def _file(spill: Path, index: int, number: int) -> Path:
    return spill / f"block-{index}-batch-{number}.npy"


def _back_through_head(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    batches: list[torch.Tensor],
    workers: Workers,
    seed: int,
) -> tuple[list[torch.Tensor], Felt]:
    """J^T v at the last block's outputs for one random v a token, and what is felt at the head itself."""
    norm = final_norm(checkpoint, config)
    head_VH = load_head(checkpoint, config, None)

    def back(number: int) -> tuple[torch.Tensor, _Part]:
        x_BTH, fisher_V, inputs = batches[number], torch.zeros(len(head_VH)), []
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))
        found: list[torch.Tensor] = []
        for x_NH in torch.split(x_BTH.reshape(-1, x_BTH.shape[-1]), _HEAD_TOKENS):
            normed_NH = norm(x_NH.requires_grad_())
            logits_NV = logits(normed_NH, head_VH, config)
            sample_NV = sample_fisher(logits_NV.detach(), generator)
            found += torch.autograd.grad(logits_NV, x_NH, sample_NV)
            if config.logits_cap is not None:  # what the head itself puts out comes before the cap
                sample_NV *= 1 - (logits_NV.detach() / config.logits_cap).square()
            fisher_V += sample_NV.square().sum(dim=0)
            inputs.append(normed_NH.detach())
        return torch.cat(found).reshape(x_BTH.shape), _Part(torch.cat(inputs), {config.family.head: fisher_V})

    gradients, total = [], Felt()
    for gradient_BTH, part in workers.map(back, range(len(batches)), grad=True):
        gradients.append(gradient_BTH)
        total.add(part, workers.map)
    total.statistics.finish()
    return gradients, total


def sample_fisher(logits_NV: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random vectors v_NV, whose covariance is that of the softmax: diag(p) - p p^T."""
    p_NV = torch.softmax(logits_NV, dim=-1)
    signed_NV = torch.randint(0, 2, p_NV.shape, generator=generator).mul_(2).sub_(1) * p_NV.sqrt()
    return signed_NV - p_NV * signed_NV.sum(dim=-1, keepdim=True)


def _back_through_block(
    block: DecoderBlock,
    x_BTH: torch.Tensor,
    gradient_BTH: torch.Tensor,
    tables: PositionTables,
    prefix: str,
) -> tuple[torch.Tensor, dict[str, _Part]]:
    """The gradient at the block's input, and what is felt at each site, its linears by their full names."""
    watched = _Watched(block.config, block.index, block.tensors)
    y_BTH = watched.forward(x_BTH.requires_grad_(), tables)
    outputs = [y for _, y in watched.seen.values()]
    at_input_BTH, *at_outputs = torch.autograd.grad(y_BTH, [x_BTH, *outputs], gradient_BTH)
    gradients = dict(zip(watched.seen, at_outputs, strict=True))
    parts = {}
    for site in block.config.sites(block.index):
        x, _ = watched.seen[site.linears[0]]
        parts[site.name] = _Part.of(x, {f"{prefix}.{name}": gradients[name] for name in site.linears})
    return at_input_BTH, parts
