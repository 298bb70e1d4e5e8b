"""What servers say of themselves at `/metrics`, in Prometheus' text format, under one name for all of them.

Sources: Prometheus' exposition formats; the metrics pages of vLLM, SGLang, text-generation-inference, TensorRT-LLM,
Triton and llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

#: Labels and value of one line.
Series: TypeAlias = tuple[Mapping[str, str], float]


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure and the metrics that tell it, as `name` or `name{label=value}`; the first that a server has counts."""

    metrics: tuple[str, ...]
    counter: bool = False
    over_series: Callable[[Iterable[float]], float] = sum  # engines, models and servers


FIGURES: Mapping[str, Figure] = {
    "running": Figure((
        "vllm:num_requests_running", "sglang:num_running_reqs", "tgi_batch_current_size", "trtllm_num_requests_running",
        "nv_trt_llm_request_metrics{request_type=active}", "llamacpp:requests_processing",
    )),
    "waiting": Figure((
        "vllm:num_requests_waiting", "sglang:num_queue_reqs", "tgi_queue_size", "trtllm_num_requests_waiting",
        "nv_trt_llm_request_metrics{request_type=waiting}", "llamacpp:requests_deferred",
        "nv_inference_pending_request_count",
    )),
    "kv_cache_share": Figure((
        "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage", "trtllm_kv_cache_utilization",
        "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=fraction}", "llamacpp:kv_cache_usage_ratio",
    ), over_series=max),
    "gpu_share": Figure(("nv_gpu_utilization",), over_series=max),
    "gpu_power_w": Figure(("nv_gpu_power_usage",)),
    "gpu_energy_j": Figure(("nv_energy_consumption",), counter=True),
    "preemptions": Figure(("vllm:num_preemptions_total", "sglang:num_preemptions_total"), counter=True),
    "prefix_cache_queries": Figure((
        "vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total", "sglang:prompt_tokens_total",
    ), counter=True),
    "prefix_cache_hits": Figure((
        "vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total", "sglang:cached_tokens_total",
    ), counter=True),
    "prompt_tokens": Figure((
        "vllm:prompt_tokens_total", "sglang:prompt_tokens_total", "tgi_request_input_length_sum",
        "llamacpp:prompt_tokens_total",
    ), counter=True),
    "generation_tokens": Figure((
        "vllm:generation_tokens_total", "sglang:generation_tokens_total", "tgi_request_generated_tokens_sum",
        "llamacpp:tokens_predicted_total",
    ), counter=True),
    "requests": Figure((
        "vllm:request_success_total", "sglang:num_requests_total", "tgi_request_success",
        "nv_inference_request_success",
    ), counter=True),
}  # fmt: skip

_NAMES = sorted({metric.partition("{")[0] for figure in FIGURES.values() for metric in figure.metrics})
_LINE = re.compile(rf"^({'|'.join(_NAMES)})(?:{{(.*)}})?[ \t]+([^ \t\r\n]+)", re.MULTILINE)
_LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"')
_SPLIT_BY = ("tp_rank", "pp_rank")  # workers of one engine: each tells the same


def parse(text: str) -> dict[str, list[Series]]:
    """The lines of the metrics that FIGURES names; all others are passed over."""
    found: dict[str, list[Series]] = {}
    for name, labels, value in _LINE.findall(text):
        try:
            number = float(value)
        except ValueError:
            continue
        if number == number and abs(number) != float("inf"):
            found.setdefault(name, []).append((dict(_LABEL.findall(labels)), number))
    return found


def read(text: str) -> dict[str, float]:
    """FIGURES that the server tells, by name."""
    series = parse(text)
    found = {}
    for name, figure in FIGURES.items():
        for metric in figure.metrics:
            values = _values(series, metric)
            if values:
                found[name] = figure.over_series(values)
                break
    return found


def _values(series: Mapping[str, list[Series]], metric: str) -> list[float]:
    name, _, condition = metric.rstrip("}").partition("{")
    label, _, wanted = condition.partition("=")
    return [
        value
        for labels, value in series.get(name, ())
        if (not label or labels.get(label) == wanted)
        and all(labels.get(rank, "0") == "0" for rank in _SPLIT_BY)
        and not labels.get("priority")  # SGLang: of single priorities, beside their sum
    ]
