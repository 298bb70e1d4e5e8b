"""benchmarks.json of guidellm, from 0.3 to 0.8.

Its rate figures are means over moments, which differ from requests over time: both rates are counted here instead.
Source: guidellm/benchmark/schemas (0.8), guidellm/benchmark/benchmark.py (0.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from llmopt.artifacts.outcome import Json
from llmopt.bench.report.foreign.base import Object, Run, failed, label_of, ms, spread, summary_of

CONVENTIONS: Mapping[str, str] = {
    "ttft_ms": "from before the HTTP client is called (connecting counts) to the first chunk, by time.time()",
    "answer_ms": "as ttft_ms, to the first chunk that is not reasoning",
    "tpot_ms": "per request (last - first chunk) / (tokens - 1), of the requests that the file holds",
    "itl_request_mean_ms": "guidellm's inter_token_latency_ms: as tpot_ms, each request weighted by its tokens",
    "e2e_ms": "from before the HTTP client is called to the end of the response",
    "e2e_scheduled_ms": "as e2e_ms, from the time at which the request was to be sent",
    "tokens_per_s": "output tokens of the answered requests over the measured time",
    "requests_per_s": "answered requests over the measured time",
}


def read(data: Object) -> Iterator[Run]:
    for benchmark in data["benchmarks"]:
        metrics, totals = (
            benchmark["metrics"],
            benchmark.get("request_totals") or benchmark["metrics"]["request_totals"],
        )
        kept = benchmark["requests"]["successful"]
        config = benchmark.get("config") or {}  # from 0.4 on; before: args and worker
        strategy = config.get("strategy") or benchmark["args"]["strategy"]
        wall_s = benchmark.get("duration") or benchmark["end_time"] - benchmark["start_time"]
        tokens = metrics["output_token_count"]["successful"]["total_sum"]
        summary = summary_of(totals["successful"], failed({"error": totals["errored"]}), wall_s, tokens)
        for name, theirs, scale in (
            ("ttft_ms", "time_to_first_token_ms", 1.0),
            ("answer_ms", "time_to_first_output_token_ms", 1.0),
            ("itl_request_mean_ms", "inter_token_latency_ms", 1.0),
            ("e2e_ms", "request_latency", 1000.0),
            ("e2e_scheduled_ms", "request_scheduled_latency", 1000.0),
        ):
            if metrics.get(theirs) and metrics[theirs]["successful"]["count"]:
                summary[name] = _of_guidellm(metrics[theirs]["successful"], scale, totals["successful"])
        if kept and len(kept) == totals["successful"]:
            tpots = [row["inter_token_latency_ms"] for row in kept if (row.get("output_tokens") or 0) > 1]
            summary["tpot_ms"] = spread([value for value in tpots if value is not None])
        begin_s = min((row[_start_key(row)] for row in kept), default=0.0)
        yield Run(
            tool="guidellm",
            version=(data.get("metadata") or {}).get("guidellm_version"),
            model=(config.get("backend") or benchmark.get("worker") or {}).get("model")
            or (benchmark.get("worker") or {}).get("backend_model"),
            label=label_of(strategy),
            summary=summary,
            requests=tuple(_guidellm_row(row, begin_s) for row in kept),
        )


def _of_guidellm(theirs: Object, scale: float, answered: int) -> dict[str, Json]:
    """Its count is a sum of tokens where requests are weighed by them: no more than `answered` are independent."""
    names = {"p50": "p50", "p90": "p90", "p95": "p95", "p99": "p99", "p99.9": "p999"}
    found: dict[str, Json] = {"count": min(round(theirs["count"]), answered), "mean": ms(theirs["mean"], scale)}
    found |= {name: ms(theirs["percentiles"][key], scale) for name, key in names.items()}
    found |= {name: ms(theirs[name], scale) for name in ("min", "max")}
    intervals = {"mean": theirs.get("mean_ci")} | {
        name: (theirs.get("percentile_cis") or {}).get(key) for name, key in names.items()
    }
    if any(intervals.values()):
        found["ci95"] = {
            name: [ms(each["lower"], scale), ms(each["upper"], scale)] if each else None
            for name, each in intervals.items()
        }
    return found


def _start_key(row: Object) -> str:
    return "request_start_time" if "request_start_time" in row else "start_time"  # the latter before 0.4


def _guidellm_row(row: Object, begin_s: float) -> dict[str, Json]:
    start = row[_start_key(row)]
    end = row.get("request_end_time") or row.get("end_time")
    first_ms = row.get("time_to_first_token_ms")
    return {
        "sent_us": round((start - begin_s) * 1e6),
        "end_us": round((end - start) * 1e6) if end else None,
        "first_us": None if first_ms is None else round(first_ms * 1000),
        "prompt_tokens": row.get("prompt_tokens"),
        "completion_tokens": row.get("output_tokens"),
    }
