"""What fits where, how large a batch meets the limits, and which choice costs least for a token."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from llmopt.errors import SettingsError
from llmopt.planner.hardware import Hardware
from llmopt.planner.memory import Memory, check_parallel, kv_sequence_bytes, memory
from llmopt.planner.precision import Precision, default_kv, kv_bytes, unsupported
from llmopt.planner.roofline import STEP_TOKENS, Placement, Prediction, Workload, predict
from llmopt.planner.shape import ModelShape

#: Bytes of a device that the driver, the runtime and the libraries between devices take. Chosen.
RESERVED_BYTES = {"gpu": 1.5e9, "accelerator": 1.5e9, "cpu": 2e9}
#: Of what weights and activations leave, the part that goes to the KV cache: the default of TensorRT-LLM
#: (`kv_cache_free_gpu_memory_fraction`), and what `llmopt serve` takes of a machine's memory.
KV_SHARE = {"gpu": 0.9, "accelerator": 0.9, "cpu": 0.5}
#: The largest batch that a runtime takes by default: TensorRT-LLM's, and `llmopt serve`'s order of magnitude.
MAX_BATCH = {"gpu": 2048, "accelerator": 2048, "cpu": 256}
#: Without limits a batch is made no larger than this part of the most tokens a second asks for.
ENOUGH = 0.95
#: What is within 2 % of the best is as good: the predictions know no better.
AS_GOOD = 0.98

PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}
TIMES = ("ttft_ms", "tpot_ms", "e2e_ms")
LIMITED = (*TIMES, "tokens_per_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """At most so many milliseconds, or at least so many output tokens a second of all instances together.

    percentile: of the requests; "mean", or None: of each request, which is taken as 99 of 100.
    """

    metric: str
    limit: float
    percentile: str | None = None

    def __post_init__(self) -> None:
        if self.metric not in LIMITED:
            hint = "it predicts " + ", ".join(f"`{name}`" for name in LIMITED)
            raise SettingsError(f"the planner does not predict `{self.metric}`", hint=hint)

    def value(self, prediction: Prediction, outputs: float) -> float:
        """What is predicted for it, in its own unit."""
        if self.metric == "tokens_per_s":
            return prediction.tokens_s
        share = PERCENTILES.get(self.percentile or "p99")
        ttft = prediction.ttft_s if share is None else prediction.ttft_percentile_s(share)
        answer = {"ttft_ms": ttft, "tpot_ms": prediction.tpot_s}
        return 1e3 * answer.get(self.metric, ttft + (outputs - 1) * prediction.tpot_s)

    def __str__(self) -> str:
        name = self.metric if self.percentile is None else f"{self.metric}_{self.percentile}"
        return f"{name}{'>=' if self.metric == 'tokens_per_s' else '<='}{self.limit:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """A precision on a row of hardware, divided as suits it best. `reason`: why it cannot be had, None where it can.

    memory: of the fullest device, with `batch` requests of a replica in it. prediction: of one replica, None where no
    speed is predicted. instances: how many are rented for the workload's concurrency (1 where nothing is said of it);
    used: the part of their replicas' batches that it fills.
    """

    hardware: Hardware
    precision: Precision
    kv_precision: str
    reason: str | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    replicas: int = 1
    instances: int = 1
    used: float = 1.0
    batch: int = 0
    memory: Memory | None = None
    prediction: Prediction | None = None

    @property
    def fits(self) -> bool:
        return self.reason is None

    @property
    def devices(self) -> int:
        """That share one replica."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def tokens_s(self) -> float | None:
        """Output tokens a second of all instances."""
        return (
            None if self.prediction is None else self.prediction.tokens_s * self.replicas * self.instances * self.used
        )

    @property
    def usd_per_million(self) -> float | None:
        """Of a million output tokens, the prompts' share of the time included."""
        price = self.hardware.price_usd_h
        if self.tokens_s is None or price is None:
            return None
        return price * self.instances / 3600 / self.tokens_s * 1e6


def options(
    shape: ModelShape,
    rows: Iterable[Hardware],
    precisions: Sequence[Precision],
    *,
    workload: Workload,
    limits: Sequence[Limit] = (),
    kv_precision: str | None = None,
    tensor_parallel: int | None = None,
) -> list[Option]:
    """One for each row of hardware and each precision, in that order.

    kv_precision None: `default_kv`. tensor_parallel None: what costs least. Raises SettingsError for a workload that
    the model cannot take.
    """
    _check(shape, workload, kv_precision, tensor_parallel)
    return [
        _option(
            shape, row, precision, workload, limits, kv_precision or default_kv(precision, row.kind), tensor_parallel
        )
        for row in rows
        for precision in precisions
    ]


def best(found: Sequence[Option]) -> Option | None:
    """The cheapest a token; where no price is known, or none is asked, the fastest for its devices; None where nothing
    fits. On the same hardware the first of what is as good, so the wider precision.
    """
    usable = [option for option in found if option.fits and option.tokens_s]
    free = [option for option in usable if option.usd_per_million == 0]
    priced = [option for option in usable if option.usd_per_million is not None]
    ranked = sorted(free or priced or usable, key=_merit, reverse=True)
    alike = [each for each in found if ranked and each in ranked and each.hardware is ranked[0].hardware]
    return next((each for each in alike if _merit(each) >= AS_GOOD * _merit(ranked[0])), None)


def _merit(option: Option) -> float:
    """Tokens for a dollar, or a second of a device where none is paid."""
    cost, rate = option.usd_per_million, option.tokens_s or 0.0
    return 1 / cost if cost else rate / option.hardware.devices


def _option(
    shape: ModelShape,
    row: Hardware,
    precision: Precision,
    workload: Workload,
    limits: Sequence[Limit],
    kv_precision: str,
    tensor_parallel: int | None,
) -> Option:
    base = Option(hardware=row, precision=precision, kv_precision=kv_precision)
    missing = unsupported(precision, row, kv_precision)
    if missing is not None:
        return _without(base, missing)
    tried: list[Option] = []
    # Pipeline stages add up their times, so they are for what does not fit without them.
    for stages in (1, 2, 4, 8):
        tried += [
            _placed(shape, base, workload, limits, ranks, stages)
            for ranks in _ranks(shape, row, tensor_parallel)
            if ranks * stages <= row.devices and stages <= len(shape.layers) and (stages == 1 or row.link_bytes_s)
        ]
        if any(option.memory is not None for option in tried):
            break
    usable = [option for option in tried if option.fits]
    if usable:
        return max(usable, key=_value)
    if not tried:
        return _without(base, f"{row.name} has {row.devices} device{'s' * (row.devices > 1)}, not {tensor_parallel}")
    # What is wrong on the most devices is wrong on fewer; too slow says more than too large, and the fastest most.
    return max(tried, key=lambda option: (option.memory is not None, option.tokens_s or 0.0, option.devices))


def _value(option: Option) -> float:
    """What a split of the same hardware is chosen by: tokens for the money, else the fewest devices."""
    return -option.tensor_parallel if option.tokens_s is None else option.tokens_s / option.instances


def _placed(
    shape: ModelShape, base: Option, workload: Workload, limits: Sequence[Limit], ranks: int, stages: int
) -> Option:
    """The option on `ranks` times `stages` devices, with the largest batch that fits and meets the limits."""
    row, precision = base.hardware, base.precision
    replicas = row.devices // (ranks * stages)
    room = _room(shape, base, workload.total_tokens, ranks, stages)
    if isinstance(room, str):
        return _without(base, room, ranks, stages)
    empty, sequence, most = room
    instances, used = 1, 1.0
    if workload.concurrency is not None:
        most = min(most, max(1, -(-workload.concurrency // replicas)))
    placement = Placement(
        shape=shape,
        precision=precision,
        hardware=row,
        tensor_parallel=ranks,
        pipeline_parallel=stages,
        kv_precision=base.kv_precision,
    )
    batch, prediction = most, None
    if row.flops:
        times = [limit for limit in limits if limit.metric in TIMES]
        batch = _largest(placement, workload, times, most)
        if batch == 0:
            reason = _broken(predict(placement, workload, 1), workload, times)
            return replace(_without(base, reason, ranks, stages), memory=empty)
        if not limits and workload.concurrency is None:
            batch = _enough(placement, workload, most)
        prediction = predict(placement, workload, batch)
    if workload.concurrency is not None:
        instances = -(-workload.concurrency // (batch * replicas))
        used = workload.concurrency / (instances * batch * replicas)
    option = replace(
        base,
        tensor_parallel=ranks,
        pipeline_parallel=stages,
        replicas=replicas,
        instances=instances,
        used=used,
        batch=batch,
        memory=replace(empty, kv_cache=round(batch * sequence)),
        prediction=prediction,
    )
    for limit in limits:
        if limit.metric == "tokens_per_s" and option.tokens_s is not None and option.tokens_s < limit.limit:
            reason = f"{option.tokens_s:,.0f} tokens/s, less than the {limit.limit:,.0f} asked for"
            return replace(option, reason=reason)
    return option


def _room(shape: ModelShape, base: Option, tokens: float, ranks: int, stages: int) -> tuple[Memory, float, int] | str:
    """The fullest device without requests, the bytes that one of `tokens` takes there, how many fit; or why none."""
    kind = base.hardware.kind
    empty = memory(
        shape,
        base.precision,
        tensor_parallel=ranks,
        pipeline_parallel=stages,
        max_batch_size=0,
        max_seq_len=0,
        max_num_tokens=STEP_TOKENS,
        kv_precision=base.kv_precision,
        kind=kind,
    )
    there = base.hardware.memory_bytes - RESERVED_BYTES[kind]
    devices = f"each of {ranks * stages} devices" if ranks * stages > 1 else "the device"
    if empty.weights > there:
        return f"{empty.weights / 1e9:.1f} GB of weights on {devices}, which has {max(there, 0) / 1e9:.1f} GB free"
    sequence = kv_sequence_bytes(shape, tokens, base.kv_precision, ranks, stages)
    left = max(KV_SHARE[kind] * (there - empty.total), 0.0)
    if left < sequence:
        return f"{left / 1e9:.1f} GB left for the KV cache on {devices}, a request takes {sequence / 1e9:.2f} GB"
    return empty, sequence, min(int(left / sequence), MAX_BATCH[kind])


def _without(base: Option, reason: str, ranks: int = 1, stages: int = 1) -> Option:
    return replace(base, reason=reason, tensor_parallel=ranks, pipeline_parallel=stages)


def _largest(placement: Placement, workload: Workload, limits: Sequence[Limit], most: int) -> int:
    """The largest batch up to `most` whose times meet all limits, 0 for none: every time grows with the batch."""

    def meets(batch: int) -> bool:
        prediction = predict(placement, workload, batch)
        return all(limit.value(prediction, workload.output_tokens) <= limit.limit for limit in limits)

    if not limits or meets(most):
        return most
    good, bad = 0, most
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if meets(middle) else (good, middle)
    return good


def _enough(placement: Placement, workload: Workload, most: int) -> int:
    """The smallest batch that reaches most of the rate of the largest: past it only the times grow."""
    wanted = ENOUGH * predict(placement, workload, most).tokens_s
    batches = range(1, most + 1)
    return batches[bisect_left(batches, wanted, key=lambda batch: predict(placement, workload, batch).tokens_s)]


def _broken(prediction: Prediction, workload: Workload, limits: Sequence[Limit]) -> str:
    """What a single request already breaks."""
    for limit in limits:
        value = limit.value(prediction, workload.output_tokens)
        if value > limit.limit:
            return f"{value:,.0f} ms for a request alone, asked for is `{limit}`"
    raise AssertionError("called for limits that are met")


def _ranks(shape: ModelShape, row: Hardware, wanted: int | None) -> list[int]:
    """The ways to divide the model among an instance's devices, the fewest first."""
    if wanted is not None:
        return [wanted] if wanted == 1 or row.link_bytes_s else []
    most = row.devices if row.link_bytes_s else 1
    return [ranks for ranks in range(1, most + 1) if row.devices % ranks == 0 and _divides(shape, ranks)]


def _divides(shape: ModelShape, ranks: int) -> bool:
    try:
        check_parallel(shape, ranks)
    except SettingsError:
        return False
    return True


def _check(shape: ModelShape, workload: Workload, kv_precision: str | None, tensor_parallel: int | None) -> None:
    if kv_precision is not None:
        kv_bytes(kv_precision)
    if tensor_parallel is not None:
        check_parallel(shape, tensor_parallel)
    if shape.max_positions is not None and workload.total_tokens > shape.max_positions:
        raise SettingsError(
            f"a request of {workload.total_tokens:,.0f} tokens is longer than the {shape.max_positions:,} of the model",
            hint="plan for shorter prompts or answers: `--prompt-tokens`, `--output-tokens`",
        )
