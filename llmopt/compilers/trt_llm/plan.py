"""The plan: everything that can be known before a byte is written, checked against the model and the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.artifacts.outcome import Json
from llmopt.compilers.deploy.base import Deployment
from llmopt.compilers.hub_model import check_tokenizer_files
from llmopt.compilers.trt_llm import bundle, checkpoint, rules
from llmopt.compilers.trt_llm.config import EngineConfig
from llmopt.compilers.trt_llm.layout import layout
from llmopt.compilers.trt_llm.settings import Settings
from llmopt.errors import LlmoptError
from llmopt.formats.base import Part
from llmopt.planner import choose, hardware, memory, shape
from llmopt.planner.precision import PRECISIONS

if TYPE_CHECKING:
    from llmopt.formats.reading import Source

_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1}
_KV_PRECISIONS: Mapping[str | None, str] = {None: "fp16", "FP8": "fp8", "INT8": "int8"}
_RESERVED, _KV_SHARE = choose.RESERVED_BYTES["gpu"], choose.KV_SHARE["gpu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What will be made. settings: with every size that they left to the model. quant_algo and kv_cache: by
    TensorRT-LLM's names, None for plain. rank_bytes: of each rank's weights. activation_bytes and kv_token_bytes are
    the planner's, for the fullest rank.
    """

    settings: Settings
    engine: EngineConfig | None  # None: a bundle
    dtype: str
    quant_algo: str | None
    kv_cache: str | None
    rank_bytes: tuple[int, ...]
    activation_bytes: int
    sequence_bytes: int

    def to_json(self) -> dict[str, Json]:
        """plan.json."""
        return {
            "schema": "llmopt.plan/1",
            **facts(self),
            "max_input_len": self.settings.max_input_len,
            "max_seq_len": self.settings.max_seq_len,
            "max_batch_size": self.settings.max_batch_size,
            "max_num_tokens": self.settings.max_num_tokens,
            "ranks": [{"rank": rank, **about} for rank, about in enumerate(self._ranks())],
            "memory": self._memory(),
        }

    def _ranks(self) -> list[dict[str, Json]]:
        if self.engine is None:
            return [{"weight_bytes": each} for each in self.rank_bytes]
        tensors: list[dict[str, Json]] = []
        for rank, weights in enumerate(self.rank_bytes):
            parts = layout(self.engine, rank)
            shapes: dict[str, Json] = {name: [part.dtypes[0], *part.shapes[0]] for name, part in parts.items()}
            tensors.append({"weight_bytes": weights, "tensors": shapes})
        return tensors

    def _memory(self) -> dict[str, Json]:
        """Of the fullest rank. sequences: of the full length that fit beside the rest, where the GPU is known."""
        found: dict[str, Json] = {
            "weight_bytes": max(self.rank_bytes),
            "activation_bytes": self.activation_bytes,
            "kv_cache_bytes_per_sequence": self.sequence_bytes,
        }
        if self.settings.gpu is not None:
            device = hardware.find(self.settings.gpu).memory_bytes
            found |= {"device_bytes": device, "sequences": self.cache_bytes(device) // self.sequence_bytes}
        return found

    def cache_bytes(self, device_bytes: int) -> int:
        """What a device leaves for the KV cache of the fullest rank, reckoned as `llmopt plan` does; maybe negative."""
        return round(_KV_SHARE * (device_bytes - _RESERVED - max(self.rank_bytes) - self.activation_bytes))


def facts(plan: Plan) -> dict[str, Json]:
    """What plan.json and engine.json both say."""
    settings = plan.settings
    return {
        "mode": settings.resolved_mode,
        "version": settings.version,
        "dtype": plan.dtype,
        "quant_algo": plan.quant_algo,
        "kv_cache": plan.kv_cache,
        "gpu": settings.gpu,
        "architecture": settings.architecture,
        "gpus": settings.gpus,
        "tensor_parallel": settings.tensor_parallel,
        "pipeline_parallel": settings.pipeline_parallel,
        "expert_parallel": settings.expert_parallel,
    }


def make(model: Path, settings: Settings) -> Plan:
    """The plan for a checkpoint; LlmoptError for the first reason why it cannot be carried out.

    Reads config.json, headers, and the scales and zero points of quantized linears.
    """
    from llmopt.formats.reading import open_model

    source = open_model(model)
    check_tokenizer_files(model)
    settings = _sized(settings, source)
    engine, quant_algo, kv_cache = _quantization(source, settings)
    rules.check(settings, quant_algo=quant_algo, kv_cache=kv_cache, architecture=settings.architecture)
    sizes = shape.read(str(model))
    plan = Plan(
        settings=settings,
        engine=engine,
        dtype={"F16": "float16", "BF16": "bfloat16"}[source.config.dtype] if engine is None else engine.dtype,
        quant_algo=quant_algo,
        kv_cache=kv_cache,
        rank_bytes=_rank_bytes(source, settings, engine),
        activation_bytes=memory.activation_bytes(
            sizes,
            PRECISIONS["fp16"],
            tensor_parallel=settings.tensor_parallel,
            tokens=settings.max_num_tokens,
            sequences=settings.max_batch_size,
        ),
        sequence_bytes=round(
            memory.kv_sequence_bytes(
                sizes,
                settings.max_seq_len or 0,
                _KV_PRECISIONS[kv_cache],
                settings.tensor_parallel,
                settings.pipeline_parallel,
            )
        ),
    )
    _check_memory(plan)
    return plan


def deployment(made: Plan) -> Deployment:
    """What the emitters are told."""
    return Deployment.of(
        made.settings,
        name=made.settings.served_name,
        runtime="tensorrt-llm",
        mode=made.settings.resolved_mode,
        model="engine" if made.engine else "model",
        dtype=made.dtype,
        quantization=made.quant_algo,
        architecture=made.settings.architecture,
        kv_cache=made.kv_cache,
    )


def _sized(settings: Settings, source: Source) -> Settings:
    """The lengths that were left to the model; LlmoptError for a length that it has no positions for."""
    positions = source.config.max_positions
    sized = settings.sized(positions)
    if sized.max_seq_len is not None and sized.max_seq_len > positions:
        raise LlmoptError(
            f"`max_seq_len: {sized.max_seq_len}` is over the {positions} positions of the model",
            hint=f"at most {positions}: prompt and answer together",
        )
    return sized


def _quantization(source: Source, settings: Settings) -> tuple[EngineConfig | None, str | None, str | None]:
    """The engine's config in engine mode, and what the weights and the KV cache are in, by TensorRT-LLM's names."""
    if settings.resolved_mode == "engine":
        config = checkpoint.check(source, settings)
        quantization = config.to_json()["quantization"]
        return config, quantization["quant_algo"], quantization["kv_cache_quant_algo"]
    path = source.checkpoint.path
    bundle.check(path, settings)
    own = None if source.reader is None or source.reader.encoding.kv_cache == "none" else "FP8"
    return None, bundle.algorithm(source), "FP8" if settings.kv_cache == "fp8" else own


def _rank_bytes(source: Source, settings: Settings, engine: EngineConfig | None) -> tuple[int, ...]:
    """Exact for an engine; of a bundle what the server will share out, evenly, which is below its fullest rank."""
    if engine is not None:
        return tuple(sum(map(_part_bytes, layout(engine, rank).values())) for rank in range(engine.ranks))
    total = sum(info.size for info in source.checkpoint.tensors.values())
    return (-(-total // settings.gpus),) * settings.gpus


def _part_bytes(part: Part) -> int:
    return prod(part.shapes[0]) * _BYTES[part.dtypes[0]]


def _check_memory(plan: Plan) -> None:
    """LlmoptError where not even one sequence fits beside the weights."""
    gpu = plan.settings.gpu
    if gpu is None:
        return
    device = hardware.find(gpu).memory_bytes
    if plan.cache_bytes(device) < plan.sequence_bytes:
        parts = {
            "weights": max(plan.rank_bytes),
            "activations": plan.activation_bytes,
            "CUDA": _RESERVED,
            "one sequence": plan.sequence_bytes / _KV_SHARE,
        }
        listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
        raise LlmoptError(
            f"{sum(parts.values()) / 1e9:.2f} GB do not fit into the {device / 1e9:.0f} GB of `{gpu}`: {listed}",
            hint="more `--tp`, fewer bits, or a smaller `--max-seq-len` or `--max-num-tokens`; `llmopt plan` compares",
        )
