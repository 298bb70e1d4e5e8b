"""Every tensor of a rank of the unified checkpoint, by TensorRT-LLM's name: dtypes and the exact shape.

Sources: TensorRT-LLM 1.2, quantization/layers.py and quantize.py, layers/{attention,mlp,embedding}.py; ModelOpt 0.47,
torch/export/postprocess.py, for what is split how. A rank's layers are numbered from 0, whichever they are.

Where the loader's parameters differ from what lies on disk, that is its doing when it reads (models/modeling_utils.py,
`preprocess_weights`): AWQ's codes are transposed and interleaved, scales become the dtype of the model, and the larger
of the two KV scales becomes `kv_cache_scaling_factor`.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmopt.compilers.trt_llm.config import EMBEDDING, FINAL_NORM, HEAD, EngineConfig
from llmopt.compilers.trt_llm.families import AWQ, FP8, SMOOTH_DYNAMIC, SMOOTH_STATIC
from llmopt.compilers.trt_llm.sources import DENSE, FC, GATE, PROJ, QKV
from llmopt.formats.base import Part

KV_SCALES = tuple(f"attention.{name}_cache_scaling_factor" for name in ("k", "v", "kv"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """A linear of an engine's block. rows, columns: out and in features of one rank.

    split: which of them the ranks share out; what adds up over ranks (columns) has its bias whole on each.
    """

    name: str
    rows: int
    columns: int
    split: str  # "rows" or "columns"
    bias: bool


def modules(config: EngineConfig) -> tuple[Module, ...]:
    """The linears of every block."""
    tp, hidden = config.tensor_parallel, config.hidden_size
    heads, inner = config.heads // tp * config.head_size, config.intermediate_size // tp
    qkv = heads + 2 * config.kv_heads_of_rank * config.head_size
    up = (FC, GATE) if config.family.gated else (FC,)
    return (
        Module(name=QKV, rows=qkv, columns=hidden, split="rows", bias=config.qkv_bias),
        Module(name=DENSE, rows=hidden, columns=heads, split="columns", bias=config.dense_bias),
        *(Module(name=name, rows=inner, columns=hidden, split="rows", bias=config.mlp_bias) for name in up),
        Module(name=PROJ, rows=hidden, columns=inner, split="columns", bias=config.mlp_bias),
    )


def layout(config: EngineConfig, rank: int) -> dict[str, Part]:
    """The tensors of one rank, and nothing else; each has one dtype and one shape."""
    found: dict[str, Part] = {}
    table = _part(config.stored_dtype, config.vocab_size_padded // config.tensor_parallel, config.hidden_size)
    if config.is_first_stage(rank):
        found[f"{EMBEDDING}.weight"] = table
    for index in range(len(config.layers_of_rank(rank))):
        prefix = f"transformer.layers.{index}"
        found |= {f"{prefix}.{name}": part for name, part in _block(config, prefix).items()}
    if config.is_last_stage(rank):
        found |= {f"{FINAL_NORM}.{name}": part for name, part in _norm(config).items()}
        # Tied heads too: only a rank that has both tables could share one.
        found[f"{HEAD}.weight"] = table
    return found


def linear_layout(config: EngineConfig, module: Module, algorithm: str | None) -> dict[str, Part]:
    """The tensors of one linear, by the suffix after its name; `algorithm` None: not quantized."""
    found = _weight(config, module, algorithm)
    if module.bias:
        found["bias"] = _part(config.stored_dtype, module.rows)
    return found


def _weight(config: EngineConfig, module: Module, algorithm: str | None) -> dict[str, Part]:
    rows, columns = module.rows, module.columns
    scalar, smooth = _part("F32", 1), _part(config.stored_dtype, columns)
    match algorithm:
        case None:
            return {"weight": _part(config.stored_dtype, rows, columns)}
        case str() if algorithm == FP8:
            weight = _part("F8_E4M3", rows, columns)
            return {"weight": weight, "weights_scaling_factor": scalar, "activation_scaling_factor": scalar}
        case str() if algorithm == SMOOTH_STATIC:
            return {
                "weight": _part("I8", rows, columns),
                "weights_scaling_factor": _part("F32", rows),
                "activation_scaling_factor": scalar,
                "prequant_scaling_factor": smooth,
            }
        case str() if algorithm == SMOOTH_DYNAMIC:
            smoother = {"smoother": _part("F32", 1, columns)} if module.split == "columns" else {}
            return {"weight": _part("I8", rows, columns), "per_channel_scale": _part("F32", 1, rows), **smoother}
        case str() if algorithm == AWQ:
            return {
                "weight": _part("I8", rows // 2, columns),
                "weights_scaling_factor": _part("F32", rows, columns // config.group_size),
                "prequant_scaling_factor": smooth,
            }
    raise ValueError(f"no layout of {algorithm}")


def _block(config: EngineConfig, prefix: str) -> dict[str, Part]:
    found: dict[str, Part] = {}
    for norm in config.norms:
        found |= {f"{norm}.{suffix}": part for suffix, part in _norm(config).items()}
        if config.algorithm == SMOOTH_DYNAMIC:
            # A parameter of SmoothQuantRmsNorm, of no effect where scales are of tokens; its own converter writes ones.
            found[f"{norm}.scale_to_int"] = _part("F32", 1)
    if config.family.qk_norm:
        head = _part(config.stored_dtype, config.head_size)
        found |= {f"attention.{name}_layernorm.weight": head for name in ("q", "k")}
    for module in modules(config):
        algorithm = None if f"{prefix}.{module.name}" in config.plain else config.algorithm
        tensors = linear_layout(config, module, algorithm)
        found |= {f"{module.name}.{suffix}": part for suffix, part in tensors.items()}
    if config.kv_cache != "none":
        found |= dict.fromkeys(KV_SCALES, _part("F32", 1))
    return found


def _norm(config: EngineConfig) -> dict[str, Part]:
    weight = _part(config.stored_dtype, config.hidden_size)
    return {"weight": weight} if config.family.rms else {"weight": weight, "bias": weight}


def _part(dtype: str, *shape: int) -> Part:
    return Part((dtype,), (shape,))
