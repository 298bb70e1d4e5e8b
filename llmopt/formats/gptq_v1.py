"""GPTQ v1 (`checkpoint_format: gptq`): what AutoGPTQ wrote and every GPU runtime reads.

qweight int32 [I * bits / 32, O], packed along the in-features; qzeros int32 [G, O * bits / 32], each zero point stored
minus one (modulo 2**bits); scales F16 [G, O]; g_idx int32 [I], the group of each in-feature. What we write has groups
of consecutive columns; what others write with `desc_act` has not, and is read too, as is v2 (zero points as they are).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmopt.errors import LlmoptError
from llmopt.formats.base import (
    HALVES,
    Grid,
    Layout,
    Part,
    QuantizedWeight,
    Stored,
    Tensors,
    pack_bits,
    regroup,
    scale_part,
    store_float,
    unpack_bits,
)
from llmopt.formats.scheme import FORMATS, KVCache, Scheme, Schemes, outside_blocks


class GPTQv1:
    name = "gptq"
    scale_dtype: str | None = "F16"

    def layout(self, shape: tuple[int, int], scheme: Scheme) -> Layout:
        return _layout(shape, scheme)

    def encode(
        self, weight: QuantizedWeight, scheme: Scheme, dtype: str, input_scale: float | None
    ) -> dict[str, Stored]:
        zero_GO = np.ascontiguousarray(weight.stored_zeros().T)
        stored_GO = (zero_GO - np.uint8(1)) & np.uint8((1 << weight.bits) - 1)
        g_idx = np.arange(weight.codes_OI.shape[1], dtype=np.int32) // np.int32(weight.group_size)
        return {
            "qweight": Stored("I32", np.ascontiguousarray(pack_bits(weight.codes_OI, weight.bits).T)),
            "qzeros": Stored("I32", pack_bits(stored_GO, weight.bits)),
            "scales": store_float(np.ascontiguousarray(weight.scale_OG.T), "F16"),
            "g_idx": Stored("I32", g_idx),
        }

    def encode_kv(self, k_scale: float, v_scale: float) -> dict[str, Stored]:
        return {}

    def config(self, schemes: Schemes, *, kv_cache: KVCache = "none") -> dict[str, Any]:
        scheme = next(scheme for scheme in schemes.values() if scheme is not None)
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "sym": scheme.symmetric,
            "desc_act": False,
            "lm_head": any(outside_blocks(prefix) for prefix, scheme in schemes.items() if scheme is not None),
        }

    def extra_files(self, schemes: Schemes, kv_cache: KVCache = "none") -> Mapping[str, dict[str, Any]]:
        return {}


def read(config: Mapping[str, Any]) -> Reading:
    """The encoding of a checkpoint by any tool; raises LlmoptError naming what is not supported."""
    form = config.get("checkpoint_format") or config.get("format") or "gptq"
    if config.get("is_marlin_format"):
        form = "marlin"
    if form not in ("gptq", "gptq_v2"):
        raise LlmoptError(
            f"the GPTQ checkpoint format `{form}` is not supported", hint="`gptq` and `gptq_v2` are: convert it to one"
        )
    default = {"bits": config.get("bits"), "group_size": config.get("group_size"), "sym": config.get("sym", True)}
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise LlmoptError("the `dynamic` of a GPTQ checkpoint is not a mapping of patterns to settings")
    return Reading(
        default=_scheme(default),
        rules={
            pattern: None if pattern.startswith("-:") else _scheme(default | dict(own))
            for pattern, own in dynamic.items()
        },
        offset=1 if form == "gptq" else 0,
        reordered=bool(config.get("desc_act", False)),
    )


def _scheme(values: Mapping[str, Any]) -> Scheme:
    bits, size = values["bits"], values["group_size"]
    if bits not in FORMATS["gptq"].bits or not isinstance(size, int) or (size < 1 and size != -1):
        raise LlmoptError(f"GPTQ with {bits} bits and a group size of {size} is not supported")
    return Scheme(bits=bits, group_size=size, symmetric=bool(values["sym"]))


@dataclass(frozen=True, slots=True)
class Reading:
    """`rules` is GPTQModel's `dynamic`: the first regular expression that matches a linear's name has its scheme.

    offset: what is stored less than the zero point. reordered: groups are not consecutive, so that g_idx is needed.
    """

    default: Scheme
    rules: Mapping[str, Scheme | None]
    offset: int
    reordered: bool
    kv_cache: KVCache = "none"

    def scheme(self, prefix: str) -> Scheme | None:
        for pattern, scheme in self.rules.items():
            if re.match(pattern.removeprefix("-:").removeprefix("+:"), prefix):
                return scheme
        return self.default

    def layout(self, shape: tuple[int, int], scheme: Scheme, present: Collection[str]) -> Layout:
        layout = dict(_layout(shape, scheme))
        if "g_idx" not in present and not self.reordered:
            del layout["g_idx"]  # some tools leave it out where it says nothing
        return layout

    def grid(self, tensors: Tensors, shape: tuple[int, int], scheme: Scheme) -> Grid:
        stored_GO = unpack_bits(tensors["qzeros"], scheme.bits, shape[0])
        zero_GO = (stored_GO + np.uint8(self.offset)) & np.uint8((1 << scheme.bits) - 1)
        # The encoding always has zero points; where all are the middle, nothing is lost by leaving them out.
        middle = (zero_GO == 1 << (scheme.bits - 1)).all()
        return Grid(
            scale_OG=np.ascontiguousarray(tensors["scales"].T),
            zero_OG=None if middle else np.ascontiguousarray(zero_GO.T),
            order_I=regroup(tensors["g_idx"], len(zero_GO)) if "g_idx" in tensors else None,
        )

    def codes(self, tensors: Tensors, shape: tuple[int, int], scheme: Scheme) -> np.ndarray:
        return unpack_bits(np.ascontiguousarray(tensors["qweight"].T), scheme.bits, shape[1])


def _layout(shape: tuple[int, int], scheme: Scheme) -> Layout:
    out_features, in_features = shape
    if out_features * scheme.bits % 32 or in_features * scheme.bits % 32:
        raise LlmoptError(
            f"the format `gptq` cannot hold a linear of {out_features} x {in_features} at {scheme.bits} bits",
            hint="its sizes must be multiples of 32; use the format `compressed-tensors`",
        )
    scale_part(shape, scheme)
    groups = scheme.groups(in_features)
    return {
        "qweight": Part(("I32",), ((in_features * scheme.bits // 32, out_features),)),
        "qzeros": Part(("I32",), ((groups, out_features * scheme.bits // 32),)),
        "scales": Part(HALVES, ((groups, out_features),)),
        "g_idx": Part(("I32", "I64"), ((in_features,),)),
    }
