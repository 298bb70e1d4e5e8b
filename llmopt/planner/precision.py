"""The precisions a model can be served in: what its weights take, and which arithmetic multiplies them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llmopt.errors import SettingsError, nearest
from llmopt.planner.hardware import Hardware
from llmopt.planner.shape import Linear, ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """How the linears of the blocks are stored and multiplied; what is not quantized takes `plain_bytes` each.

    group_size: in-features that share a scale of `scale_bytes`, -1 for a row, 0 for the tensor. arithmetic: the peak of
    the hardware table that products run at; cpu_arithmetic and cpu_head_bits: what our CPU engine does instead, which
    rounds activations to int8 while it runs, and the head to int8 (docs/decisions/0005). experts_only: the rest of a
    mixture is plain.
    """

    name: str
    bits: float
    group_size: int = 0
    scale_bytes: float = 0.0
    plain_bytes: int = 2
    arithmetic: str = "fp16"
    cpu_arithmetic: str | None = None
    cpu_head_bits: float | None = None
    experts_only: bool = False

    def on(self, kind: str) -> Precision:
        """As it is run on hardware of this kind."""
        return replace(self, arithmetic=self.cpu_arithmetic) if kind == "cpu" and self.cpu_arithmetic else self

    def linear_bytes(self, linear: Linear) -> float:
        """Of one of its `count`, with scales."""
        if self.experts_only and linear.count == 1:
            return linear.rows * linear.columns * self.plain_bytes
        groups = {-1: linear.rows, 0: 1}.get(self.group_size)
        if groups is None:
            groups = linear.rows * -(-linear.columns // self.group_size)
        return linear.rows * linear.columns * self.bits / 8 + groups * self.scale_bytes

    def head_bytes(self, head: Linear, kind: str) -> float:
        if kind == "cpu" and self.cpu_head_bits is not None:
            return head.rows * (head.columns * self.cpu_head_bits / 8 + 2)
        return head.parameters * float(self.plain_bytes)


#: By the name a user gives, from the widest. fp16 stands for bf16, which takes the same.
PRECISIONS: Mapping[str, Precision] = {
    row.name: row
    for row in (
        Precision(name="fp32", bits=32, plain_bytes=4, arithmetic="fp32"),
        Precision(name="fp16", bits=16),
        Precision(name="fp8", bits=8, scale_bytes=4, arithmetic="fp8"),
        Precision(name="int8", bits=8, group_size=-1, scale_bytes=4, arithmetic="int8", cpu_head_bits=8),
        Precision(name="w4a16", bits=4, group_size=128, scale_bytes=2, cpu_arithmetic="int8", cpu_head_bits=8),
    )
}

#: Bytes of an element of the KV cache, by the name a user gives.
KV_PRECISIONS: Mapping[str, int] = {"fp32": 4, "fp16": 2, "fp8": 1, "int8": 1}


def find(name: str) -> Precision:
    wanted = {"bf16": "fp16", "int4": "w4a16", "w8a8": "int8"}.get(name.lower(), name.lower())
    if wanted not in PRECISIONS:
        raise SettingsError(f"unknown precision `{name}`", hint=nearest(wanted, PRECISIONS))
    return PRECISIONS[wanted]


def kv_bytes(name: str) -> int:
    if name not in KV_PRECISIONS:
        raise SettingsError(f"the KV cache cannot be `{name}`", hint=nearest(name, KV_PRECISIONS))
    return KV_PRECISIONS[name]


def default_kv(precision: Precision, kind: str) -> str:
    """What a runtime keeps keys and values in where nobody says: our CPU engine in int8, others as they compute."""
    if kind == "cpu":
        return "int8"
    return "fp32" if precision.name == "fp32" else "fp16"


def unsupported(precision: Precision, hardware: Hardware, kv_precision: str = "fp16") -> str | None:
    """Why the hardware does not run the precision, or the KV cache's; None where it does, or where nothing is known."""
    device = hardware.device or hardware.name
    if hardware.flops and precision.on(hardware.kind).arithmetic not in hardware.flops:
        return f"{device} has no {precision.arithmetic.upper()} arithmetic"
    if hardware.flops and kv_precision == "fp8" and "fp8" not in hardware.flops:
        return f"{device} has no FP8 arithmetic, which a KV cache in FP8 needs"
    return None


def stored(shape: ModelShape) -> Precision | None:
    """The precision in which a quantized checkpoint lies on disk, by its `quantization_config`; None where plain.

    Raises SettingsError for a quantization that it does not know.
    """
    config = shape.quantization
    if not config:
        return None
    method = str(config.get("quant_method"))
    found = _STORED[method](config) if method in _STORED else None
    if found is None:
        raise SettingsError(
            f"the checkpoint is quantized as `{method}`, of which the planner knows no sizes",
            hint="plan the model it was made from; known: " + ", ".join(f"`{name}`" for name in sorted(_STORED)),
        )
    return found


def _integers(label: str, bits: int, group_size: int, activations: bool) -> Precision:
    """Integer weights; with quantized activations they are multiplied as integers."""
    grouped = f" g{group_size}" if group_size > 0 else ""
    return Precision(
        name=f"{label} {'w8a8' if activations else f'w{bits}a16'}{grouped}",
        bits=bits,
        group_size=group_size or -1,
        scale_bytes=2 + (bits / 8 if group_size > 0 else 0),  # a scale, and a zero point where there are groups
        arithmetic="int8" if activations else "fp16",
        cpu_arithmetic="int8",
        cpu_head_bits=8,
    )


def _gptq(config: Mapping[str, Any]) -> Precision:
    label = str(config["quant_method"])
    return _integers(label, int(config.get("bits", 4)), int(config.get("group_size", 128)), False)


def _fp8(config: Mapping[str, Any]) -> Precision:
    """vLLM's (one scale a tensor) and DeepSeek's (one for each block of 128 by 128)."""
    block = config.get("weight_block_size")
    return replace(PRECISIONS["fp8"], name="fp8 as stored", group_size=0 if block is None else int(block[1]) ** 2)


def _mxfp4(config: Mapping[str, Any]) -> Precision:
    """OCP Microscaling: groups of 32 with a scale of 8 bits; GPT-OSS has only its experts so."""
    return Precision(name="mxfp4", bits=4, group_size=32, scale_bytes=1, experts_only=True)


def _compressed(config: Mapping[str, Any]) -> Precision | None:
    groups = [group for group in (config.get("config_groups") or {}).values() if group.get("weights")]
    if not groups:
        return None
    weights = groups[0]["weights"]
    bits, group = int(weights.get("num_bits", 8)), int(weights.get("group_size") or -1)
    if weights.get("type") == "float":
        return replace(PRECISIONS["fp8"], name="compressed-tensors fp8") if bits == 8 else None
    return _integers("compressed-tensors", bits, group, bool(groups[0].get("input_activations")))


def _modelopt(config: Mapping[str, Any]) -> Precision | None:
    inner = config.get("quantization") or config
    algorithm, group = str(inner.get("quant_algo", "")).upper(), int(inner.get("group_size") or 128)
    if algorithm.startswith("FP8"):
        return replace(PRECISIONS["fp8"], name="modelopt fp8")
    if algorithm == "W4A16_AWQ":
        return _integers("modelopt", 4, group, False)
    return _integers("modelopt", 8, -1, True) if algorithm in ("INT8_SQ", "W8A8_SQ_PER_CHANNEL") else None


_STORED = {
    "gptq": _gptq,
    "awq": _gptq,
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
    "modelopt": _modelopt,
}
