"""Each method as at most two steps: scale a site's input channels, then round the site's weights.

The pure tensor functions are in rtn, gptq, awq, smoothquant and activations; here they meet the driver.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from llmopt.formats.scheme import Scheme
from llmopt.models.families import Site
from llmopt.quantizers import settings
from llmopt.quantizers.activations import static_scale
from llmopt.quantizers.awq import round_groups, search_scale
from llmopt.quantizers.base import Rounded, Statistics, Tie
from llmopt.quantizers.gptq import Curvature, aim, factorize, gptq, refine
from llmopt.quantizers.rtn import rtn
from llmopt.quantizers.smoothquant import search_smooth_scale, smooth_scale

_STATIC = frozenset({"abs_max", "sample"})  # what the static scale of an input is found from


@dataclass(frozen=True, slots=True)
class Context:
    """A site made ready.

    aim: what to round instead of the site's weight. round: takes some rows of that. events: fallbacks that changed
    numbers. input_scale: the static scale of the input of these weights, None unless activations are static.
    """

    round: Callable[[torch.Tensor], Rounded]
    aim: Callable[[torch.Tensor], torch.Tensor] = lambda weight_OI: weight_OI
    events: tuple[str, ...] = ()
    input_scale: Callable[[torch.Tensor], float] | None = None


class Scaler(Protocol):
    """`wanted` names the Statistics that `scale` reads; they are of the original weights."""

    wanted: frozenset[str]

    def scale(
        self, site: Site, weight_OI: torch.Tensor, statistics: Statistics, scheme: Scheme, tie: Tie
    ) -> torch.Tensor | None:
        """scale_I to multiply the columns by, as `tie` has it; None to leave the site as it is."""


class Rounder(Protocol):
    """`wanted` names the Statistics that are gathered for it under the weights quantized so far.

    Where it wants none, `prepare` gets the scaler's, divided by the scale that was folded. `compares` asks for those
    that compare with the original model, which then runs beside.
    """

    wanted: frozenset[str]
    compares: bool

    def prepare(self, statistics: Statistics, scheme: Scheme) -> Context: ...


def method_of(method: settings.Method) -> tuple[Scaler | None, Rounder]:
    """The steps that the settings ask for."""
    if isinstance(method, settings.GPTQ):
        return _scaler_before(method), _GPTQ(method)
    if isinstance(method, settings.AWQ):
        return _AWQScaler(method.grid), _AWQRounder(method)
    if isinstance(method, settings.SmoothQuant):
        return _Smooth(method.alpha, static=method.activations == "static"), _Nearest(frozenset())
    return None, _Nearest(_STATIC if method.activations == "static" else frozenset())


def curvature_of(method: settings.Method) -> Callable[[torch.Tensor], Curvature | None] | None:
    """How the method prepares a Hessian to round with feedback; None for methods that round to nearest."""
    if not isinstance(method, settings.GPTQ):
        return None
    return lambda hessian_II: factorize(hessian_II, damping=method.damping, act_order=method.act_order)


def _scaler_before(method: settings.GPTQ) -> Scaler | None:
    if method.scaling == "awq":
        return _AWQScaler(settings.AWQ().grid)
    if method.scaling == "smoothquant":
        return _Smooth("search", static=method.activations == "static")
    return None


def _input_scale(statistics: Statistics, scheme: Scheme) -> Callable[[torch.Tensor], float] | None:
    sample_NI, abs_max_I = statistics.sample_NI, statistics.abs_max_I
    if scheme.activations != "static" or sample_NI is None or abs_max_I is None:
        return None
    return lambda weight_OI: float(static_scale(weight_OI, sample_NI, abs_max_I, statistics.tokens, scheme))


class _Nearest:
    compares = False

    def __init__(self, wanted: frozenset[str]) -> None:
        self.wanted = wanted

    def prepare(self, statistics: Statistics, scheme: Scheme) -> Context:
        return Context(lambda weight_OI: rtn(weight_OI, scheme), input_scale=_input_scale(statistics, scheme))


class _GPTQ:
    def __init__(self, method: settings.GPTQ) -> None:
        self._method = method
        self.wanted = frozenset({"hessian"}) | (_STATIC if method.activations == "static" else frozenset())
        self.compares = method.compensate

    def prepare(self, statistics: Statistics, scheme: Scheme) -> Context:
        method, input_scale = self._method, _input_scale(statistics, scheme)
        hessian_II, cross_II = statistics.hessian_II, statistics.cross_II
        assert hessian_II is not None
        curvature = factorize(hessian_II, damping=method.damping, act_order=method.act_order)
        if curvature is None:
            event = "rounded to nearest: the Hessian is not positive definite at any damping"
            return Context(lambda weight_OI: rtn(weight_OI, scheme), events=(event,), input_scale=input_scale)
        events = () if curvature.damping == method.damping else (f"damping raised to {curvature.damping:g}",)

        def round_rows(weight_OI: torch.Tensor) -> Rounded:
            rounded = gptq(weight_OI, curvature, scheme, act_order=method.act_order)
            return refine(weight_OI, rounded, hessian_II, ridge=curvature.ridge, sweeps=method.sweeps)

        if cross_II is None:
            return Context(round_rows, events=events, input_scale=input_scale)
        return Context(
            round_rows,
            lambda weight_OI: aim(weight_OI, hessian_II, cross_II, statistics.ahead_OI, curvature),
            events,
            input_scale,
        )


class _AWQScaler:
    wanted = frozenset({"blocks", "abs_sum"})

    def __init__(self, grid: int) -> None:
        self._grid = grid

    def scale(
        self, site: Site, weight_OI: torch.Tensor, statistics: Statistics, scheme: Scheme, tie: Tie
    ) -> torch.Tensor | None:
        assert statistics.blocks_BSS is not None
        assert statistics.abs_sum_I is not None
        abs_mean_I = statistics.abs_sum_I / statistics.tokens
        return search_scale(weight_OI, statistics.blocks_BSS, abs_mean_I, scheme, grid=self._grid, tie=tie)


class _AWQRounder:
    wanted = frozenset[str]()
    compares = False

    def __init__(self, method: settings.AWQ) -> None:
        self._method = method

    def prepare(self, statistics: Statistics, scheme: Scheme) -> Context:
        method, blocks_BSS = self._method, statistics.blocks_BSS
        assert blocks_BSS is not None
        return Context(
            lambda weight_OI: round_groups(weight_OI, blocks_BSS, scheme, clip=method.clip, sweeps=method.sweeps)
        )


class _Smooth:
    def __init__(self, alpha: float | Literal["search"], *, static: bool) -> None:
        self._alpha = alpha
        self.wanted = _STATIC if static or alpha == "search" else frozenset({"abs_max"})

    def scale(
        self, site: Site, weight_OI: torch.Tensor, statistics: Statistics, scheme: Scheme, tie: Tie
    ) -> torch.Tensor | None:
        if self._alpha == "search":
            return search_smooth_scale(weight_OI, statistics, scheme, tie=tie)
        assert statistics.abs_max_I is not None
        return tie(smooth_scale(weight_OI, statistics.abs_max_I, self._alpha))
