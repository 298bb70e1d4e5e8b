"""AWQ: scale up the input channels that matter before rounding, then round each group well by itself.

Source: Lin et al., arXiv:2306.00978, sections 3.2 and 5.1. The paper runs the block for each candidate; here the
error of the site's own linears comes by algebra from the diagonal blocks of the Hessian, one block a group: errors of
different groups are as good as independent (docs/decisions/0014). Beyond the paper, each group's codes and scale are
then refined by coordinate descent on the same blocks.

Shape suffixes as in base.py, and B: blocks of S consecutive in-features, each a group or a part of one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llmopt.formats.scheme import Scheme
from llmopt.quantizers.base import Grid, Rounded, Tie, exact_scale, grouped, some_rows
from llmopt.quantizers.rtn import rtn

_CHUNK = 16  # columns swept before the rest of the block hears of it; changes the speed, not the result
_SHARES = tuple(1 - step / 40 for step in range(21))  # of a symmetric group's range: to a half
_OFFSETS = (-0.1, -0.05, 0.05, 0.1)  # of either end's share, after the best common one of a coarser list


def search_scale(
    weight_OI: torch.Tensor,
    blocks_BSS: torch.Tensor,
    abs_mean_I: torch.Tensor,
    scheme: Scheme,
    *,
    grid: int,
    tie: Tie = lambda scale_I: scale_I,
) -> torch.Tensor:
    """The scale_I with the least output error when rounded to nearest, of the candidates and no scale at all.

    weight_OI holds the rows of all linears of the site; blocks_BSS are the Hessian's diagonal blocks. The scale's
    geometric middle is one.
    """
    sample_OI = some_rows(weight_OI)
    best_scale_I = torch.ones_like(abs_mean_I)
    best_error = _scaled_error(sample_OI, best_scale_I, blocks_BSS, scheme)
    for candidate_I in _candidates(weight_OI, abs_mean_I, scheme, grid):
        scale_I = tie(candidate_I.clamp(min=1e-4))
        scale_I = scale_I / (scale_I.max() * scale_I.min()).sqrt()
        error = _scaled_error(sample_OI, scale_I, blocks_BSS, scheme)
        if error < best_error:
            best_scale_I, best_error = scale_I, error
    return best_scale_I


def _candidates(weight_OI: torch.Tensor, abs_mean_I: torch.Tensor, scheme: Scheme, grid: int) -> Iterator[torch.Tensor]:
    """|x|^r, as the paper has it, and |x|^r / |w|^(1-r), for r up to one.

    |w| is the mean over rows of a column's share of its group's largest weight.
    """
    size_OGS = grouped(weight_OI.abs(), scheme)
    share_I = (size_OGS / size_OGS.amax(dim=2, keepdim=True).clamp(min=1e-8)).mean(dim=0).reshape(-1).clamp(min=1e-4)
    abs_mean_I = abs_mean_I.clamp(min=1e-4)
    for step in range(grid + 1):
        ratio = step / grid
        yield abs_mean_I**ratio
        yield abs_mean_I**ratio / share_I ** (1 - ratio)


def _scaled_error(
    weight_OI: torch.Tensor, scale_I: torch.Tensor, blocks_BSS: torch.Tensor, scheme: Scheme
) -> torch.Tensor:
    error_OI = rtn(weight_OI * scale_I, scheme).dequantize() / scale_I - weight_OI
    return _block_errors(error_OI, blocks_BSS).sum()


def round_groups(
    weight_OI: torch.Tensor, blocks_BSS: torch.Tensor, scheme: Scheme, *, clip: bool, sweeps: int
) -> Rounded:
    """Round each group by itself so that its output moves little.

    To nearest on the grid that covers the group or, with `clip`, on the one that gives the least error; then `sweeps`
    times refine the scales and the codes.
    """
    blocks_BSS = _within_groups(blocks_BSS, scheme, weight_OI.shape[1])
    grid = _clipped(weight_OI, blocks_BSS, scheme) if clip else None
    return _refine(weight_OI, rtn(weight_OI, scheme, grid), blocks_BSS, sweeps)


def _clipped(weight_OI: torch.Tensor, blocks_BSS: torch.Tensor, scheme: Scheme) -> Grid:
    """The grid for which rounding to nearest gives each group the least error, of those over a part of its range.

    A symmetric grid has one share of the range; one with zero points ends up with a share for either end.
    """
    weight_OGS = grouped(weight_OI, scheme)
    low_OG, high_OG = weight_OGS.amin(dim=2).clamp(max=0), weight_OGS.amax(dim=2).clamp(min=0)
    best = Grid.cover(weight_OGS, scheme)
    best_error_OG = torch.full_like(low_OG, torch.inf)
    share_low_OG, share_high_OG = torch.ones_like(low_OG), torch.ones_like(low_OG)

    def attempt(try_low_OG: torch.Tensor, try_high_OG: torch.Tensor) -> None:
        nonlocal best, best_error_OG, share_low_OG, share_high_OG
        grid = Grid.between(low_OG * try_low_OG, high_OG * try_high_OG, scheme)
        error_OI = rtn(weight_OI, scheme, grid).dequantize() - weight_OI
        error_OG = _group_errors(error_OI, blocks_BSS, weight_OGS.shape[1])
        better_OG = error_OG < best_error_OG
        share_low_OG = torch.where(better_OG, try_low_OG, share_low_OG)
        share_high_OG = torch.where(better_OG, try_high_OG, share_high_OG)
        best, best_error_OG = best.where_better(grid, error_OG, best_error_OG)

    for share in _SHARES if scheme.symmetric else _SHARES[::2]:
        attempt(torch.full_like(low_OG, share), torch.full_like(high_OG, share))
    if not scheme.symmetric:
        start_OG = share_high_OG
        for offset in _OFFSETS:
            attempt(share_low_OG, start_OG + offset)
        start_OG = share_low_OG
        for offset in _OFFSETS:
            attempt(start_OG + offset, share_high_OG)
    return best


def _refine(weight_OI: torch.Tensor, rounded: Rounded, blocks_BSS: torch.Tensor, sweeps: int) -> Rounded:
    """Sweep over the columns, then `sweeps - 1` times refit the scales and sweep; a group never gets worse by it."""
    groups = rounded.grid.scale_OG.shape[1]
    best, best_error_OG = rounded, _group_errors(rounded.dequantize() - weight_OI, blocks_BSS, groups)
    for number in range(sweeps):
        start = best if number == 0 else _refit(weight_OI, best, blocks_BSS)
        candidate = _sweep(weight_OI, start, blocks_BSS)
        error_OG = _group_errors(candidate.dequantize() - weight_OI, blocks_BSS, groups)
        better_OG1 = (error_OG < best_error_OG)[:, :, None]
        codes_OGS = torch.where(
            better_OG1, grouped(candidate.codes_OI, best.scheme), grouped(best.codes_OI, best.scheme)
        )
        grid, best_error_OG = best.grid.where_better(candidate.grid, error_OG, best_error_OG)
        best = Rounded(codes_OGS.reshape(weight_OI.shape), grid, best.scheme)
    return best


def _refit(weight_OI: torch.Tensor, rounded: Rounded, blocks_BSS: torch.Tensor) -> Rounded:
    """The scale of each group that is best for its codes: one division, since groups are independent here."""
    grid, groups = rounded.grid, rounded.grid.scale_OG.shape[1]
    steps_OGS = grouped(rounded.codes_OI, rounded.scheme) - grid.zero_OG[:, :, None]
    steps_BOS = _blocked(steps_OGS.reshape(weight_OI.shape), len(blocks_BSS))
    pushed_BOS = torch.bmm(steps_BOS, blocks_BSS)
    aimed_OG = _per_group((pushed_BOS * _blocked(weight_OI, len(blocks_BSS))).sum(dim=2), groups)
    curved_OG = _per_group((pushed_BOS * steps_BOS).sum(dim=2), groups)
    usable_OG = (aimed_OG > 0) & (curved_OG > 0)
    scale_OG = torch.where(usable_OG, exact_scale(aimed_OG / curved_OG.clamp(min=1e-30)), grid.scale_OG)
    return Rounded(rounded.codes_OI, Grid(scale_OG, grid.zero_OG), rounded.scheme)


def _sweep(weight_OI: torch.Tensor, rounded: Rounded, blocks_BSS: torch.Tensor) -> Rounded:
    """Each column of a block once, in order, to its best code given all the others of the block."""
    blocks, size, top = len(blocks_BSS), blocks_BSS.shape[1], (1 << rounded.scheme.bits) - 1
    scale_BO = rounded.grid.scale_OG.T.repeat_interleave(blocks // rounded.grid.scale_OG.shape[1], dim=0)
    codes_BSO = _blocked(rounded.codes_OI, blocks).transpose(1, 2).contiguous()
    error_BSO = _blocked(weight_OI - rounded.dequantize(), blocks).transpose(1, 2)
    slope_BSO = torch.bmm(blocks_BSS, error_BSO)
    reach_BS = 1 / blocks_BSS.diagonal(dim1=1, dim2=2).clamp(min=1e-12)
    per_step_BO = 1 / scale_BO
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        moved_BKO = torch.empty_like(slope_BSO[:, start:stop])
        for i in range(start, stop):
            code_BO = (slope_BSO[:, i] * reach_BS[:, i, None]).mul_(per_step_BO).add_(codes_BSO[:, i])
            code_BO.round_().clamp_(0, top)
            torch.sub(code_BO, codes_BSO[:, i], out=moved_BKO[:, i - start]).mul_(scale_BO)
            codes_BSO[:, i] = code_BO
            slope_BSO[:, i + 1 : stop].addcmul_(
                blocks_BSS[:, i + 1 : stop, i, None], moved_BKO[:, i - start, None], value=-1
            )
        slope_BSO[:, stop:].baddbmm_(blocks_BSS[:, stop:, start:stop], moved_BKO, alpha=-1)
    codes_OI = codes_BSO.permute(2, 0, 1).reshape(weight_OI.shape)
    return Rounded(codes_OI, rounded.grid, rounded.scheme)


def _within_groups(blocks_BSS: torch.Tensor, scheme: Scheme, columns: int) -> torch.Tensor:
    """Blocks no larger than a group."""
    size, group = blocks_BSS.shape[1], columns // scheme.groups(columns)
    if group >= size:
        return blocks_BSS
    parts = [blocks_BSS[:, at : at + group, at : at + group] for at in range(0, size, group)]
    return torch.stack(parts, dim=1).reshape(-1, group, group)


def _blocked(matrix_OI: torch.Tensor, blocks: int) -> torch.Tensor:
    """[B, O, S] view of [O, I]."""
    return matrix_OI.reshape(len(matrix_OI), blocks, -1).transpose(0, 1)


def _block_errors(error_OI: torch.Tensor, blocks_BSS: torch.Tensor) -> torch.Tensor:
    """[B, O]: what the error of each block of a row adds to the squared error of its output, by itself."""
    error_BOS = _blocked(error_OI, len(blocks_BSS))
    return torch.bmm(error_BOS, blocks_BSS).mul_(error_BOS).sum(dim=2)


def _group_errors(error_OI: torch.Tensor, blocks_BSS: torch.Tensor, groups: int) -> torch.Tensor:
    return _per_group(_block_errors(error_OI, blocks_BSS), groups)


def _per_group(values_BO: torch.Tensor, groups: int) -> torch.Tensor:
    """[O, G] sums over the blocks of each group."""
    return values_BO.reshape(groups, -1, values_BO.shape[1]).sum(dim=1).T
