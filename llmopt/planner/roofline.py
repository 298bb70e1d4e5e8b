"""How fast a model is served: each step takes as long as its bytes or its operations, whichever is longer.

Source: Williams et al., "Roofline", CACM 2009. A step of decoding reads the weights once and every sequence's KV cache;
a prompt is computed once, with attention that grows with the square of its length. Requests come in a closed loop of
`batch` clients: each answer is followed at once by the next prompt, and while one prompt is read the others wait.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from llmopt.planner.hardware import Hardware
from llmopt.planner.memory import kv_sequence_bytes, layer_bytes
from llmopt.planner.precision import Precision
from llmopt.planner.shape import ModelShape

STEP_TOKENS = 8192  # prompt tokens in one step: `max_num_tokens`, TensorRT-LLM's default


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Tokens of a request on average, and how many requests are in flight (None: as many as can be)."""

    prompt_tokens: float = 1024
    output_tokens: float = 256
    concurrency: int | None = None

    @property
    def total_tokens(self) -> float:
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """What is reached of the peaks, and what comes on top of a step.

    bandwidth, compute, link: shares. step_s: of every step, whatever is in it; sequence_s: of every sequence in it
    (sampling, scheduling). latency_s: of one exchange between devices.
    """

    bandwidth: float
    compute: float
    step_s: float
    sequence_s: float
    link: float = 1.0
    latency_s: float = 0.0
    source: str


EFFICIENCIES: Mapping[str, Efficiency] = {
    "gpu": Efficiency(
        bandwidth=0.65,
        compute=0.65,
        step_s=1e-3,
        sequence_s=5e-6,
        link=0.5,
        latency_s=10e-6,
        source="fitted to 60 throughputs that NVIDIA published for TensorRT-LLM 1.0 (Llama 3 in FP8 on H100 and H200; "
        "RMS error 15 %, and 17 to 32 % of two mixtures not fitted); other GPUs are taken to be alike",
    ),
    "cpu": Efficiency(
        bandwidth=0.8,
        compute=0.65,
        step_s=2e-3,
        sequence_s=0,
        source="chosen by what OpenVINO reached with int4, int8 and bf16 weights on two cores of a Zen 5 EPYC "
        "(predicted are 8 to 41 % less); other CPUs are taken to be alike",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """A model in a precision on some of an instance's devices."""

    shape: ModelShape
    precision: Precision
    hardware: Hardware
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    kv_precision: str = "fp16"

    @property
    def devices(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def replicas(self) -> int:
        """How many of it one instance holds."""
        return self.hardware.devices // self.devices


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Of one replica with `batch` requests in flight. Times in seconds; tokens_s: output tokens a second.

    ttft_s and tpot_s are means; prompt_s is of one prompt alone; busy: the share of time in which those of others are
    read.
    """

    batch: int
    ttft_s: float
    tpot_s: float
    tokens_s: float
    prompt_s: float
    step_s: float
    busy: float
    bound: str  # what a step of decoding waits for: "memory", "compute" or "links"

    def ttft_percentile_s(self, share: float) -> float:
        """The time to the first token that `share` of the requests stay below, prompts arriving at random.

        The tail of an M/D/1 queue, by its exponential approximation.
        """
        wait = 0.0
        if self.busy > 1 - share:
            wait = self.prompt_s / (2 * (1 - self.busy)) * math.log(self.busy / (1 - share))
        return self.step_s + self.prompt_s + min(wait, (self.batch - 1) * self.prompt_s)


def predict(placement: Placement, workload: Workload, batch: int) -> Prediction:
    """The speed of one replica with `batch` requests in flight; the hardware must have peaks."""
    stages = placement.pipeline_parallel
    prompt = prompts_s(placement, workload.prompt_tokens)
    together = max(1, min(batch, int(STEP_TOKENS / workload.prompt_tokens)))
    shared = prompts_s(placement, workload.prompt_tokens, together) / together
    context = workload.prompt_tokens + workload.output_tokens / 2
    step, bound = step_s(placement, batch, context)
    outputs = max(workload.output_tokens, 1.0)
    # Prompts of different requests share steps, and follow each other through the stages.
    cycle = outputs * step + prompt + (batch - 1) * shared / stages
    busy = min((batch - 1) * shared / stages / cycle, 0.999)
    wait = min(busy * prompt / (2 * (1 - busy)), (batch - 1) * prompt)
    ttft = min(prompt + step / 2 + wait, cycle)
    tpot = (cycle - ttft) / (outputs - 1) if outputs > 1 else 0.0
    return Prediction(
        batch=batch,
        ttft_s=ttft,
        tpot_s=tpot,
        tokens_s=batch * outputs / cycle,
        prompt_s=prompt,
        step_s=step,
        busy=busy,
        bound=bound,
    )


def prompts_s(placement: Placement, tokens: float, together: int = 1) -> float:
    """To read so many prompts in one step: their products and attention, or at least all weights once."""
    shape, ranks = placement.shape, placement.tensor_parallel
    linears = pairs = read = 0.0
    for layer, count in shape.kinds.items():
        linears += count * sum(2 * each.rows * each.columns * each.active * each.share(ranks) for each in layer.linears)
        # A query sees half of a full triangle, less where a window cuts it.
        window = layer.seen(tokens)
        pairs += count * layer.pair_flops * window * (tokens - window / 2) / ranks
        read += count * layer_bytes(layer, placement.precision, ranks, together * tokens)
    head = 2 * shape.output.parameters / ranks  # the last token's logits only
    flops = shape.scale * (tokens * linears + head)
    computing = together * (flops / _flops(placement) + pairs / _flops(placement, "fp16"))
    reading = shape.scale * read / _stream(placement)
    return max(computing, reading) + _exchange_s(placement, together * tokens) + _efficiency(placement).step_s


def step_s(placement: Placement, batch: int, context: float) -> tuple[float, str]:
    """One step of decoding for `batch` sequences of `context` tokens, and what it waits for.

    With pipeline stages the batch goes through in as many parts, each stage busy with one of them.
    """
    shape, ranks, stages = placement.shape, placement.tensor_parallel, placement.pipeline_parallel
    part = max(batch / stages, 1.0)
    read = flops = pairs = 0.0
    for layer, count in shape.kinds.items():
        read += count * layer_bytes(layer, placement.precision, ranks, part)
        flops += count * sum(2 * each.rows * each.columns * each.active * each.share(ranks) for each in layer.linears)
        pairs += count * layer.decode_pair_flops * layer.seen(context) / ranks
    kind = placement.hardware.kind
    read += placement.precision.head_bytes(shape.output, kind) / ranks
    flops += 2 * shape.output.parameters / ranks
    cache = part * kv_sequence_bytes(shape, context, placement.kv_precision, ranks)
    reading = shape.scale * read / _stream(placement) + cache / _bandwidth(placement)
    computing = part * (shape.scale * flops / _flops(placement) + pairs / _flops(placement, "fp16"))
    exchange = _exchange_s(placement, part)
    efficiency = _efficiency(placement)
    names = {"memory": reading, "compute": computing, "links": exchange}
    # The parts of the batch go through all stages in turn, each stage with its share of the layers.
    step = max(reading, computing) + exchange + efficiency.step_s + batch * efficiency.sequence_s
    return step, max(names, key=lambda name: names[name])


def _exchange_s(placement: Placement, tokens: float) -> float:
    """Two sums over all ranks in each layer (a ring: each sends 2 (n - 1) / n of it), and the hand-over of stages."""
    shape, ranks, stages = placement.shape, placement.tensor_parallel, placement.pipeline_parallel
    link, efficiency = placement.hardware.link_bytes_s, _efficiency(placement)
    if placement.devices == 1 or link is None:
        return 0.0
    vector = tokens * shape.hidden_size * 2
    sums = 2 * len(shape.layers) if ranks > 1 else 0
    sent = sums * 2 * (ranks - 1) / ranks * vector + (stages - 1) * vector
    return sent / (link * efficiency.link) + (sums + stages - 1) * efficiency.latency_s


def _efficiency(placement: Placement) -> Efficiency:
    return EFFICIENCIES[placement.hardware.kind]


def _bandwidth(placement: Placement) -> float:
    hardware = placement.hardware
    return hardware.bandwidth_bytes_s * (hardware.bandwidth_efficiency or _efficiency(placement).bandwidth)


def _stream(placement: Placement) -> float:
    """Bytes of weights a second."""
    return placement.hardware.streams.get(placement.precision.name, _bandwidth(placement))


def _flops(placement: Placement, arithmetic: str | None = None) -> float:
    """What one device reaches in the precision's arithmetic, or in another: attention is in 16 bits."""
    hardware = placement.hardware
    name = arithmetic or placement.precision.on(hardware.kind).arithmetic
    name = "fp32" if placement.precision.name == "fp32" else name
    share = hardware.compute_efficiency or _efficiency(placement).compute
    return hardware.flops[name] * share
