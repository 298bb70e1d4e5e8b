"""Settings of each method, one frozen dataclass each; no torch here, so that a typo costs no import."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from llmopt.artifacts.outcome import Json
from llmopt.errors import SettingsError, nearest
from llmopt.formats.scheme import FORMATS, Activations, Scheme, check_scheme
from llmopt.profiles.settings import build, to_json

GROUP_SIZES = (-1, 32, 64, 128)


@dataclass(frozen=True, kw_only=True, slots=True)
class RTN:
    """Round to nearest. With `bits: 8`, `group_size: -1` and activations: naive W8A8."""

    bits: int = 4
    group_size: int = 128  # in-features that share a scale; -1: the whole row
    symmetric: bool = True
    activations: Activations = "none"  # int8 inputs: per token (dynamic) or one calibrated scale (static)

    def __post_init__(self) -> None:
        _check_weights(self)

    @property
    def scheme(self) -> Scheme:
        return Scheme(
            bits=self.bits, group_size=self.group_size, symmetric=self.symmetric, activations=self.activations
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GPTQ:
    """Frantar et al., arXiv:2210.17323; `compensate` after Li et al., arXiv:2504.02692 (GPTAQ)."""

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    act_order: bool = True  # columns by falling Hessian diagonal; groups stay where they are (static)
    damping: float = 0.01  # added to the Hessian's diagonal, as a share of its mean
    compensate: bool = True  # aim at the original model's outputs, deviations of the blocks before included
    sweeps: int = 3  # refits of the scales and sweeps over the columns after the rounding

    def __post_init__(self) -> None:
        _check_weights(self)
        _check_between("damping", self.damping, 0.0, 1.0)
        _check_between("sweeps", self.sweeps, 0, 100)

    @property
    def scheme(self) -> Scheme:
        return Scheme(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)


@dataclass(frozen=True, kw_only=True, slots=True)
class AWQ:
    """Lin et al., arXiv:2306.00978; with zero points unless `symmetric`, as its authors have it."""

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    grid: int = 20  # exponents tried for the channel scales
    clip: bool = True  # search a smaller range for each group

    def __post_init__(self) -> None:
        _check_weights(self)
        _check_between("grid", self.grid, 1, 1000)

    @property
    def scheme(self) -> Scheme:
        return Scheme(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)


@dataclass(frozen=True, kw_only=True, slots=True)
class SmoothQuant:
    """Xiao et al., arXiv:2211.10438: W8A8, one scale a row of the weights."""

    alpha: float = 0.5  # share of the difficulty that moves from activations to weights
    activations: Literal["dynamic", "static"] = "dynamic"
    bits: Literal[8] = 8
    group_size: Literal[-1] = -1

    def __post_init__(self) -> None:
        _check_between("alpha", self.alpha, 0.0, 1.0)

    @property
    def scheme(self) -> Scheme:
        return Scheme(bits=8, group_size=-1, symmetric=True, activations=self.activations)


Method: TypeAlias = RTN | GPTQ | AWQ | SmoothQuant
METHODS: Mapping[str, type[Method]] = {"rtn": RTN, "gptq": GPTQ, "awq": AWQ, "smoothquant": SmoothQuant}


@dataclass(frozen=True, kw_only=True, slots=True)
class Common:
    """What every method has beside its own settings."""

    method: str = "gptq"
    format: str = "compressed-tensors"
    samples: int = 128  # calibration windows
    seq_len: int = 512  # tokens of each
    seed: int = 0  # of the choice of windows
    lm_head: bool = False  # quantize the output head too
    precision: Literal["auto", "float32"] = "auto"  # of the calibration's products: BF16 where the machine has it

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SettingsError(f"unknown method `{self.method}`", hint=nearest(self.method, (*METHODS, "convert")))
        if self.format not in FORMATS:
            raise SettingsError(f"unknown format `{self.format}`", hint=nearest(self.format, FORMATS))
        _check_between("samples", self.samples, 1, 1 << 20)
        _check_between("seq_len", self.seq_len, 2, 1 << 20)
        _check_between("seed", self.seed, 0, (1 << 63) - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Convert:
    """`--method convert`: a quantized checkpoint in another format, with the same codes and scales."""

    method: Literal["convert"] = "convert"
    format: str = "compressed-tensors"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise SettingsError(f"unknown format `{self.format}`", hint=nearest(self.format, FORMATS))


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertSettings:
    """The resolved settings of a `quantize` action that converts."""

    common: Convert
    needs_calibration: Literal[False] = False

    def to_json(self) -> dict[str, Json]:
        return to_json(self.common)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeSettings:
    """The resolved settings of a `quantize` action."""

    common: Common
    method: Method

    def to_json(self) -> dict[str, Json]:
        """Flat, every default spelled out."""
        return to_json(self.common) | to_json(self.method)

    def scheme_of(self, prefix: str) -> Scheme | None:
        """How the linear of this name ("model.layers.0.mlp.up_proj") is quantized; None where it is skipped."""
        return self.method.scheme

    @property
    def needs_calibration(self) -> bool:
        """Rounding to nearest needs no text, unless its activations' scales are calibrated."""
        return not isinstance(self.method, RTN) or self.method.activations == "static"


def resolve(settings: Mapping[str, Any]) -> QuantizeSettings | ConvertSettings:
    """From the flat `quantize` section; SettingsError for what is unknown, out of range or does not fit together."""
    if settings.get("method") == "convert":
        return ConvertSettings(common=build(Convert, settings, where="quantize"))
    shared = {f.name for f in dataclasses.fields(Common)}
    common = build(Common, {k: v for k, v in settings.items() if k in shared}, where="quantize")
    cls = METHODS[common.method]
    own = {k: v for k, v in settings.items() if k not in shared}
    known = {f.name for f in dataclasses.fields(cls)}
    for key in own:
        if key not in known:
            owners = [name for name, other in METHODS.items() if key in {f.name for f in dataclasses.fields(other)}]
            hint = f"`{key}` belongs to " + ", ".join(owners) if owners else nearest(key, known | shared)
            raise SettingsError(f"the method `{common.method}` has no setting `{key}`", hint=hint)
    method = build(cls, own, where="quantize")
    check_scheme(common.format, method.scheme)
    return QuantizeSettings(common=common, method=method)


def _check_weights(method: RTN | GPTQ | AWQ) -> None:
    _check_between("bits", method.bits, 2, 8)
    if method.group_size not in GROUP_SIZES:
        raise SettingsError(
            f"`group_size` cannot be {method.group_size}", hint="known: 32, 64, 128, and -1 for one group a row"
        )


def _check_between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise SettingsError(f"`{name}` cannot be {value}", hint=f"it lies between {low} and {high}")
