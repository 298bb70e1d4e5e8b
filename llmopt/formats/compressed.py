"""compressed-tensors: packed integers, int8 with int8 activations, and FP8. vLLM's and transformers' own.

Source: vllm-project/compressed-tensors 0.20, compressors/pack_quantized and naive_quantized, utils/match. Integers are
stored signed; packing adds 2**(bits - 1) back, so the packed bits are ours. Packing is dense (32 codes in `bits`
words); before that, 3, 5, 6 and 7 bits were packed as many to a word as fit, which is read too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmopt.errors import LlmoptError
from llmopt.formats.base import (
    Grid,
    Layout,
    Part,
    QuantizedWeight,
    Stored,
    Tensors,
    of_tensor,
    pack_bits,
    regroup,
    scale_part,
    spread,
    store_codes,
    store_float,
    unpack_bits,
)
from llmopt.formats.scheme import Activations, Kind, KVCache, Scheme, Schemes

_PACKED, _INT, _FLOAT = "pack-quantized", "int-quantized", "float-quantized"
_BLOCK = 128  # rows and columns of the only FP8 block in use (DeepSeek-V3)


class CompressedTensors:
    name = "compressed-tensors"
    scale_dtype: str | None = None

    def layout(self, shape: tuple[int, int], scheme: Scheme) -> Layout:
        static: Layout = (
            {"input_scale": Part(("BF16", "F16", "F32"), ((1,),))} if scheme.activations == "static" else {}
        )
        return {**_layout(shape, scheme, ()), **static}

    def encode(
        self, weight: QuantizedWeight, scheme: Scheme, dtype: str, input_scale: float | None
    ) -> dict[str, Stored]:
        scale = of_tensor(weight.scale_OG) if scheme.group_size == 0 else weight.scale_OG
        tensors = {"weight_scale": store_float(scale, dtype)}
        if input_scale is not None:
            tensors["input_scale"] = store_float(np.array([input_scale]), dtype)
        if scheme.kind == "float":
            return {"weight": store_codes(weight.codes_OI), **tensors}
        if scheme.activations != "none":
            return {"weight": Stored("I8", (weight.codes_OI ^ np.uint8(128)).view(np.int8)), **tensors}
        tensors["weight_packed"] = Stored("I32", pack_bits(weight.codes_OI, weight.bits))
        tensors["weight_shape"] = Stored("I64", np.array(weight.codes_OI.shape, np.int64))
        if not scheme.symmetric:
            packed_GW = pack_bits(np.ascontiguousarray(weight.stored_zeros().T), weight.bits)
            tensors["weight_zero_point"] = Stored("I32", np.ascontiguousarray(packed_GW.T))
        return tensors

    def encode_kv(self, k_scale: float, v_scale: float) -> dict[str, Stored]:
        return {
            "k_scale": Stored("F32", np.array([k_scale], np.float32)),
            "v_scale": Stored("F32", np.array([v_scale], np.float32)),
        }

    def config(self, schemes: Schemes, *, kv_cache: KVCache = "none") -> dict[str, Any]:
        """The scheme of most linears takes the class `Linear`, the others name theirs: a name goes before a class."""
        (usual, _), *others = Counter(scheme for scheme in schemes.values() if scheme is not None).most_common()
        found = [
            _group(scheme, _targets(prefix for prefix, other in schemes.items() if other == scheme))
            for scheme, _ in others
        ] + [_group(usual, ["Linear"])]
        formats = sorted({group["format"] for group in found})
        return {
            "quant_method": self.name,
            "quantization_status": "compressed",
            "format": formats[0] if len(formats) == 1 else "mixed-precision",
            "config_groups": {f"group_{index}": group for index, group in enumerate(found)},
            "ignore": _targets(prefix for prefix, scheme in schemes.items() if scheme is None),
            "kv_cache_scheme": None if kv_cache == "none" else _args("float" if kv_cache == "fp8" else "int", "tensor"),
        }

    def extra_files(self, schemes: Schemes, kv_cache: KVCache = "none") -> Mapping[str, dict[str, Any]]:
        return {}


def _format(scheme: Scheme) -> str:
    if scheme.kind == "float":
        return _FLOAT
    return _PACKED if scheme.activations == "none" else _INT


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    strategy = {-1: "channel", 0: "tensor"}.get(scheme.group_size, "group")
    weights = _args(scheme.kind, strategy) | {"num_bits": scheme.bits, "symmetric": scheme.symmetric}
    if strategy == "group":
        weights["group_size"] = scheme.group_size
    inputs = None
    if scheme.activations == "dynamic":
        inputs = _args(scheme.kind, "token") | {"dynamic": True}
    elif scheme.activations == "static":
        inputs = _args(scheme.kind, "tensor")
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": _format(scheme),
    }


def _args(kind: Kind, strategy: str) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": kind,
        "symmetric": True,
        "strategy": strategy,
        "group_size": None,
        "dynamic": False,
    }


def _targets(prefixes: Iterable[str]) -> list[str]:
    """Names of modules; those that differ in the number of their block only become one regular expression."""
    numbers: dict[tuple[str, ...], list[str]] = {}  # by what stands before and after
    for prefix in prefixes:
        before, *rest = re.split(r"\.(\d+)\.", prefix, maxsplit=1)
        numbers.setdefault((before, *rest[1:]), []).extend(rest[:1])
    targets = []
    for parts, found in numbers.items():
        if len(found) < 2:
            targets.append(f".{found[0]}.".join(parts) if found else parts[0])
        else:
            targets.append(f"re:^{re.escape(parts[0])}\\.({'|'.join(found)})\\.{re.escape(parts[1])}$")
    return targets


def read(config: Mapping[str, Any]) -> Reading:
    """The encoding of a checkpoint by any tool; raises LlmoptError naming what is not supported."""
    if config.get("transform_config") or (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise LlmoptError("a compressed-tensors checkpoint with transforms or sparsity is not supported")
    schemes: dict[str, Scheme] = {}
    for group in config.get("config_groups", {}).values():
        if not isinstance(group, Mapping):
            raise LlmoptError("a compressed-tensors checkpoint with a scheme by name (`W4A16`) is not supported")
        scheme = _scheme(group, group.get("format") or config.get("format"))
        schemes |= dict.fromkeys(group.get("targets", ()), scheme)
    cache = config.get("kv_cache_scheme")
    return Reading(schemes, tuple(config.get("ignore") or ()), "none" if cache is None else _kv_cache(cache))


@dataclass(frozen=True, slots=True)
class Reading:
    """`schemes` by target: a name, `re:` and a regular expression, or the class `Linear`; `ignore` goes before them."""

    schemes: Mapping[str, Scheme]
    ignore: tuple[str, ...]
    kv_cache: KVCache

    def scheme(self, prefix: str) -> Scheme | None:
        if any(_matches(target, prefix) for target in self.ignore):
            return None
        named = sorted(self.schemes, key=lambda target: (target == "Linear", target.startswith("re:"), target))
        return next((self.schemes[target] for target in named if _matches(target, prefix)), None)

    def layout(self, shape: tuple[int, int], scheme: Scheme, present: Collection[str]) -> Layout:
        return _layout(shape, scheme, present)

    def grid(self, tensors: Tensors, shape: tuple[int, int], scheme: Scheme) -> Grid:
        scale_OG = spread(tensors["weight_scale"], shape, scheme)
        zero, g_idx = tensors.get("weight_zero_point"), tensors.get("weight_g_idx")
        if zero is not None and zero.dtype == np.int8:
            zero = _unsigned(zero, scheme.bits).reshape(scale_OG.shape)
        elif zero is not None:
            zero = np.ascontiguousarray(_unpack(np.ascontiguousarray(zero.T), scheme.bits, shape[0]).T)
        reordered = g_idx is not None and (g_idx >= 0).all()  # -1: the tool made the tensor and never filled it
        order_I = regroup(g_idx, scale_OG.shape[1]) if g_idx is not None and reordered else None
        return Grid(scale_OG=scale_OG, zero_OG=zero, order_I=order_I)

    def codes(self, tensors: Tensors, shape: tuple[int, int], scheme: Scheme) -> np.ndarray:
        if "weight_packed" in tensors:
            return _unpack(tensors["weight_packed"], scheme.bits, shape[1])
        return tensors["weight"] if scheme.kind == "float" else _unsigned(tensors["weight"], scheme.bits)


def _unsigned(codes: np.ndarray, bits: int) -> np.ndarray:
    """int8 codes around 0 as uint8 ones."""
    return (codes.view(np.uint8) + np.uint8(1 << (bits - 1))).astype(np.uint8)


def _layout(shape: tuple[int, int], scheme: Scheme, present: Collection[str]) -> Layout:
    out_features, in_features = shape
    layout: dict[str, Part] = {"weight_scale": scale_part(shape, scheme)}
    groups = scheme.groups(in_features)
    zero = Part(("I8",), ((out_features, groups), (out_features,)))
    if "weight_packed" in present or (_format(scheme) == _PACKED and "weight" not in present):
        layout["weight_packed"] = Part(("I32",), tuple((out_features, n) for n in _words(in_features, scheme.bits)))
        layout["weight_shape"] = Part(("I64", "I32"), ((2,),))
        packed = tuple((n, groups) for n in _words(out_features, scheme.bits))
        zero = Part(("I32", "I8"), (*packed, *zero.shapes))
    else:
        layout["weight"] = Part(("F8_E4M3",) if scheme.kind == "float" else ("I8",), (shape,))
    if not scheme.symmetric:
        layout["weight_zero_point"] = zero
    if "weight_g_idx" in present:
        layout["weight_g_idx"] = Part(("I32", "I64"), ((in_features,),))
    return layout


def _words(codes: int, bits: int) -> tuple[int, ...]:
    """Words that a row of codes takes: packed densely, or as many to a word as fit."""
    return (-(-codes * bits // 32), -(-codes // (32 // bits)))


def _unpack(packed_RW: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """uint8 [R, columns] of either packing, told apart by the words that a row takes (as many: dense)."""
    if packed_RW.shape[1] == _words(columns, bits)[0]:
        return unpack_bits(packed_RW, bits, columns)
    words = np.ascontiguousarray(packed_RW).view(np.uint32)
    fields = [words >> np.uint32(bits * place) & np.uint32((1 << bits) - 1) for place in range(32 // bits)]
    return np.stack(fields, axis=2).reshape(len(words), -1)[:, :columns].astype(np.uint8)


def _matches(target: str, prefix: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), prefix) is not None
    return target in ("Linear", prefix)


def _scheme(group: Mapping[str, Any], form: str | None) -> Scheme:
    weights, inputs = group.get("weights"), group.get("input_activations")
    if form not in (_PACKED, _INT, _FLOAT, "naive-quantized") or weights is None or group.get("output_activations"):
        raise LlmoptError(f"the compressed-tensors format `{form}` is not supported")
    size, bits, kind = weights.get("group_size"), int(weights["num_bits"]), weights.get("type", "int")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    symmetric, integers = bool(weights.get("symmetric", True)), kind == "int"
    if strategy == "block" and not integers:
        if list(weights.get("block_structure") or ()) != [_BLOCK, _BLOCK]:
            raise LlmoptError(f"FP8 blocks of `{weights.get('block_structure')}` are not supported", hint="128 are")
        size = _BLOCK
    elif strategy not in ("tensor", "channel", "group") or (strategy == "group" and not integers):
        raise LlmoptError(f"compressed-tensors weights of `{strategy}` are not supported")
    if not 2 <= bits <= 8 or (not integers and (bits != 8 or not symmetric)):
        raise LlmoptError(f"compressed-tensors weights of {bits}-bit `{kind}` are not supported")
    return Scheme(
        bits=bits,
        group_size={"tensor": 0, "channel": -1}.get(strategy, size),
        symmetric=symmetric,
        activations="none" if inputs is None else _activations(inputs, kind, bits, blocks=strategy == "block"),
        kind=kind,
    )


def _activations(inputs: Mapping[str, Any], kind: str, bits: int, *, blocks: bool) -> Activations:
    """`dynamic` or `static`; LlmoptError for what we would compute otherwise."""
    dynamic, strategy = bool(inputs.get("dynamic")), inputs.get("strategy") or "tensor"
    symmetric = bool(inputs.get("symmetric", True))
    same = inputs.get("type", "int") == kind and int(inputs.get("num_bits", 8)) == 8 == bits
    per_token = strategy == "token" or (blocks and strategy == "group" and inputs.get("group_size") == _BLOCK)
    if not symmetric or not same or (not per_token if dynamic else strategy != "tensor"):
        raise LlmoptError(
            f"compressed-tensors activations `{'dynamic' if dynamic else 'static'}` by `{strategy}`"
            f"{'' if symmetric else ' with zero points'} beside {bits}-bit `{kind}` weights are not supported",
            hint="int8 by int8 and FP8 by FP8 are: symmetric, per token (dynamic) or per tensor (static)",
        )
    return "dynamic" if dynamic else "static"


def _kv_cache(args: Mapping[str, Any]) -> KVCache:
    if args.get("num_bits", 8) != 8 or args.get("strategy") not in (None, "tensor") or args.get("dynamic"):
        raise LlmoptError("a KV cache that is not static 8-bit with one scale a tensor is not supported")
    return "fp8" if args.get("type", "int") == "float" else "int8"
