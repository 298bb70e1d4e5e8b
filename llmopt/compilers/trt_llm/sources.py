"""What a checkpoint offers engine mode: whether its class has the model, and what each module is made of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmopt.compilers.trt_llm.families import (
    ALGORITHMS,
    AWQ,
    FAMILIES,
    GROUP_SIZES,
    INPUT_NORM,
    MLP_NORM,
    POST_NORM,
    SMOOTH_DYNAMIC,
    EngineFamily,
)
from llmopt.errors import LlmoptError, SettingsError
from llmopt.formats.scheme import KVCache, Scheme

if TYPE_CHECKING:
    from llmopt.compilers.trt_llm.settings import Settings
    from llmopt.formats.reading import Source
    from llmopt.models.config import DecoderConfig
    from llmopt.models.rope import Rope

BUNDLE = "`compile.mode: bundle` serves models without an engine"
QKV, DENSE, FC, GATE, PROJ = "attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"


def block_linears(model: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """The linears of a block that make each module, by TensorRT-LLM's name of it.

    `fc` is what the activation is applied to: Hugging Face's `gate_proj`; `gate` its `up_proj`.
    """
    family = model.family
    found = {QKV: family.qkv, DENSE: (family.o,), FC: family.up[:1], PROJ: (family.down,)}
    return found | ({GATE: family.up[1:]} if family.gated else {})


def find_family(model: DecoderConfig, settings: Settings) -> EngineFamily:
    """The row of a model, with all that its class takes for granted checked."""
    name = model.family.model_type
    family = FAMILIES.get(name)
    if family is None:
        known = ", ".join(f"`{other}`" for other in FAMILIES)
        raise LlmoptError(f"engine mode does not have the model type `{name}`", hint=f"it has {known}; {BUNDLE}")
    if release(settings.version) < family.since:
        first = ".".join(str(part) for part in (*family.since, 0))
        raise SettingsError(
            f"TensorRT-LLM {settings.version} builds no engines of `{name}`", hint=f"{first} was the first that does"
        )
    if settings.expert_parallel > 1:
        raise SettingsError("engine mode has no mixtures of experts here", hint="set `expert_parallel` to 1")
    rope = model.rope
    assert rope is not None
    refused = {
        f"a rotary embedding of the type `{rope.type}`": rope.type not in family.rope_types,
        f"norms with an epsilon of {model.norm_eps}": family.eps not in (None, model.norm_eps),
        f"heads of {model.head_dim} features": not family.heads and model.head_dim * model.heads != model.hidden_size,
        f"an MLP of {model.intermediate_size} features": family.mlp_ratio is not None
        and model.intermediate_size != family.mlp_ratio * model.hidden_size,
        "attention that does not run beside the MLP": name == "gpt_neox" and not model.parallel,
        "a bias of the output projection": not family.dense_bias and model.family.o in model.biases,
        "attention without biases": name in ("gpt_neox", "qwen2") and model.family.qkv[0] not in model.biases,
    }
    for what, is_so in refused.items():
        if is_so:
            raise LlmoptError(f"TensorRT-LLM's class of `{name}` does not have {what}", hint=BUNDLE)
    return family


def release(version: str) -> tuple[int, ...]:
    """The numbers a version starts with: (1, 2, 1) of `1.2.1`, (1, 3, 0) of `1.3.0rc5`."""
    found = re.match(r"\d+(\.\d+)*", version)
    if found is None:
        raise SettingsError(f"`{version}` is no version of TensorRT-LLM", hint="such as `1.2.1`")
    return tuple(int(part) for part in found.group().split("."))


def find_schemes(source: Source) -> dict[str, Scheme | None]:
    """How each module of the blocks is quantized, by TensorRT-LLM's name; None: not at all.

    LlmoptError where linears that make one module, or that the builder fuses, are not quantized alike.
    """
    found: dict[str, Scheme | None] = {}
    model, reader = source.config, source.reader
    if reader is None:
        return found
    for index in range(model.layers):
        schemes = {
            module: {
                prefix: reader.scheme(prefix) for linear in linears for prefix in [f"{model.block(index)}.{linear}"]
            }
            for module, linears in block_linears(model).items()
        }
        # The builder makes one product of `fc` and `gate` where they are FP8 or plain.
        for fused in (schemes[QKV], schemes[FC] | schemes.get(GATE, {})):
            _check_alike(fused)
        for module, own in schemes.items():
            found[f"transformer.layers.{index}.{module}"] = next(iter(own.values()))
    return found


def _check_alike(schemes: Mapping[str, Scheme | None]) -> None:
    (first, scheme), *others = schemes.items()
    for prefix, other in others:
        if other != scheme:
            raise LlmoptError(
                f"`{first}` and `{prefix}`, which TensorRT-LLM fuses, are not quantized alike",
                hint="quantize the original with the same scheme, or skip, for all linears that read one input",
            )


def find_algorithm(family: EngineFamily, schemes: Mapping[str, Scheme | None]) -> tuple[str | None, int]:
    """`quant_algo` and AWQ's group size (else 0) of all schemes."""
    used = list(dict.fromkeys(scheme for scheme in schemes.values() if scheme is not None))
    if not used:
        return None, 0
    if len(used) > 1:
        raise LlmoptError(
            f"the checkpoint mixes {len(used)} schemes, and engine mode holds one",
            hint=f"quantize the original with one scheme; {BUNDLE}",
        )
    scheme = used[0]
    algorithm = AWQ if (scheme.kind, scheme.bits) == ("int", 4) and scheme.activations == "none" else None
    if algorithm is None:
        algorithm = next((name for name, other in ALGORITHMS.items() if other == scheme), None)
    elif scheme.group_size not in GROUP_SIZES:
        sizes = " or ".join(str(size) for size in GROUP_SIZES)
        groups = "one scale a row" if scheme.group_size < 1 else f"groups of {scheme.group_size}"
        raise LlmoptError(
            f"TensorRT-LLM's 4-bit kernels have no weights with {groups}",
            hint=f"quantize the original with `--group-size {GROUP_SIZES[-1]}`: they have groups of {sizes}",
        )
    if algorithm is None:
        raise LlmoptError(f"engine mode cannot hold {_described(scheme)}", hint=_INSTEAD)
    if algorithm not in family.algorithms:
        have = ", ".join(f"`{name}`" for name in family.algorithms)
        raise LlmoptError(
            f"`{algorithm}` is not supported for `{family.model_type}`", hint=f"supported: {have}; {BUNDLE}"
        )
    if algorithm == SMOOTH_DYNAMIC and None in schemes.values():
        plain = next(name for name, scheme in schemes.items() if scheme is None)
        raise LlmoptError(
            f"`{plain}` is not quantized, which `{algorithm}` cannot be told",
            hint="quantize every linear of the blocks, or with static scales of the activations",
        )
    return algorithm, scheme.group_size if algorithm == AWQ else 0


_INSTEAD = (
    "it holds 4 bits in symmetric groups (`--method gptq`, or `awq` with `--symmetric`), W8A8 (`--method smoothquant`) "
    "and FP8 with one static scale a tensor (`--method fp8`); 8-bit weights alone TensorRT-LLM rounds itself"
)


def _described(scheme: Scheme) -> str:
    numbers = "FP8" if scheme.kind == "float" else f"{scheme.bits}-bit"
    sharing = {-1: "a row", 0: "the tensor"}.get(scheme.group_size, f"groups of {scheme.group_size}")
    inputs = "" if scheme.activations == "none" else f" and {scheme.activations} scales of the activations"
    return f"{numbers} weights with a scale for {sharing}{inputs}"


def find_dtype(model: DecoderConfig, settings: Settings) -> str:
    """What is not quantized; as with TensorRT-LLM, float32 becomes float16."""
    if settings.dtype != "auto":
        return settings.dtype
    return "bfloat16" if model.dtype == "BF16" else "float16"


def find_norms(model: DecoderConfig, family: EngineFamily) -> tuple[str, ...]:
    """Those of a block, by TensorRT-LLM's names."""
    if family.decoder != "falcon":
        return family.norms
    if model.family.mlp_norm is None:
        return (INPUT_NORM,)
    return (INPUT_NORM, MLP_NORM if model.parallel else POST_NORM)


def find_scaling(rope: Rope) -> Mapping[str, float | int | str] | None:
    """`rope_scaling` as config.json of Hugging Face has it, which is what the classes read."""
    if rope.type == "default":
        return None
    scaling: dict[str, float | int | str] = {"rope_type": rope.type, "type": rope.type, "factor": rope.factor}
    if rope.type == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
        scaling["original_max_position_embeddings"] = rope.original_max_positions
    return scaling


def find_kv_cache(source: Source, settings: Settings) -> KVCache:
    """What the engine stores keys and values in."""
    scales: KVCache = "none" if source.reader is None else source.reader.encoding.kv_cache
    wanted = scales if settings.kv_cache == "auto" else settings.kv_cache
    if wanted != "none" and scales != wanted and (wanted, scales) != ("fp8", "none"):
        raise SettingsError(
            f"`compile.kv_cache` is `{wanted}`, and the checkpoint has no scales for that",
            hint=f"quantize the original with `--kv-cache {wanted}`",
        )
    return wanted
