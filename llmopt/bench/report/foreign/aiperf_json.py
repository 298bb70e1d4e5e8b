"""profile_export_aiperf.json of aiperf, and profile_export_genai_perf.json of genai-perf, which it succeeds.

Sources: aiperf 0.13 (exporters/metrics_json_exporter.py, metrics/types) and genai-perf 0.0.16
(export_data/json_exporter.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from llmopt.artifacts.outcome import Json
from llmopt.bench.report.foreign.base import Object, Run, chunks_us, failed, label_of, ms, summary_of

AIPERF: Mapping[str, str] = {
    "ttft_ms": "from before the HTTP client is called (connecting counts) to the first chunk",
    "answer_ms": "as ttft_ms, to the first chunk that is not reasoning",
    "itl_ms": "aiperf's inter_chunk_latency: every gap between chunks, of all requests",
    "tpot_ms": "aiperf's inter_token_latency: per request (e2e - ttft) / (tokens - 1)",
    "itl_request_mean_ms": "the same as tpot_ms: aiperf's inter_token_latency is a mean of each request",
    "e2e_ms": "from before the HTTP client is called to the last chunk with content",
    "tokens_per_s": "output tokens over the time from the first request to the last answer",
    "requests_per_s": "answered requests over the same time",
}
GENAI_PERF: Mapping[str, str] = {
    "ttft_ms": "from the sending to the first response",
    "tpot_ms": "genai-perf's inter_token_latency: per request (e2e - ttft) / (tokens - 1)",
    "itl_request_mean_ms": "the same as tpot_ms: genai-perf's inter_token_latency is a mean of each request",
    "e2e_ms": "from the sending to the last response",
    "tokens_per_s": "output tokens over the time from the first request to the last response",
    "requests_per_s": "answered requests over the same time",
}
_MS = {"ns": 1e-6, "us": 1e-3, "ms": 1.0, "s": 1e3, "sec": 1e3, "seconds": 1e3}


def read(data: Object, file: Path) -> Run:
    """The JSON of aiperf, and of genai-perf, whose successor it is; requests from profile_export.jsonl beside it."""
    tool = "aiperf" if "aiperf_version" in data or "schema_version" in data else "genai-perf"
    answered, wall_s = _avg(data, "request_count"), _avg(data, "benchmark_duration", unit=1.0)
    rate, output = _avg(data, "request_throughput"), _avg(data, "output_sequence_length")
    if answered is None:
        answered = float(data["request_latency"].get("count") or 0)
    if wall_s is None:
        wall_s = answered / rate if rate else 0.0
    errors = failed({"error": _avg(data, "error_request_count") or 0})
    summary = summary_of(round(answered), errors, wall_s, round(answered * (output or 0)))
    theirs_by_name = {
        "ttft_ms": "time_to_first_token",
        "answer_ms": "time_to_first_output_token",
        "itl_ms": "inter_chunk_latency",
        "tpot_ms": "inter_token_latency",
        "itl_request_mean_ms": "inter_token_latency",
        "e2e_ms": "request_latency",
    }
    for name, key in theirs_by_name.items():
        if isinstance(data.get(key), Mapping):
            summary[name] = _of_aiperf(data[key], round(answered))
    for name, key in (("tokens_per_s", "output_token_throughput"), ("requests_per_s", "request_throughput")):
        if (value := _avg(data, key)) is not None:
            summary[name] = round(value, 3)
    config = data.get("input_config") or {}
    records = file.with_name("profile_export.jsonl")
    return Run(
        tool=tool,
        version=data.get("aiperf_version"),
        model=_aiperf_model(config),
        label=label_of(_aiperf_load(config)),
        summary=summary,
        requests=tuple(_aiperf_rows(records)) if tool == "aiperf" and records.is_file() else (),
    )


def _of_aiperf(theirs: Object, answered: int) -> dict[str, Json]:
    scale = _MS[theirs["unit"]]
    found: dict[str, Json] = {"count": theirs.get("count") or answered, "mean": ms(theirs["avg"], scale)}
    names = ("p50", "p90", "p95", "p99", "min", "max")
    return found | {name: ms(theirs[name], scale) for name in names if theirs.get(name) is not None}


def _aiperf_model(config: Object) -> str | None:
    models = config.get("models") or (config.get("endpoint") or {}).get("model_names") or config.get("model_names")
    items = models.get("items") if isinstance(models, Mapping) else models
    first = items[0] if items else None
    return str(first["name"] if isinstance(first, Mapping) else first) if first else None


def _aiperf_load(config: Object) -> Object:
    """The load where each generation of the tool writes it: phases, loadgen, perf_analyzer."""
    phases = [phase for phase in config.get("phases") or () if not phase.get("exclude_from_results")]
    older = config.get("loadgen") or (config.get("perf_analyzer") or {}).get("stimulus") or {}
    load: Object = phases[-1] if phases else older
    return load


def _aiperf_rows(records: Path) -> Iterator[dict[str, Json]]:
    lines = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines() if line.strip()]
    measured = [line for line in lines if line["metadata"].get("benchmark_phase", "profiling") == "profiling"]
    begin_ns = min((line["metadata"]["request_start_ns"] for line in measured), default=0)
    for line in measured:
        metadata, metrics = line["metadata"], line["metrics"]
        start_ns = metadata["request_start_ns"]
        first, gaps = metrics.get("time_to_first_token"), metrics.get("inter_chunk_latency")
        first_us = None if first is None else round(first["value"] * _MS[first["unit"]] * 1000)
        row: dict[str, Json] = {
            "sent_us": (start_ns - begin_ns) // 1000,
            "end_us": (metadata["request_end_ns"] - start_ns) // 1000,
            "first_us": first_us,
            "prompt_tokens": (metrics.get("input_sequence_length") or {}).get("value"),
            "completion_tokens": (metrics.get("output_sequence_length") or {}).get("value"),
            "turn": metadata.get("turn_index"),
        }
        if first_us is not None and gaps is not None:
            row["chunks_us"] = chunks_us(first_us, [gap * _MS[gaps["unit"]] for gap in gaps["value"]])
        if line.get("error"):
            row |= {"error": "error", "detail": str(line["error"].get("message") or line["error"].get("type"))}
        yield row


def _avg(data: Object, name: str, *, unit: float | None = None) -> float | None:
    """The value of a single figure of aiperf; with `unit` in seconds."""
    theirs = data.get(name)
    if not isinstance(theirs, Mapping) or theirs.get("avg") is None:
        return None
    return float(theirs["avg"]) * (_MS[theirs["unit"]] / 1000 if unit is not None else 1.0)
