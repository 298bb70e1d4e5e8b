"""How true the client is on this machine: it loads a server that logs what it really did, and the two are compared.

Client and server have a core each where there are two. Each load is a process of its own (trial.py). The truth of a
time to first token is from the arrival of the request to the sending of the first token, both by the server's log; the
client's is its own. Errors are of the percentiles, as those are what a report says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from llmopt.artifacts.outcome import Json
from llmopt.bench.serving import serving
from llmopt.bench.trial import Trial
from llmopt.errors import LlmoptError, MeasurementInvalidError

TOKENS = 64  # of every answer
TTFT_MS, GAP_MS = 100.0, 10.0
_STREAM_S = (TTFT_MS + (TOKENS - 1) * GAP_MS) / 1e3


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What the client promises. Shares of the truth, but for the last four."""

    ttft_p50: float
    ttft_p99: float
    gap_p50: float
    gap_p99: float | None
    held: float = 0.99
    cpu_s_per_1000_tokens: float = 0.015
    start_s: float = 0.4
    rss_mb: float = 80.0  # beside the data
    late_ms_p99: float = 1.0


FEW = Limits(ttft_p50=0.005, ttft_p99=0.02, gap_p50=0.005, gap_p99=0.05)  # up to 256 streams
MANY = Limits(ttft_p50=0.01, ttft_p99=0.05, gap_p50=0.01, gap_p99=None)


@dataclass(frozen=True, slots=True)
class Times:
    """Times to first token and gaps, sorted."""

    ttft_ms: Sequence[float]
    gap_ms: Sequence[float]


def run(
    progress: Callable[[str], None],
    *,
    streams: Sequence[int] = (16, 256),
    rates: Sequence[float] = (200.0,),
    rounds: int = 10,
) -> dict[str, Json]:
    """Drive a closed loop for each of `streams` and an open one for each of `rates`, in requests a second.

    Each for as long as `rounds` answers take, one after another. In the result, `true` says that figures of this client
    can be believed here, `met` that it also costs no more than it promises.
    """
    server_core, client_core = cores()
    levels: list[dict[str, Json]] = []
    for count, rate in [*((count, None) for count in streams), *((None, rate) for rate in rates)]:
        progress(f"{count} streams" if count is not None else f"{rate:g} requests/s")
        requests = rounds * count if count is not None else round(rounds * _STREAM_S * (rate or 0))
        with truth_server(server_core) as url:
            trial = Trial(url=url, requests=requests, tokens=TOKENS, streams=count, rate=rate, core=client_core)
            begun_ns, seen = _drive(trial)
            levels.append(judge(trial, seen, fetch_log(url), begun_ns))
    return {
        "true": all(level["true"] for level in levels),
        "met": all(level["met"] for level in levels),
        "cores": 1 if server_core == client_core else 2,
        "levels": list(levels),
    }


def cores() -> tuple[int, int]:
    """One for the server and one for the client; the same where there is but one."""
    if sys.platform != "linux":
        raise LlmoptError("the self-test needs Linux", hint="its server takes the kernel's stamps and epoll")
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[-1], allowed[0]


@contextmanager
def truth_server(core: int) -> Iterator[str]:
    """The URL of a new known-truth server."""
    command = [sys.executable, "-m", "llmopt.bench.truth", "--core", str(core)]
    command += ["--ttft-ms", str(TTFT_MS), "--gap-ms", str(GAP_MS)]
    with (
        tempfile.TemporaryDirectory() as folder,
        serving("truth", Path(), Path(folder) / "log", lambda _: command, start_timeout_s=60.0) as server,
    ):
        yield server.url


def fetch_log(url: str) -> dict[str, Any]:
    """What a known-truth server did; see truth.py."""
    with urllib.request.urlopen(f"{url}/log", timeout=60) as response:
        return dict(json.load(response))


def _drive(trial: Trial) -> tuple[int, dict[str, Any]]:
    """When its process was begun, and what it saw."""
    begun_ns = time.monotonic_ns()
    ran = subprocess.run(trial.command(), capture_output=True, text=True)
    if ran.returncode:
        raise MeasurementInvalidError("the client of the self-test failed", hint=ran.stderr[-2000:])
    return begun_ns, json.loads(ran.stdout)


def judge(trial: Trial, seen: Mapping[str, Any], log: Mapping[str, Any], begun_ns: int) -> dict[str, Json]:
    """One load: what the client saw beside the truth, what it cost, and whether that is within the limits."""
    truth = {request["id"]: request for request in log["requests"]}
    answered = [request for request in seen["requests"] if not request["failure"]]
    if not answered or not truth:
        raise MeasurementInvalidError("no request of the self-test was answered")
    tokens = sum(len(request["stamps_ns"]) for request in answered)
    first_ns = min(request["arrived_ns"] for request in truth.values())
    wall_s = (max(request["sent_ns"][-1] for request in truth.values() if request["sent_ns"]) - first_ns) / 1e9
    level: dict[str, Json] = {
        "label": f"c{trial.streams}" if trial.rate is None else f"r{trial.rate:g}",
        "streams": trial.streams,
        "rate": trial.rate,
        "requests": trial.requests,
        "failed": trial.requests - len(answered),
        **compare(times_seen(answered), times_sent(log)),
        "requests_per_s": len(answered) / wall_s if trial.rate is None else _arrivals_per_s(log),
        "tokens_per_s": tokens / wall_s,
        "cpu_s_per_1000_tokens": seen["cpu_s"] / tokens * 1e3,
        "tokens_per_core_s": tokens / seen["cpu_s"],
        "waited": seen["waited_s"] / wall_s,
        "start_s": (first_ns - begun_ns) / 1e9,
        "peak_rss_mb": seen["peak_rss_bytes"] / 1e6,
        "data_mb": seen["data_bytes"] / 1e6,
        "stamps": seen["stamps"],
        "coalesced": _coalesced(answered),
        "transit_us": _transit(answered, truth),
        "server": {name: log[name] for name in ("late_us", "half_width_us", "cut")},
    }
    if trial.streams is not None:
        level["held"] = held(log, trial.streams)
    else:
        level["late_ms"] = _late(answered, truth)
    checks = _checks(level, FEW if trial.streams is None or trial.streams <= 256 else MANY)
    return {**level, "checks": checks, "true": _met(checks, "truth"), "met": _met(checks, "truth", "cost")}


def times_seen(requests: Sequence[Mapping[str, Any]]) -> Times:
    """By the client's stamps."""
    return _times([(request["sent_ns"], request["stamps_ns"]) for request in requests])


def times_sent(log: Mapping[str, Any]) -> Times:
    """By the server's log."""
    return _times([(request["arrived_ns"], request["sent_ns"]) for request in log["requests"] if request["sent_ns"]])


def _times(requests: Sequence[tuple[int, Sequence[int]]]) -> Times:
    ttft_ms = sorted((stamps_ns[0] - begun_ns) / 1e6 for begun_ns, stamps_ns in requests)
    gap_ms = sorted(
        (after_ns - before_ns) / 1e6 for _, stamps_ns in requests for before_ns, after_ns in pairwise(stamps_ns)
    )
    return Times(ttft_ms, gap_ms)


def compare(client: Times, truth: Times) -> dict[str, Json]:
    """Medians and p99 of both, and the error as a share of the truth."""
    found: dict[str, Json] = {}
    for name, ours, theirs in (("ttft_ms", client.ttft_ms, truth.ttft_ms), ("gap_ms", client.gap_ms, truth.gap_ms)):
        for percent in (50, 99):
            is_said, is_true = percentile(ours, percent), percentile(theirs, percent)
            found[f"{name}_p{percent}"] = {"client": is_said, "truth": is_true, "error": is_said / is_true - 1}
    return found


def percentile(ordered: Sequence[float], percent: float) -> float:
    """With linear interpolation."""
    at = (len(ordered) - 1) * percent / 100
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


def held(log: Mapping[str, Any], streams: int) -> float:
    """The mean number of answers under way by the server's log, as a share of `streams`, from when all have begun to
    when the last request has come."""
    requests = [(request["arrived_ns"], request["sent_ns"][-1]) for request in log["requests"] if request["sent_ns"]]
    arrivals = sorted(arrived_ns for arrived_ns, _ in requests)
    if len(arrivals) <= streams:
        return len(arrivals) / streams
    start, end = arrivals[streams - 1], arrivals[-1]
    busy_ns = sum(max(0, min(ended_ns, end) - max(arrived_ns, start)) for arrived_ns, ended_ns in requests)
    return float(busy_ns / (end - start) / streams)


def _arrivals_per_s(log: Mapping[str, Any]) -> float:
    arrivals = sorted(request["arrived_ns"] for request in log["requests"])
    return float((len(arrivals) - 1) / max(1, arrivals[-1] - arrivals[0]) * 1e9)


def _coalesced(requests: Sequence[Mapping[str, Any]]) -> float:
    """The share of gaps that the client saw as nothing, as two tokens came with one receive."""
    gaps = _times([(0, request["stamps_ns"]) for request in requests]).gap_ms
    return sum(gap == 0 for gap in gaps) / max(1, len(gaps))


def _transit(requests: Sequence[Mapping[str, Any]], truth: Mapping[str, Mapping[str, Any]]) -> Json:
    """From the server's stamp of a token to the client's: what the two stamps of one event are apart."""
    apart = sorted(
        (seen_ns - sent_ns) / 1e3
        for request in requests
        for sent_ns, seen_ns in zip(truth[request["id"]]["sent_ns"], request["stamps_ns"], strict=False)
    )
    return {f"p{percent}": percentile(apart, percent) for percent in (1, 50, 99)}


def _late(requests: Sequence[Mapping[str, Any]], truth: Mapping[str, Mapping[str, Any]]) -> Json:
    """From when each request was due to when the server's kernel had it."""
    late = sorted((truth[request["id"]]["arrived_ns"] - request["due_ns"]) / 1e6 for request in requests)
    return {f"p{percent}": percentile(late, percent) for percent in (50, 99)}


def _checks(level: Mapping[str, Any], limits: Limits) -> list[Json]:
    """Kind `truth`: whether figures can be believed. Kind `cost`: whether the client is as cheap as it promises."""
    found = [_check("truth", "failed", level["failed"], 0)]
    for name, limit in (
        ("ttft_ms_p50", limits.ttft_p50),
        ("ttft_ms_p99", limits.ttft_p99),
        ("gap_ms_p50", limits.gap_p50),
        ("gap_ms_p99", limits.gap_p99),
    ):
        if limit is not None:
            found.append(_check("truth", f"{name} error", abs(level[name]["error"]), limit))
    if "held" in level:
        found.append(_check("truth", "streams not held", 1 - level["held"], 1 - limits.held))
    if "late_ms" in level:
        found.append(_check("truth", "late_ms_p99", level["late_ms"]["p99"], limits.late_ms_p99))
    if (level["streams"] or 0) >= 256:  # below, the client is woken for every single token, and has the time
        cpu_s = level["cpu_s_per_1000_tokens"]
        found.append(_check("cost", "cpu_s_per_1000_tokens", cpu_s, limits.cpu_s_per_1000_tokens))
    found.append(_check("cost", "start_s", level["start_s"], limits.start_s))
    found.append(_check("cost", "peak_rss_mb", level["peak_rss_mb"], limits.rss_mb + level["data_mb"]))
    return found


def _check(kind: str, what: str, value: float, limit: float) -> Json:
    return {"kind": kind, "what": what, "value": value, "limit": limit, "met": value <= limit}


def _met(checks: Sequence[Json], *kinds: str) -> bool:
    return all(check["met"] for check in checks if isinstance(check, dict) and check["kind"] in kinds)


def table(result: Mapping[str, Any]) -> str:
    """The levels side by side, and what misses its limit."""
    levels = result["levels"]
    rows = [["", *(level["label"] for level in levels)]]
    for name, title in (("ttft_ms", "TTFT"), ("gap_ms", "gap")):
        for percent in ("p50", "p99"):
            cells = [level[f"{name}_{percent}"] for level in levels]
            rows.append([f"{title} {percent}, ms: client", *(f"{cell['client']:.2f}" for cell in cells)])
            rows.append(["  truth", *(f"{cell['truth']:.2f}" for cell in cells)])
            rows.append(["  error", *(f"{cell['error']:+.2%}" for cell in cells)])
    rows += [
        ["streams held", *(f"{level['held']:.2%}" if "held" in level else "-" for level in levels)],
        ["sent late p99, ms", *(f"{level['late_ms']['p99']:.2f}" if "late_ms" in level else "-" for level in levels)],
        ["requests/s", *(f"{level['requests_per_s']:.0f}" for level in levels)],
        ["tokens/s", *(f"{level['tokens_per_s']:.0f}" for level in levels)],
        ["CPU s per 1,000 tokens", *(f"{level['cpu_s_per_1000_tokens']:.4f}" for level in levels)],
        ["tokens/s that a core can", *(f"{level['tokens_per_core_s']:.0f}" for level in levels)],
        ["start to first request, s", *(f"{level['start_s']:.2f}" for level in levels)],
        ["peak RSS, MB", *(f"{level['peak_rss_mb']:.0f}" for level in levels)],
        ["requests and held answers, MB", *(f"{level['data_mb']:.0f}" for level in levels)],
        ["client waited for its core", *(f"{level['waited']:.1%}" for level in levels)],
        ["tokens that came together", *(f"{level['coalesced']:.2%}" for level in levels)],
        ["server: late p99, ms", *(f"{level['server']['late_us']['p99'] / 1e3:.2f}" for level in levels)],
        ["server: stamps true within, us", *(f"{level['server']['half_width_us']['p50']:.1f}" for level in levels)],
        ["client after server p50, us", *(f"{level['transit_us']['p50']:.1f}" for level in levels)],
    ]
    lines = ["  ".join([row[0].ljust(30), *(cell.rjust(9) for cell in row[1:])]) for row in rows]
    misses = [
        f"{level['label']}: {check['what']} is {check['value']:.4g}, the limit is {check['limit']:.4g}"
        for level in levels
        for check in level["checks"]
        if not check["met"]
    ]
    if result["cores"] == 1:
        misses.append("client and server shared one core, so each held up the other")
    return "\n".join([*lines, "", *(misses or ["all within the limits"])])
