"""What can be written in which format, as data: read by settings and `--help`, so nothing heavy is imported here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from llmopt.errors import SettingsError

Activations: TypeAlias = Literal["none", "dynamic", "static"]
Kind: TypeAlias = Literal["int", "float"]
KVCache: TypeAlias = Literal["none", "fp8", "int8"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """How one linear is quantized. `kind` float is FP8 E4M3: 8 bits, symmetric.

    `group_size` counts in-features that share a scale, -1 for the whole row, 0 for the whole tensor.
    `activations`: rounded to the weights' kind in 8 bits, per token (dynamic) or per tensor (static), or not at all.
    """

    bits: int
    group_size: int
    symmetric: bool
    activations: Activations = "none"
    kind: Kind = "int"

    def groups(self, in_features: int) -> int:
        return 1 if self.group_size <= 0 else in_features // self.group_size


#: The full prefix of every linear ("model.layers.0.mlp.up_proj", and the head) to its scheme, None where it is plain.
Schemes: TypeAlias = Mapping[str, Scheme | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Holds:
    """One kind of quantized linear that a format holds."""

    bits: tuple[int, ...]
    kind: Kind = "int"
    groups: tuple[str, ...] = ("group", "row")  # and "tensor": in-features that can share a scale
    symmetric: tuple[bool, ...] = (True, False)
    activations: tuple[Activations, ...] = ("none",)


@dataclass(frozen=True, kw_only=True, slots=True)
class FormatRow:
    """A row of FORMATS: the class that writes the format, and what the format holds.

    plain: whether linears other than the head can be left unquantized. mixed: whether linears can differ.
    """

    implementation: str
    holds: tuple[Holds, ...]
    plain: bool = False
    mixed: bool = False
    kv_cache: tuple[KVCache, ...] = ("none",)

    @property
    def bits(self) -> tuple[int, ...]:
        return tuple(sorted({bits for row in self.holds for bits in row.bits}))


_WIDEST = "compressed-tensors"
_W8A8 = Holds(bits=(8,), groups=("row",), symmetric=(True,), activations=("dynamic", "static"))

#: By the name a user gives, which is also `quant_method` in config.json.
FORMATS: Mapping[str, FormatRow] = {
    "compressed-tensors": FormatRow(
        implementation="llmopt.formats.compressed:CompressedTensors",
        holds=(
            Holds(bits=(2, 3, 4, 5, 6, 7, 8)),
            _W8A8,
            Holds(
                bits=(8,),
                kind="float",
                groups=("row", "tensor"),
                symmetric=(True,),
                activations=("none", "dynamic", "static"),
            ),
        ),
        plain=True,
        mixed=True,
        kv_cache=("none", "fp8", "int8"),
    ),
    "gptq": FormatRow(implementation="llmopt.formats.gptq_v1:GPTQv1", holds=(Holds(bits=(2, 3, 4, 8)),)),
    "awq": FormatRow(implementation="llmopt.formats.awq_gemm:AWQGemm", holds=(Holds(bits=(4,)),), plain=True),
    "modelopt": FormatRow(
        implementation="llmopt.formats.modelopt:ModelOpt",
        holds=(
            Holds(bits=(4,), groups=("group",), symmetric=(True,)),
            Holds(bits=(8,), groups=("row",), symmetric=(True,), activations=("none", "static")),
            Holds(bits=(8,), kind="float", groups=("tensor",), symmetric=(True,), activations=("static",)),
            Holds(bits=(8,), kind="float", groups=("row",), symmetric=(True,), activations=("dynamic",)),
        ),
        plain=True,
        mixed=True,
        kv_cache=("none", "fp8"),
    ),
}

#: What reads the encodings, by `quant_method`; those of other tools that are never written among them.
READERS: Mapping[str, str] = {
    "compressed-tensors": "llmopt.formats.compressed:read",
    "gptq": "llmopt.formats.gptq_v1:read",
    "awq": "llmopt.formats.awq_gemm:read",
    "modelopt": "llmopt.formats.modelopt:read",
    "fp8": "llmopt.formats.fp8:read",
}


def check_scheme(name: str, scheme: Scheme) -> None:
    """SettingsError unless the format `name` of FORMATS can hold a linear of `scheme`."""
    _check_combination(scheme)
    numbers = "FP8 weights" if scheme.kind == "float" else f"{scheme.bits}-bit weights"
    sharing = {-1: "row", 0: "tensor"}.get(scheme.group_size, "group")
    inputs = "plain activations" if scheme.activations == "none" else f"quantized activations ({scheme.activations})"
    left = FORMATS[name].holds
    for aspect, value, cannot, holds in (
        ("kind", scheme.kind, numbers, "weights of the kind {}"),
        ("bits", scheme.bits, numbers, "{} bits"),
        ("activations", scheme.activations, f"{inputs} beside {numbers}", "activations {}"),
        ("groups", sharing, f"{numbers} with one scale a {sharing}", "one scale a {}"),
        ("symmetric", scheme.symmetric, f"zero points beside {numbers}", "no zero points"),
    ):
        values = [_values(row, aspect) for row in left]
        left = tuple(row for row, found in zip(left, values, strict=True) if value in found)
        if not left:
            listed = ", ".join(sorted({str(each) for found in values for each in found}))
            other = "" if name == _WIDEST else f"; `{_WIDEST}` holds more"
            raise SettingsError(
                f"the format `{name}` cannot hold {cannot}", hint=f"it holds {holds.format(listed)}{other}"
            )


def is_held(name: str, scheme: Scheme) -> bool:
    """Whether the format can hold a linear of `scheme`."""
    try:
        check_scheme(name, scheme)
    except SettingsError:
        return False
    return True


def check_schemes(name: str, schemes: Schemes, kv_cache: KVCache = "none") -> None:
    """SettingsError unless the format `name` can hold all of `schemes` in one checkpoint, with this KV cache."""
    row = FORMATS[name]
    used = list(dict.fromkeys(scheme for scheme in schemes.values() if scheme is not None))
    for scheme in used:
        check_scheme(name, scheme)
    if len(used) > 1 and not row.mixed:
        raise SettingsError(
            f"the format `{name}` holds one scheme for all linears, not {len(used)}",
            hint="`compressed-tensors` and `modelopt` hold several",
        )
    plain = [prefix for prefix, scheme in schemes.items() if scheme is None and not outside_blocks(prefix)]
    if plain and not row.plain:
        raise SettingsError(
            f"the format `{name}` cannot leave `{plain[0]}` unquantized",
            hint="it leaves out the output head only; use the format `compressed-tensors`",
        )
    if kv_cache not in row.kv_cache:
        holding = ", ".join(f"`{other}`" for other, found in FORMATS.items() if kv_cache in found.kv_cache)
        raise SettingsError(
            f"the format `{name}` cannot hold scales of a KV cache in {kv_cache}", hint=f"use {holding}"
        )


def outside_blocks(prefix: str) -> bool:
    """Whether a linear is no block's (the head), going by its name: blocks are numbered."""
    return re.search(r"\.\d+\.", prefix) is None


def _check_combination(scheme: Scheme) -> None:
    """What no format and no runtime has."""
    if scheme.kind == "float" and (scheme.bits != 8 or not scheme.symmetric):
        raise SettingsError("FP8 weights are 8-bit and symmetric", hint="set `bits: 8`, `symmetric: true`")
    w8 = scheme.bits == 8 and scheme.group_size == -1 and scheme.symmetric
    if scheme.kind == "int" and scheme.activations != "none" and not w8:
        raise SettingsError(
            "int8 activations need symmetric 8-bit weights with one scale a row",
            hint="set `bits: 8`, `group_size: -1`, `symmetric: true`",
        )


def _values(row: Holds, aspect: str) -> tuple[object, ...]:
    value = getattr(row, aspect)
    return value if isinstance(value, tuple) else (value,)
