"""The grid that weights are rounded to, and the statistics of a site's input.

Shape suffixes, here and in the methods: O out features, I in features, G groups of consecutive in-features, S the
in-features of one group, N tokens. Everything is float32 on the CPU; codes are uint8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from llmopt.formats.base import QuantizedWeight
from llmopt.formats.scheme import Scheme
from llmopt.quantizers import fp8

#: Does a function for every item, in any order, with results in theirs: `map`, or `Workers.map`.
Each: TypeAlias = Callable[[Callable[[int], None], Iterable[int]], Iterator[None]]
_STRIPE = 512  # columns of a Hessian that are added to at once
SAMPLED = 512  # tokens of a site's input that are kept, about, and rows of its weights that a search looks at
SHRINK = tuple(1.0 - 0.05 * step for step in range(11))  # shares of a group's range that are tried: to a half


#: Of a scale_I, the nearest in which channels that must share one scale do.
Tie: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Grid:
    """Steps and zero points of each group; zero_OG is in codes, and the middle of them when symmetric."""

    scale_OG: torch.Tensor
    zero_OG: torch.Tensor

    @classmethod
    def cover(cls, weight_OGS: torch.Tensor, scheme: Scheme, shrink: float = 1.0) -> Grid:
        """The grid that just covers each group's range, or `shrink` times it.

        Scales are rounded so that BF16 and F16 both hold them (formats.base.exact_scale has the same rule).
        """
        low_OG, high_OG = weight_OGS.amin(dim=2).clamp(max=0), weight_OGS.amax(dim=2).clamp(min=0)
        return cls.between(low_OG * shrink, high_OG * shrink, scheme)

    @classmethod
    def between(cls, low_OG: torch.Tensor, high_OG: torch.Tensor, scheme: Scheme) -> Grid:
        """The grid over a range of each group that holds zero; a symmetric one over the larger of its two sides."""
        levels = (1 << scheme.bits) - 1
        if scheme.symmetric:
            scale_OG = exact_scale(torch.maximum(-low_OG, high_OG) * (2 / levels))
            return cls(scale_OG, torch.full_like(scale_OG, 1 << (scheme.bits - 1)))
        scale_OG = exact_scale((high_OG - low_OG) / levels)
        return cls(scale_OG, (-low_OG / scale_OG).round().clamp(0, levels))

    @classmethod
    def fit(cls, weight_OGS: torch.Tensor, scheme: Scheme, importance_GS: torch.Tensor) -> Grid:
        """Of the grids that cover all or part of each group, the one with the least weighted squared error."""
        best = cls.cover(weight_OGS, scheme)
        best_error_OG = torch.full(best.scale_OG.shape, float("inf"))
        for shrink in SHRINK:
            grid = cls.cover(weight_OGS, scheme, shrink)
            error_OGS = grid.value(grid.round(weight_OGS, scheme.bits)) - weight_OGS
            error_OG = (error_OGS.square_() * importance_GS).sum(dim=2)
            best, best_error_OG = best.where_better(grid, error_OG, best_error_OG)
        return best

    def where_better(
        self, other: Grid, error_OG: torch.Tensor, best_error_OG: torch.Tensor
    ) -> tuple[Grid, torch.Tensor]:
        """Take `other` where its error is smaller; returns the grid and its errors."""
        better_OG = error_OG < best_error_OG
        scale_OG = torch.where(better_OG, other.scale_OG, self.scale_OG)
        zero_OG = torch.where(better_OG, other.zero_OG, self.zero_OG)
        return Grid(scale_OG, zero_OG), torch.where(better_OG, error_OG, best_error_OG)

    def round(self, weight_OGS: torch.Tensor, bits: int) -> torch.Tensor:
        """Nearest codes, as floats."""
        codes = (weight_OGS / self.scale_OG[:, :, None]).round_() + self.zero_OG[:, :, None]
        return codes.clamp_(0, (1 << bits) - 1)

    def value(self, codes_OGS: torch.Tensor) -> torch.Tensor:
        return (codes_OGS - self.zero_OG[:, :, None]) * self.scale_OG[:, :, None]


@dataclass(frozen=True, slots=True)
class Rounded:
    """A weight on its grid. codes_OI: whole numbers in [0, 2**bits), floats or uint8; of FP8, its bit patterns."""

    codes_OI: torch.Tensor
    grid: Grid
    scheme: Scheme

    def dequantize(self) -> torch.Tensor:
        if self.scheme.kind == "float":
            return fp8.from_codes(self.codes_OI) * self.grid.scale_OG
        return self.grid.value(grouped(self.codes_OI, self.scheme)).reshape(self.codes_OI.shape)

    def split(self, rows: Sequence[int]) -> list[Rounded]:
        """The linears of a site, which were rounded as one matrix."""
        parts = zip(
            torch.split(self.codes_OI, list(rows)),
            torch.split(self.grid.scale_OG, list(rows)),
            torch.split(self.grid.zero_OG, list(rows)),
            strict=True,
        )
        return [Rounded(codes, Grid(scale, zero), self.scheme) for codes, scale, zero in parts]

    @staticmethod
    def stack(parts: Sequence[Rounded]) -> Rounded:
        codes_OI = torch.cat([p.codes_OI for p in parts])
        scale_OG = torch.cat([p.grid.scale_OG for p in parts])
        zero_OG = torch.cat([p.grid.zero_OG for p in parts])
        return Rounded(codes_OI, Grid(scale_OG, zero_OG), parts[0].scheme)

    def export(self) -> QuantizedWeight:
        return QuantizedWeight(
            codes_OI=self.codes_OI.to(torch.uint8).numpy(),
            scale_OG=self.grid.scale_OG.numpy(),
            zero_OG=None if self.scheme.symmetric else self.grid.zero_OG.to(torch.uint8).numpy(),
            bits=self.scheme.bits,
            kind=self.scheme.kind,
        )


@dataclass(slots=True)
class Statistics:
    """What calibration keeps of a site's input x_NI; each is None where the method has no use for it.

    The last two compare with the original model on the same tokens: its input o_NI of the site, and by how much its
    residual stream is ahead of ours, d_NO.
    """

    tokens: int = 0
    hessian_II: torch.Tensor | None = None  # sum of x x^T over tokens; below its diagonal until `finish`
    blocks_BSS: torch.Tensor | None = None  # its diagonal blocks alone, of block_size(I) channels
    sample_NI: torch.Tensor | None = None  # some of the tokens' x, evenly spaced
    abs_sum_I: torch.Tensor | None = None  # sum of |x|
    abs_max_I: torch.Tensor | None = None  # max of |x|
    cross_II: torch.Tensor | None = None  # sum of o x^T
    ahead_OI: torch.Tensor | None = None  # sum of d x^T, where the site's output is added to the residual stream

    def take(
        self,
        x: torch.Tensor,
        wanted: frozenset[str],
        *,
        original: torch.Tensor | None = None,
        ahead: torch.Tensor | None = None,
        sample_every: int = 1,
        each: Each = map,
    ) -> None:
        """Add one batch; x and `original` are [..., I], `ahead` is [..., O]. Every how many tokens one is sampled.

        `each` does independent pieces of the products, on all cores say. Every sum is over the batches in the order in
        which they are taken, so the bytes depend on nothing else.
        """
        x_NI = x.reshape(-1, x.shape[-1]).float()
        self.tokens += len(x_NI)
        if "abs_sum" in wanted:
            sum_I = x_NI.abs().sum(dim=0)
            self.abs_sum_I = sum_I if self.abs_sum_I is None else self.abs_sum_I.add_(sum_I)
        if "abs_max" in wanted:
            max_I = x_NI.abs().amax(dim=0) if len(x_NI) else torch.zeros(x_NI.shape[1])
            self.abs_max_I = max_I if self.abs_max_I is None else torch.maximum(self.abs_max_I, max_I)
        if "blocks" in wanted:
            blocks_BSS = _diagonal_blocks(x_NI)
            self.blocks_BSS = blocks_BSS if self.blocks_BSS is None else self.blocks_BSS.add_(blocks_BSS)
        if "sample" in wanted:
            sample_NI = x_NI[sample_every // 2 :: sample_every].clone()
            self.sample_NI = sample_NI if self.sample_NI is None else torch.cat((self.sample_NI, sample_NI))
        if "hessian" in wanted:
            self.hessian_II = _add_product(self.hessian_II, x_NI, x_NI, each, lower=True)
        if original is not None:
            self.cross_II = _add_product(self.cross_II, original.reshape(x_NI.shape).float(), x_NI, each)
        if ahead is not None:
            self.ahead_OI = _add_product(self.ahead_OI, ahead.reshape(len(x_NI), -1), x_NI, each)

    def finish(self) -> Statistics:
        """Fill in the upper half of the Hessian, in place; after the last batch."""
        if self.hessian_II is not None:
            for start in range(0, len(self.hessian_II), _STRIPE):
                stripe = slice(start, start + _STRIPE)
                self.hessian_II[stripe, start:] = self.hessian_II[start:, stripe].T.contiguous()
        return self

    def divide(self, scale_I: torch.Tensor) -> None:
        """Make them those of x / scale_I, in place. Not for those that compare with the original."""
        if self.hessian_II is not None:
            self.hessian_II /= torch.outer(scale_I, scale_I)
        if self.blocks_BSS is not None:
            scale_BS = scale_I.view(len(self.blocks_BSS), -1)
            self.blocks_BSS /= scale_BS[:, :, None] * scale_BS[:, None]
        for values in (self.sample_NI, self.abs_sum_I, self.abs_max_I):
            if values is not None:
                values /= scale_I


def _add_product(
    total: torch.Tensor | None, left_NJ: torch.Tensor, right_NI: torch.Tensor, each: Each, *, lower: bool = False
) -> torch.Tensor:
    """total + left^T right, by stripes of columns; with `lower`, each only from its diagonal down."""
    total_JI = torch.zeros(left_NJ.shape[1], right_NI.shape[1]) if total is None else total

    def add(start: int) -> None:
        first, stripe = start if lower else 0, slice(start, start + _STRIPE)
        total_JI[first:, stripe].addmm_(left_NJ[:, first:].T, right_NI[:, stripe])

    for _ in each(add, range(0, right_NI.shape[1], _STRIPE)):
        pass
    return total_JI


def block_size(channels: int) -> int:
    """Of `Statistics.blocks_BSS`: the largest power of two up to 128 that divides the channels, as group sizes do."""
    return math.gcd(channels, 128)


def sample_every(tokens: int) -> int:
    """So that about SAMPLED of all tokens are sampled; odd, so that windows are not sampled at the same positions."""
    return max(1, tokens // SAMPLED) | 1


def _diagonal_blocks(x_NI: torch.Tensor) -> torch.Tensor:
    size = block_size(x_NI.shape[1])
    x_BNS = x_NI.view(len(x_NI), x_NI.shape[1] // size, size).transpose(0, 1)
    return torch.bmm(x_BNS.transpose(1, 2), x_BNS)


def grouped(weight_OI: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """[O, G, S] view of [O, I]."""
    rows, columns = weight_OI.shape
    return weight_OI.reshape(rows, scheme.groups(columns), -1)


def exact_scale(scale: torch.Tensor) -> torch.Tensor:
    """As formats.base.exact_scale, in torch."""
    return scale.bfloat16().float().clamp_(2.0**-24, 65280.0).half().float()


def output_error(error_OI: torch.Tensor, hessian_II: torch.Tensor) -> torch.Tensor:
    """Sum over calibration tokens of |error x|^2, from the Hessian alone: tr(error H error^T). A scalar."""
    return ((error_OI @ hessian_II) * error_OI).sum()


def some_rows(weight_OI: torch.Tensor) -> torch.Tensor:
    """At most SAMPLED of the rows, evenly spaced: enough to compare scales by the sum of the rows' errors."""
    return weight_OI[:: -(-len(weight_OI) // SAMPLED)]
