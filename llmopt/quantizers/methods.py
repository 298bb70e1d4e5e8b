"""Each method as at most two steps: scale a site's input channels, then round the site's weights.

The pure tensor functions are in rtn, gptq, awq and smoothquant; here they meet the driver.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from llmopt.formats.scheme import Scheme
from llmopt.models.families import Site
from llmopt.quantizers import settings
from llmopt.quantizers.awq import round_clipped, search_scale
from llmopt.quantizers.base import Rounded, Statistics
from llmopt.quantizers.gptq import aim, factorize, gptq, refine
from llmopt.quantizers.rtn import rtn
from llmopt.quantizers.smoothquant import smooth_scale


@dataclass(frozen=True, slots=True)
class Context:
    """A site made ready.

    aim: what to round instead of the site's weight. round: takes some rows of that. events: fallbacks that changed
    numbers.
    """

    round: Callable[[torch.Tensor], Rounded]
    aim: Callable[[torch.Tensor], torch.Tensor] = lambda weight_OI: weight_OI
    events: tuple[str, ...] = ()


class Scaler(Protocol):
    """`wanted` names the Statistics that `scale` reads; they are of the original weights."""

    wanted: frozenset[str]

    def scale(self, site: Site, weight_OI: torch.Tensor, statistics: Statistics, scheme: Scheme) -> torch.Tensor | None:
        """scale_I to multiply the columns by, None to leave the site as it is."""


class Rounder(Protocol):
    """`wanted` names the Statistics that are gathered for it under the weights quantized so far.

    `compares` asks for those that compare with the original model, which then runs beside.
    """

    wanted: frozenset[str]
    compares: bool

    def prepare(self, statistics: Statistics, scheme: Scheme) -> Context: ...


def method_of(method: settings.Method) -> tuple[Scaler | None, Rounder]:
    """The steps that the settings ask for."""
    if isinstance(method, settings.GPTQ):
        return None, _GPTQ(method)
    if isinstance(method, settings.AWQ):
        return _AWQScaler(method), _AWQRounder(method)
    if isinstance(method, settings.SmoothQuant):
        return _Smooth(method.alpha), _Nearest(method)
    return None, _Nearest(method)


class _Nearest:
    compares = False

    def __init__(self, method: settings.RTN | settings.SmoothQuant) -> None:
        self.wanted = frozenset({"abs_max"}) if method.activations == "static" else frozenset[str]()

    def prepare(self, statistics: Statistics, scheme: Scheme) -> Context:
        return Context(lambda weight_OI: rtn(weight_OI, scheme))


class _GPTQ:
    wanted = frozenset({"hessian"})

    def __init__(self, method: settings.GPTQ) -> None:
        self._method = method
        self.compares = method.compensate

    def prepare(self, statistics: Statistics, scheme: Scheme) -> Context:
        method = self._method
        hessian_II, cross_II = statistics.hessian_II, statistics.cross_II
        assert hessian_II is not None
        curvature = factorize(hessian_II, damping=method.damping, act_order=method.act_order)
        if curvature is None:
            event = "rounded to nearest: the Hessian is not positive definite at any damping"
            return Context(lambda weight_OI: rtn(weight_OI, scheme), events=(event,))
        events = () if curvature.damping == method.damping else (f"damping raised to {curvature.damping:g}",)

        damped_II = hessian_II.clone()
        damped_II.diagonal().add_(curvature.damping * hessian_II.diagonal().mean())

        def round_rows(weight_OI: torch.Tensor) -> Rounded:
            rounded = gptq(weight_OI, curvature, scheme, act_order=method.act_order)
            return refine(weight_OI, rounded, damped_II, sweeps=method.sweeps)

        if cross_II is None:
            return Context(round_rows, events=events)
        return Context(
            round_rows,
            lambda weight_OI: aim(weight_OI, hessian_II, cross_II, statistics.ahead_OI, curvature),
            events,
        )


class _AWQScaler:
    wanted = frozenset({"hessian", "abs_sum"})

    def __init__(self, method: settings.AWQ) -> None:
        self._method = method

    def scale(self, site: Site, weight_OI: torch.Tensor, statistics: Statistics, scheme: Scheme) -> torch.Tensor | None:
        assert statistics.hessian_II is not None
        assert statistics.abs_sum_I is not None
        abs_mean_I = statistics.abs_sum_I / statistics.tokens
        return search_scale(weight_OI, statistics.hessian_II, abs_mean_I, scheme, grid=self._method.grid)


class _AWQRounder:
    wanted = frozenset[str]()  # the scaler's statistics serve again
    compares = False

    def __init__(self, method: settings.AWQ) -> None:
        self._method = method

    def prepare(self, statistics: Statistics, scheme: Scheme) -> Context:
        hessian_II = statistics.hessian_II
        if not self._method.clip or hessian_II is None:
            return Context(lambda weight_OI: rtn(weight_OI, scheme))
        return Context(lambda weight_OI: round_clipped(weight_OI, hessian_II, scheme))


class _Smooth:
    wanted = frozenset({"abs_max"})

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha

    def scale(self, site: Site, weight_OI: torch.Tensor, statistics: Statistics, scheme: Scheme) -> torch.Tensor | None:
        if site.scaled_by is None or not site.scaled_by.is_norm:
            return None
        assert statistics.abs_max_I is not None
        return smooth_scale(weight_OI, statistics.abs_max_I, self._alpha)
