"""The figures without nesting: with the keys of `vllm bench serve --save-result`, and as CSV.

The keys are those of vllm/benchmarks/serve.py, so that what reads its files reads these. vLLM counts a gap (`itl`) as
we do, its `tpot` is ours, and its `e2el` our e2e. What differs: its TTFT starts when a request is given to the HTTP
client, ours when it is written.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from llmopt.bench.report.rows import Floats, Rows, grouped
from llmopt.bench.report.words import Report, figure, levels

_VLLM_NAMES = {"ttft_ms": "ttft", "tpot_ms": "tpot", "itl_ms": "itl", "e2e_ms": "e2el"}


def vllm(report: Report, measured: Sequence[Rows]) -> str:
    """One object for each subject and level, a line each as `--append-result` writes them; one level is plain JSON."""
    groups = dict(grouped(measured))
    lines = [
        json.dumps(_vllm(report, subject, level, summary, groups.get((subject, level), ())))
        for subject, level, summary in levels(report)
    ]
    return "".join(line + "\n" for line in lines)


def _vllm(
    report: Report, subject: str, level: str, summary: Mapping[str, Any], rounds: Sequence[Rows]
) -> dict[str, Any]:
    settings, of = report["settings"], report["subjects"].get(subject) or {}
    backend = "openai-chat" if settings.get("endpoint") == "chat" else "openai"
    answered, started = summary["answered"], report["environment"].get("started")
    flat: dict[str, Any] = {
        "date": datetime.fromisoformat(started).strftime("%Y%m%d-%H%M%S") if started else None,
        "endpoint_type": backend,
        "backend": backend,
        "label": f"{subject}-{level}",
        "model_id": of.get("model"),
        "tokenizer_id": of.get("model"),
        "num_prompts": summary["requests"],
        "request_rate": float(level[1:]) if level.startswith("r") and _is_number(level[1:]) else "inf",
        "burstiness": settings.get("burstiness") or 1.0,
        "max_concurrency": int(level[1:]) if level.startswith("c") and level[1:].isdigit() else None,
        "duration": summary["wall_s"],
        "completed": answered,
        "failed": summary["requests"] - answered,
        "total_input_tokens": round((summary.get("prompt_tokens") or 0) * answered),
        "total_output_tokens": summary["tokens"],
        "request_throughput": summary["requests_per_s"],
        "request_goodput": summary.get("goodput_per_s"),
        "output_throughput": summary["tokens_per_s"],
        "total_token_throughput": summary.get("total_tokens_per_s"),
        "max_concurrent_requests": max((_most_at_once(rows) for rows in rounds), default=None),
    }
    times_ms = [rows.times_ms() for rows in rounds]
    for ours, theirs in _VLLM_NAMES.items():
        spread = summary.get(ours)
        if isinstance(spread, Mapping):
            values_ms = np.concatenate([found[ours] for found in times_ms]) if times_ms else np.empty(0)
            flat |= _vllm_spread(spread, theirs, values_ms)
    return flat


def _vllm_spread(spread: Mapping[str, Any], name: str, values_ms: Floats) -> dict[str, Any]:
    """`p99_ttft_ms` and so on; the deviation, which a summary does not have, from the values."""
    flat = {f"mean_{name}_ms": spread["mean"], f"median_{name}_ms": spread["p50"]}
    if len(values_ms):
        flat[f"std_{name}_ms"] = float(values_ms.std())
    return flat | {f"{key}_{name}_ms": value for key, value in spread.items() if key[0] == "p" and _is_number(key[1:])}


def _most_at_once(rows: Rows) -> int:
    """The most requests in flight at any time."""
    sent_us, took_us = (np.rint(1e6 * seconds) for seconds in (rows.sent_s, rows.end_s))
    times = np.concatenate([sent_us, sent_us + took_us])
    steps = np.repeat([1, -1], len(rows))
    order = np.lexsort((steps, times))  # one that ends makes room for one that starts then
    return int(np.cumsum(steps[order]).max(initial=0))


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def csv_rows(report: Report) -> str:
    """A row for each subject, level and round, and one of all rounds; a column a figure, none of them nested."""
    rows: list[dict[str, Any]] = []
    for subject, level, summary in levels(report):
        about = {"subject": subject, "level": level, "valid": report["valid"]}
        pooled = {name: value for name, value in summary.items() if name != "rounds"}
        rows.append(about | {"round": "all", "errors": figure(summary, "errors")} | _flattened(pooled))
        rows += [about | _flattened(found) for found in summary.get("rounds") or ()]
    columns = dict.fromkeys(("subject", "level", "round", "valid", *(name for row in rows for name in row)))
    out = io.StringIO()
    writer = csv.DictWriter(out, list(columns), lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _flattened(figures: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"ttft_ms": {"p50": 1, "ci95": {"p50": [0, 2]}}}` as `ttft_ms_p50`, `ttft_ms_ci95_p50_1` and `.._2`."""
    flat: dict[str, Any] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            flat |= _flattened(value, f"{prefix}{name}_")
        elif isinstance(value, list | tuple):
            flat |= _flattened({str(place): item for place, item in enumerate(value, 1)}, f"{prefix}{name}_")
        elif value is not None:
            flat[f"{prefix}{name}"] = value
    return flat
