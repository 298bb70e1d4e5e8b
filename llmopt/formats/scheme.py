"""What can be written in which format, as data: read by settings and `--help`, so nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from llmopt.errors import SettingsError

Activations: TypeAlias = Literal["none", "dynamic", "static"]
Kind: TypeAlias = Literal["int", "float"]
KVCache: TypeAlias = Literal["none", "fp8", "int8"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """How a linear is quantized.

    `group_size` counts in-features that share a scale, -1 for the whole row, 0 for the whole tensor. `activations`:
    in 8 bits of the same kind, per token (dynamic) or per tensor (static), or not at all. `kind`: whole numbers, or
    FP8 E4M3 ("float": 8 bits, symmetric).
    """

    bits: int
    group_size: int
    symmetric: bool
    activations: Activations = "none"
    kind: Kind = "int"

    def groups(self, in_features: int) -> int:
        return 1 if self.group_size <= 0 else in_features // self.group_size


@dataclass(frozen=True, kw_only=True, slots=True)
class FormatRow:
    """A row of FORMATS: the class that writes and reads the format, and what the format holds."""

    implementation: str
    bits: tuple[int, ...]
    activations: bool = False


#: By the name a user gives, which is also `quant_method` in config.json.
FORMATS: Mapping[str, FormatRow] = {
    "compressed-tensors": FormatRow(
        implementation="llmopt.formats.compressed:CompressedTensors", bits=(2, 3, 4, 5, 6, 7, 8), activations=True
    ),
    "gptq": FormatRow(implementation="llmopt.formats.gptq_v1:GPTQv1", bits=(2, 3, 4, 8)),
    "awq": FormatRow(implementation="llmopt.formats.awq_gemm:AWQGemm", bits=(4,)),
}


def check_scheme(name: str, scheme: Scheme) -> None:
    """SettingsError unless the format `name` of FORMATS can hold `scheme`."""
    row = FORMATS[name]
    if scheme.bits not in row.bits:
        listed = ", ".join(str(bits) for bits in row.bits)
        raise SettingsError(
            f"the format `{name}` cannot hold {scheme.bits}-bit weights",
            hint=f"it holds {listed} bits; `compressed-tensors` holds 2 to 8",
        )
    if scheme.activations == "none":
        return
    if not row.activations:
        raise SettingsError(
            f"the format `{name}` cannot hold quantized activations", hint="use the format `compressed-tensors`"
        )
    if scheme.bits != 8 or scheme.group_size != -1 or not scheme.symmetric:
        raise SettingsError(
            "int8 activations need symmetric 8-bit weights with one scale a row",
            hint="set `bits: 8`, `group_size: -1`, `symmetric: true`",
        )
