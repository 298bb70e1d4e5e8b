"""A report as a run of twelve rounds would leave it: a server that queues and stalls at times, and one that is faster.

The times are drawn from a small model of a server with so many slots; what is measured of them is computed here, so
that the writers are tested against figures that fit their requests.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

from llmopt.bench.client.base import Failure
from llmopt.bench.metrics.figures import CONVENTIONS, Level, LoadShape, compact, summarise
from llmopt.bench.metrics.records import Record

ARTIFACT = "sha256:" + "3f" * 32
Json = dict[str, Any]


def levels(
    *, streams: Sequence[int] = (1, 4, 16, 32), rounds: int = 3, requests: int = 48, seed: int = 7
) -> list[Level]:
    """Of a candidate and a baseline that is 8 % slower; some requests of the most loaded level fail."""
    rng = np.random.default_rng(7)
    found = []
    for number in range(rounds):
        noise = rng.normal(1.0, 0.04)
        for subject, factor in (("candidate", 1.0), ("baseline", 1.08)):
            for count in streams:
                slow = factor * noise * rng.normal(1.0, 0.02)
                found.append(closed(rng, subject, count, number, requests=requests, slow=slow))
    return found


def closed(rng: np.random.Generator, subject: str, streams: int, number: int, *, requests: int, slow: float) -> Level:
    """A closed loop against eight slots: with more streams than those, requests wait."""
    started_ns = 5_000_000_000 * (number + 1)
    free_ns = [started_ns + 1000 * stream for stream in range(streams)]
    slots_ns = [started_ns] * 8
    records = []
    for prompt in range(max(requests, 2 * streams)):
        stream = int(np.argmin(free_ns))
        sent_ns = free_ns[stream]
        slot = int(np.argmin(slots_ns))
        begin_ns = max(sent_ns, slots_ns[slot])
        first_ns = begin_ns + int(slow * rng.lognormal(3.4, 0.25) * 1e6)
        gaps_ms = slow * rng.lognormal(2.0 + 0.02 * min(streams, 8), 0.12, 31)
        gaps_ms[rng.random(31) < 0.01] += 80.0  # a stall
        stamps = array("q", [first_ns, *(first_ns + np.cumsum(gaps_ms * 1e6).astype(np.int64)).tolist()])
        failed = streams >= 16 and prompt % 40 == 17
        if failed:
            stamps = stamps[:9]
        slots_ns[slot] = free_ns[stream] = stamps[-1] + 20_000
        records.append(
            Record(
                prompt=prompt, turn=0, target=0, status=200, due_ns=None, sent_ns=sent_ns, end_ns=free_ns[stream],
                stamps_ns=stamps, answer_ns=first_ns, prompt_tokens=128, cached_tokens=0,
                completion_tokens=None if failed else 32, wanted_tokens=32, finish=None if failed else "length",
                streamed=True, failure=Failure("cut", "ended in mid-token") if failed else None,
            )
        )  # fmt: skip
    end_ns = max(record.end_ns for record in records)
    return Level(
        subject=subject, load=LoadShape(streams=streams, label=f"c{streams}"), round=number,
        records=tuple(records), started_ns=started_ns, wall_s=(end_ns - started_ns) / 1e9, cpu_s=0.02,
        lags_ms=(0.02, 0.05),
    )  # fmt: skip


def report(measured: Sequence[Level] | None = None, **changes: Any) -> Json:
    """What `levels()` comes to, with a gate; keys can be replaced."""
    return {
        "schema": "llmopt.report/2",
        "valid": True,
        "invalid_because": None,
        "settings": {
            "concurrency": [1, 4, 16, 32], "requests": 48, "prompt_tokens": 128, "output_tokens": 32, "rounds": 12,
            "endpoint": "completions", "workload": "chat", "seed": 0, "slo": ["ttft_ms_p99<=200"],
        },
        "subjects": subjects(),
        "results": json.loads(_usual_results()) if measured is None else results(measured),
        "gate": gate(),
        "sweep": None,
        "notes": [
            "`candidate` c32: 2 of 64 requests failed: 2 `cut` (ended in mid-token)",
            "`baseline` c1: 6 % of the tokens came together with another: gaps are between chunks, not tokens",
        ],
        "environment": {
            "started": "2026-11-21T19:00:00+00:00", "cpu": "Some CPU @ 2.90GHz", "cores": 2, "cores_of_machine": 2,
            "smt": False, "governor": None, "load_average": [0.4, 0.5, 0.6], "system": "Linux 6.1.0 x86_64",
            "clock": {"source": "tsc", "resolution_ns": 1}, "limits": {"container": True, "cpus": 1.5},
            "versions": {"llmopt": "0.4.0", "python": "CPython 3.12.1"},
        },
        "conventions": dict(CONVENTIONS),
    } | changes  # fmt: skip


def results(measured: Sequence[Level]) -> Json:
    found: Json = {}
    for level in measured:
        found.setdefault(level.subject, {}).setdefault(level.load.label, []).append(level)
    return {name: {at: summary(group) for at, group in of.items()} for name, of in found.items()}


@cache
def _usual_results() -> str:
    return json.dumps(results(levels()))


def subjects() -> Json:
    lineage = [
        {"id": ARTIFACT, "kind": "engine", "op": "compile.openvino", "settings": {"target": "openvino"},
         "metrics": {"weight_bytes": 5_900_000}, "bytes": 7_100_000, "source": None},
        {"id": "sha256:" + "a1" * 32, "kind": "quantized-model", "op": "quantize.gptq",
         "settings": {"bits": 4, "group_size": 128},
         "metrics": {"bits_per_weight": 4.156, "weight_bytes": 5_700_000, "kl_mean": 0.0123, "perplexity": 9.81,
                     "base_perplexity": 9.72, "top1_agreement": 0.958},
         "bytes": 6_400_000, "source": None},
        {"id": "sha256:" + "b2" * 32, "kind": "model", "op": None, "settings": {}, "metrics": {},
         "bytes": 15_900_000, "source": "org/name@0123abc", "license": "apache-2.0"},
    ]  # fmt: skip
    return {
        "candidate": {"model": "tiny-gptq", "engine": "engine", "artifact": ARTIFACT, "lineage": lineage},
        "baseline": {"model": "tiny", "url": "http://127.0.0.1:8000", "artifact": None, "lineage": []},
    }


def comparison(metric: str, ratio: float, verdict: str, *, level: str = "c16", reason: str = "") -> Json:
    better = "higher" if "_per_s" in metric else "lower"
    return {
        "level": level, "metric": metric, "better": better, "ratio": ratio, "low": ratio - 0.021, "high": ratio + 0.024,
        "p": 0.004, "p_adjusted": 0.012, "rounds": 12, "margin": 0.05, "verdict": verdict, "reason": reason,
    }  # fmt: skip


def gate(verdict: str = "fail") -> Json:
    return {
        "verdict": verdict, "margin": 0.05, "alpha": 0.05, "looks": 1, "baseline": None,
        "comparisons": [
            comparison("ttft_ms_p50", 0.927, "pass", reason="7.3% lower, not worse by the margin of 5.0%"),
            comparison("itl_ms_p50", 0.941, "pass", reason="5.9% lower, not worse by the margin of 5.0%"),
            comparison("itl_ms_p99", 1.041, "inconclusive", reason="4.1% higher: 6.5% higher is not ruled out"),
            comparison("tokens_per_s", 1.083, "pass", reason="8.3% higher, not worse by the margin of 5.0%"),
            comparison("ttft_ms_p99", 1.122, "fail", level="c32", reason="12.2% higher, worse by more than 5.0%"),
        ],
        "slo": [
            {"slo": "ttft_ms_p99<=200", "level": "c4", "subject": "candidate", "value": 61.2, "met": True},
            {"slo": "ttft_ms_p99<=200", "level": "c32", "subject": "candidate", "value": 1250.4, "met": False},
        ],
    }  # fmt: skip


def summary(group: Sequence[Level]) -> Json:
    found: Json = summarise(group, {"ttft_ms": 400.0})
    return found | {"rounds": [{"round": level.round, **compact(summarise([level]))} for level in group]}


@pytest.fixture(scope="session")
def make_levels() -> Callable[..., list[Level]]:
    return levels


@pytest.fixture(scope="session")
def make_report() -> Callable[..., Json]:
    return report


@pytest.fixture(scope="session")
def make_gate() -> Callable[..., Json]:
    return gate


@pytest.fixture(scope="session")
def make_comparison() -> Callable[..., Json]:
    return comparison
