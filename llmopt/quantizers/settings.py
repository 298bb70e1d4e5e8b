"""Settings of each method, one frozen dataclass each; no torch here, so that a typo costs no import."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

from llmopt.artifacts.outcome import Json
from llmopt.errors import SettingsError, nearest
from llmopt.formats.scheme import FORMATS, Activations, KVCache, Scheme, check_scheme, check_schemes
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
    scaling: Literal["none", "awq", "smoothquant"] = "none"  # of the input channels, searched, before the rounding
    activations: Activations = "none"  # int8 inputs, which need `bits: 8` and `group_size: -1`

    def __post_init__(self) -> None:
        _check_weights(self)
        _check_between("damping", self.damping, 0.0, 1.0)
        _check_between("sweeps", self.sweeps, 0, 100)
        if self.scaling == "smoothquant" and self.activations == "none":
            raise SettingsError(
                "`scaling: smoothquant` makes inputs easier to quantize, and `activations` leaves them as they are",
                hint="set `activations: dynamic`, or use `scaling: awq`",
            )

    @property
    def scheme(self) -> Scheme:
        return Scheme(
            bits=self.bits, group_size=self.group_size, symmetric=self.symmetric, activations=self.activations
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AWQ:
    """Lin et al., arXiv:2306.00978; with zero points unless `symmetric`, as its authors have it.

    With `sweeps: 0` no more than the paper has.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    grid: int = 20  # exponents tried for the channel scales
    clip: bool = True  # search a smaller range for each group
    sweeps: int = 3  # refinements of each group's codes and scale after the rounding

    def __post_init__(self) -> None:
        _check_weights(self)
        _check_between("grid", self.grid, 1, 1000)
        _check_between("sweeps", self.sweeps, 0, 100)

    @property
    def scheme(self) -> Scheme:
        return Scheme(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)


@dataclass(frozen=True, kw_only=True, slots=True)
class SmoothQuant:
    """Xiao et al., arXiv:2211.10438: W8A8, one scale a row of the weights."""

    alpha: float | Literal["search"] = "search"  # share of the difficulty that moves from activations to weights
    activations: Literal["dynamic", "static"] = "dynamic"
    bits: Literal[8] = 8
    group_size: Literal[-1] = -1

    def __post_init__(self) -> None:
        if self.alpha != "search":
            _check_between("alpha", self.alpha, 0.0, 1.0)

    @property
    def scheme(self) -> Scheme:
        return Scheme(bits=8, group_size=-1, symmetric=True, activations=self.activations)


@dataclass(frozen=True, kw_only=True, slots=True)
class FP8:
    """Weights and activations as E4M3 floats (Micikevicius et al., arXiv:2209.05433), rounded to nearest."""

    weights: Literal["channel", "tensor"] = "channel"  # what shares a scale
    activations: Activations = "dynamic"

    @property
    def scheme(self) -> Scheme:
        size = -1 if self.weights == "channel" else 0
        return Scheme(bits=8, group_size=size, symmetric=True, activations=self.activations, kind="float")


Method: TypeAlias = RTN | GPTQ | AWQ | SmoothQuant | FP8
METHODS: Mapping[str, type[Method]] = {"rtn": RTN, "gptq": GPTQ, "awq": AWQ, "smoothquant": SmoothQuant, "fp8": FP8}


@dataclass(frozen=True, kw_only=True, slots=True)
class Override:
    """What some linears have in place of the method's own settings; None keeps the method's."""

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    skip: bool = False  # leave them as they are

    def __post_init__(self) -> None:
        own = [name for name in ("bits", "group_size", "symmetric") if getattr(self, name) is not None]
        if self.skip == bool(own):
            raise SettingsError(
                "`overrides` cannot both skip a linear and quantize it" if own else "`overrides` changes nothing",
                hint="give `skip: true`, or some of `bits`, `group_size`, `symmetric`",
            )
        if self.bits is not None:
            _check_between("bits", self.bits, 2, 8)
        if self.group_size is not None:
            _check_group_size(self.group_size)

    def apply(self, scheme: Scheme) -> Scheme | None:
        if self.skip:
            return None
        own = {name: getattr(self, name) for name in ("bits", "group_size", "symmetric")}
        return dataclasses.replace(scheme, **{name: value for name, value in own.items() if value is not None})


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
    kv_cache: KVCache = "none"  # calibrate one scale for the keys and one for the values of each block
    overrides: Mapping[str, Override] = field(default_factory=dict)  # by pattern of a linear's name; the last counts
    target_bpw: float | None = None  # bits a weight, scales included; the bits of each linear are chosen to meet it
    target_bits: tuple[int, ...] = ()  # to choose from, such as 4 and 8 for vLLM's kernels; none: all the format holds

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SettingsError(f"unknown method `{self.method}`", hint=nearest(self.method, (*METHODS, "convert")))
        if self.format not in FORMATS:
            raise SettingsError(f"unknown format `{self.format}`", hint=nearest(self.format, FORMATS))
        _check_between("samples", self.samples, 1, 1 << 20)
        _check_between("seq_len", self.seq_len, 2, 1 << 20)
        _check_between("seed", self.seed, 0, (1 << 63) - 1)
        if self.target_bpw is not None:
            _check_between("target_bpw", self.target_bpw, 2.0, 8.5)
        for bits in self.target_bits:
            _check_between("target_bits", bits, 2, 8)
        if self.target_bits and self.target_bpw is None:
            raise SettingsError("`target_bits` is what `target_bpw` chooses from", hint="give `target_bpw` too")


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

    @property
    def needs_calibration(self) -> bool:
        """Rounding to nearest needs no text, unless scales of activations are calibrated, or bits chosen by it."""
        if self.common.kv_cache != "none" or self.common.target_bpw is not None:
            return True
        return not isinstance(self.method, RTN | FP8) or self.method.activations == "static"

    def scheme_of(self, prefix: str) -> Scheme | None:
        """How the linear of this name ("model.layers.0.mlp.up_proj") is quantized; None where it is skipped."""
        found = [override for pattern, override in self.common.overrides.items() if fnmatchcase(prefix, pattern)]
        return found[-1].apply(self.method.scheme) if found else self.method.scheme


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
    check_schemes(common.format, {"": method.scheme}, common.kv_cache)
    _check_overrides(common, method)
    if common.target_bpw is not None and (method.scheme.activations != "none" or method.scheme.kind == "float"):
        raise SettingsError(
            f"`target_bpw` chooses bits, and `{common.method}` needs 8 of them with these settings",
            hint="use it with `gptq`, `awq` or `rtn` without `activations`",
        )
    if common.target_bpw is not None and not FORMATS[common.format].mixed:
        mixed = " or ".join(f"`{name}`" for name, row in FORMATS.items() if row.mixed)
        raise SettingsError(f"the format `{common.format}` holds one scheme for all linears", hint=f"use {mixed}")
    return QuantizeSettings(common=common, method=method)


def _check_overrides(common: Common, method: Method) -> None:
    for pattern, override in common.overrides.items():
        scheme = override.apply(method.scheme)
        if scheme is None:
            continue
        if scheme.kind == "float":
            raise SettingsError(
                f"`overrides.{pattern}` cannot change how `{common.method}` rounds", hint="it can only `skip: true`"
            )
        check_scheme(common.format, scheme)


def _check_weights(method: RTN | GPTQ | AWQ) -> None:
    _check_between("bits", method.bits, 2, 8)
    _check_group_size(method.group_size)


def _check_group_size(group_size: int) -> None:
    if group_size not in GROUP_SIZES:
        raise SettingsError(
            f"`group_size` cannot be {group_size}", hint="known: 32, 64, 128, and -1 for one group a row"
        )


def _check_between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise SettingsError(f"`{name}` cannot be {value}", hint=f"it lies between {low} and {high}")
