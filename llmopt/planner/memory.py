"""What a model takes on each device: weights, KV cache and activations of the fullest rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from llmopt.errors import SettingsError
from llmopt.planner.precision import Precision, kv_bytes
from llmopt.planner.shape import Layer, Linear, ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on the fullest device."""

    weights: int
    kv_cache: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations


def memory(
    shape: ModelShape,
    precision: Precision,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    max_batch_size: int,
    max_seq_len: int,
    max_num_tokens: int,
    kv_precision: str = "fp16",
    kind: str = "gpu",
) -> Memory:
    """Per rank, with `max_batch_size` sequences of `max_seq_len` tokens in the cache, `max_num_tokens` in a step."""
    return Memory(
        weights=round(weight_bytes(shape, precision, tensor_parallel, pipeline_parallel, kind=kind)),
        kv_cache=round(
            max_batch_size * kv_sequence_bytes(shape, max_seq_len, kv_precision, tensor_parallel, pipeline_parallel)
        ),
        activations=activation_bytes(
            shape, precision, tensor_parallel=tensor_parallel, tokens=max_num_tokens, sequences=max_batch_size
        ),
    )


def check_parallel(shape: ModelShape, tensor_parallel: int, pipeline_parallel: int = 1) -> None:
    """SettingsError where the model cannot be divided so."""
    if tensor_parallel < 1 or shape.heads % tensor_parallel:
        fit = ", ".join(str(n) for n in range(1, shape.heads + 1) if shape.heads % n == 0 and n <= 16)
        raise SettingsError(
            f"{shape.heads} attention heads cannot be divided among {tensor_parallel} devices", hint=f"these fit: {fit}"
        )
    kv = shape.layers[0].cache_parts
    if kv % tensor_parallel and tensor_parallel % kv:
        raise SettingsError(f"{kv} KV heads cannot be divided among, or repeated on, {tensor_parallel} devices")
    if not 1 <= pipeline_parallel <= len(shape.layers):
        raise SettingsError(f"{len(shape.layers)} layers cannot be divided among {pipeline_parallel} stages")


def weight_bytes(
    shape: ModelShape, precision: Precision, tensor_parallel: int = 1, pipeline_parallel: int = 1, *, kind: str = "gpu"
) -> float:
    """Of the fullest rank; all weights where nothing is divided. kind: of the hardware, for CPUs round the head."""
    ends = {0: _embedding_bytes(shape, precision, tensor_parallel)}
    head = _head_bytes(shape, precision, tensor_parallel, kind)
    stages = _stages(shape, pipeline_parallel)
    ends[len(stages) - 1] = ends.get(len(stages) - 1, 0.0) + head
    return shape.scale * max(
        sum(count * layer_bytes(layer, precision, tensor_parallel) for layer, count in stage.items())
        + ends.get(index, 0.0)
        for index, stage in enumerate(stages)
    )


def layer_bytes(layer: Layer, precision: Precision, ranks: int, tokens: float | None = None) -> float:
    """Of one rank; with `tokens`: what a step of that many reads, for each goes to some of a mixture's experts."""
    return layer.plain * precision.plain_bytes + sum(
        precision.linear_bytes(linear) * linear.share(ranks) * _touched(linear, tokens) for linear in layer.linears
    )


def kv_sequence_bytes(
    shape: ModelShape, tokens: float, kv_precision: str, tensor_parallel: int = 1, pipeline_parallel: int = 1
) -> float:
    """KV cache of one sequence of `tokens` on the fullest rank; windows keep no more than they see."""
    each = kv_bytes(kv_precision)
    return max(
        sum(
            count * layer.cached * layer.seen(tokens) * (-(-layer.cache_parts // tensor_parallel) / layer.cache_parts)
            for layer, count in stage.items()
        )
        * each
        for stage in _stages(shape, pipeline_parallel)
    )


def activation_bytes(
    shape: ModelShape, precision: Precision, *, tensor_parallel: int, tokens: int, sequences: int
) -> int:
    """An estimate: of `tokens` in a step the residual stream, its norm and a copy, the widest linear in and out, and
    float32 logits of each sequence. What a runtime really takes lies within a factor of two of it.
    """
    widest = max(
        (max(linear.rows, linear.columns) * linear.active for layer in shape.kinds for linear in layer.linears),
        default=0,
    )
    each = max(precision.plain_bytes, 2)
    step = tokens * (3 * shape.hidden_size + 2 * widest / tensor_parallel) * each
    return round(step + sequences * shape.vocab_size * 4 / tensor_parallel)


def _touched(linear: Linear, tokens: float | None) -> float:
    """How many of its `count` a step of that many tokens reads, each token drawing its experts at random."""
    if tokens is None or linear.count == 1:
        return float(linear.count)
    return float(linear.count * (1 - (1 - linear.active / linear.count) ** tokens))


def _stages(shape: ModelShape, stages: int) -> list[Mapping[Layer, int]]:
    """How many of each layer a stage has; the first ones have one more where they do not divide."""
    if stages == 1:
        return [shape.kinds]
    size, rest = divmod(len(shape.layers), stages)
    ends = [size * (index + 1) + min(index + 1, rest) for index in range(stages)]
    return [Counter(shape.layers[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def _embedding_bytes(shape: ModelShape, precision: Precision, ranks: int) -> float:
    return (shape.embedding / ranks + shape.other) * precision.plain_bytes


def _head_bytes(shape: ModelShape, precision: Precision, ranks: int, kind: str) -> float:
    if shape.head is None:
        return 0.0
    return precision.head_bytes(shape.head, kind) / ranks
