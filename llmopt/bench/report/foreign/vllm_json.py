"""The JSON of `vllm bench serve --save-result`, with its requests where --save-detailed kept them.

Source: vllm/benchmarks/serve.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from llmopt.artifacts.outcome import Json
from llmopt.bench.report.foreign.base import Object, Run, chunks_us, failed, label_of, ms, summary_of

CONVENTIONS: Mapping[str, str] = {
    "ttft_ms": "from before the HTTP client is called (connecting counts) to the first chunk",
    "itl_ms": "every gap between chunks, of all requests",
    "tpot_ms": "per request (e2e - ttft) / (tokens - 1)",
    "e2e_ms": "vLLM's e2el: from before the HTTP client is called to the last chunk",
    "tokens_per_s": "vLLM's output_throughput: output tokens over the whole run",
    "requests_per_s": "answered requests over the whole run",
}


def read(data: Object) -> Run:
    answered = data["completed"]
    missed = data.get("failed")
    if missed is None:
        missed = max(0, (data.get("num_prompts") or answered) - answered)
    tokens = data.get("total_output_tokens") or 0
    summary = summary_of(answered, failed({"error": missed}), data["duration"], tokens)
    for name, theirs in (("ttft_ms", "ttft"), ("itl_ms", "itl"), ("tpot_ms", "tpot"), ("e2e_ms", "e2el")):
        if data.get(f"median_{theirs}_ms") is not None:
            keys = {"mean": "mean", "p50": "median", "p90": "p90", "p95": "p95", "p99": "p99", "p99.9": "p99.9"}
            values = {ours: data.get(f"{key}_{theirs}_ms") for ours, key in keys.items()}
            count = sum(map(len, data.get("itls") or ())) if name == "itl_ms" else answered
            summary[name] = {"count": count} | {key: ms(value) for key, value in values.items() if value is not None}
    if data.get("request_goodput") is not None:
        summary["goodput_per_s"] = round(data["request_goodput"], 3)
    rate = data.get("request_rate")
    load = {"rate": None if rate in (None, "inf") else float(rate), "concurrency": data.get("max_concurrency")}
    return Run(
        tool="vllm",
        version=None,
        model=data.get("model_id"),
        label=label_of(load),
        summary=summary,
        requests=tuple(_vllm_rows(data)),
    )


def _vllm_rows(data: Object) -> Iterator[dict[str, Json]]:
    """Of --save-detailed: seconds, a list an item; a failed request has an error text and no first token."""
    starts = data.get("start_times")
    for index, (first_s, gaps_s) in enumerate(zip(data.get("ttfts") or (), data.get("itls") or (), strict=True)):
        error = (data.get("errors") or {index: ""})[index]
        first_us = round(first_s * 1e6)
        stamps_us = [] if error else chunks_us(first_us, [gap * 1000 for gap in gaps_s])
        row: dict[str, Json] = {
            "sent_us": round((starts[index] - min(starts)) * 1e6) if starts else None,
            "end_us": stamps_us[-1] if stamps_us else None,
            "first_us": None if error else first_us,
            "chunks_us": stamps_us,
            "prompt_tokens": data["input_lens"][index],
            "completion_tokens": data["output_lens"][index],
        }
        yield row | ({"error": "error", "detail": error.strip().splitlines()[-1][:500]} if error else {})
