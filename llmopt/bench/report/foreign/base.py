"""One run of another load tester, as each reader of a format hands it on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmopt.artifacts.outcome import Json

Object = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run at one level: its figures as a summary of ours has them, and its requests where the file holds them."""

    tool: str
    version: str | None
    model: str | None
    label: str  # c4, r2.5, trace
    summary: dict[str, Json]
    requests: tuple[dict[str, Json], ...] = ()  # rows of requests.parquet, those columns that are known


def label_of(load: Object) -> str:
    """Our name of a load: c4 for streams, r2.5 for a rate, `throughput` for all at once, `trace`."""
    rate = load.get("rate") or load.get("request_rate")
    if isinstance(rate, int | float):
        return f"r{rate:g}"
    streams = load.get("streams") or load.get("concurrency")
    if isinstance(streams, int | float):
        return f"c{int(streams)}"
    kind = load.get("type_") or load.get("type")
    return {"synchronous": "c1", "fixed_schedule": "trace"}.get(str(kind), str(kind) if kind else "throughput")


def summary_of(answered: int, errors: dict[str, Json], wall_s: float, tokens: float) -> dict[str, Json]:
    failed = sum(count for count in errors.values() if isinstance(count, int))
    requests = answered + failed
    return {
        "requests": requests,
        "answered": answered,
        "errors": errors,
        "error_share": round(failed / requests, 4) if requests else 0.0,
        "wall_s": round(wall_s, 4),
        "tokens": round(tokens),
        "requests_per_s": round(answered / wall_s, 3) if wall_s else 0.0,
        "tokens_per_s": round(tokens / wall_s, 3) if wall_s else 0.0,
    }


def failed(kinds: Mapping[str, float]) -> dict[str, Json]:
    return {kind: round(count) for kind, count in kinds.items() if count}


def spread(values: Sequence[float]) -> dict[str, Json] | None:
    if not values:
        return None
    found = np.percentile(values, [50, 90, 95, 99, 99.9, 0, 100])
    names = ("p50", "p90", "p95", "p99", "p99.9", "min", "max")
    spread: dict[str, Json] = {"count": len(values), "mean": ms(float(np.mean(values)))}
    return spread | {name: ms(float(value)) for name, value in zip(names, found, strict=True)}


def chunks_us(first_us: int, gaps_ms: Sequence[float]) -> list[Json]:
    return [int(stamp) for stamp in np.rint(first_us + 1000 * np.cumsum([0.0, *gaps_ms]))]


def ms(value: float, scale: float = 1.0) -> float:
    return round(value * scale, 3)
