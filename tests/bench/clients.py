"""One load client after another against a new known-truth server: the client has one core, the server the other.

A client is a command line and a way to read what it reported. What it cost is sampled from /proc over all of its
processes, so that a tool with workers is counted whole; CPU seconds are of the load, without the start and the report.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmopt.bench import selftest
from llmopt.bench.metrics.figures import compact
from llmopt.bench.selftest import TOKENS, cores, fetch_log, held, percentile, times_sent, truth_server
from llmopt.bench.trial import Trial

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "out" / "bench-client"
TOKENIZER = ROOT / "demo" / "model"
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Said:
    """What a client reports, in ms."""

    ttft_p50: float
    ttft_p99: float
    gap_p50: float
    gap_p99: float


@dataclass(frozen=True, slots=True)
class Client:
    """`command` gets the URL, streams and requests, and runs in a folder where `read` then finds the report."""

    command: Callable[[str, int, int], list[str]]
    read: Callable[[Path], Said]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A client's report beside the truth of the same requests, and its cost."""

    said: Said
    true: Said
    requests: int
    held: float  # streams, as a share
    requests_per_s: float
    cpu_s_per_1000_tokens: float
    start_s: float  # to the first request
    peak_rss_mb: float  # of all its processes together


@dataclass(slots=True)
class _Sampler:
    """CPU and memory of a process and all its children, every tenth of a second."""

    pid: int
    samples: list[tuple[int, float]]  # (stamp in ns, CPU seconds so far, of the ended processes too)
    peak_rss_bytes: int = 0

    def watch(self, ended: threading.Event) -> None:
        most: dict[int, float] = {}
        while not ended.wait(0.1):
            rss_bytes = 0
            for pid in _tree(self.pid):
                try:
                    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                most[pid] = (int(fields[11]) + int(fields[12])) / _TICKS
                rss_bytes += int(fields[21]) * _PAGE
            self.samples.append((time.monotonic_ns(), sum(most.values())))
            self.peak_rss_bytes = max(self.peak_rss_bytes, rss_bytes)

    def cpu_s(self, start_ns: int, end_ns: int) -> float:
        """Between the two moments, to a sample."""
        before = [cpu_s for stamp_ns, cpu_s in self.samples if stamp_ns <= start_ns]
        after = [cpu_s for stamp_ns, cpu_s in self.samples if stamp_ns >= end_ns] or [self.samples[-1][1]]
        return after[0] - (before[-1] if before else 0.0)


def others(seconds: float = 1.0) -> float:
    """How much of the cores is busy, or lent to another machine, while nothing of ours runs."""
    before = _core_times()
    time.sleep(seconds)
    spent = [after - was for was, after in zip(before, _core_times(), strict=True)]
    idle = spent[3] + spent[4]  # waiting for a disk is idle, too
    return 1 - idle / max(1, sum(spent))


def _core_times() -> list[int]:
    """In ticks: user, nice, system, idle, iowait, irq, softirq, steal."""
    return [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]


def _tree(root: int) -> list[int]:
    found = [root]
    for pid in found:
        for file in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                found += map(int, file.read_text().split())
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


@contextmanager
def _pinned(core: int) -> Iterator[None]:
    """What is started in the block runs on this core only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(name: str, *, streams: int, requests: int) -> Row:
    """One load by the client of this name; its report and its output stay in `out/bench-client`."""
    client = CLIENTS[name]
    folder = KEPT / f"{name.replace(' ', '-')}-{streams}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    server_core, client_core = cores()
    with truth_server(server_core) as url, (folder / "log").open("wb") as log_file:
        begun_ns = time.monotonic_ns()
        with _pinned(client_core):
            process = subprocess.Popen(
                client.command(url, streams, requests),
                cwd=folder,
                env=_environment(name),
                stdout=log_file,
                stderr=subprocess.STDOUT,
            )
        sampler, ended = _Sampler(process.pid, []), threading.Event()
        watcher = threading.Thread(target=sampler.watch, args=(ended,))
        watcher.start()
        code = process.wait()
        ended.set()
        watcher.join()
        log = fetch_log(url)
    if code:
        raise RuntimeError(f"{name} failed: {(folder / 'log').read_text(errors='replace')[-2000:]}")
    return _row(client.read(folder), log, sampler, streams, begun_ns)


def _environment(name: str) -> dict[str, str]:
    """Peers have their own packages, and aiperf 0.13 takes a folder for a name on the hub when told to be offline."""
    left_out = () if name.startswith("llmopt") else ("PYTHONPATH", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return {key: value for key, value in os.environ.items() if key not in left_out}


def _row(said: Said, log: dict[str, Any], sampler: _Sampler, streams: int, begun_ns: int) -> Row:
    answered = [request for request in log["requests"] if request["sent_ns"]]
    times = times_sent(log)
    start_ns = min(request["arrived_ns"] for request in answered)
    end_ns = max(request["sent_ns"][-1] for request in answered)
    tokens = sum(len(request["sent_ns"]) for request in answered)
    return Row(
        said=said,
        true=Said(*(percentile(ordered, percent) for ordered in (times.ttft_ms, times.gap_ms) for percent in (50, 99))),
        requests=len(answered),
        held=held(log, streams),
        requests_per_s=len(answered) / (end_ns - start_ns) * 1e9,
        cpu_s_per_1000_tokens=sampler.cpu_s(start_ns, end_ns) / tokens * 1e3,
        start_s=(start_ns - begun_ns) / 1e9,
        peak_rss_mb=sampler.peak_rss_bytes / 1e6,
    )


def _python(peer: str) -> str:
    python = ROOT / f".venv-{peer}" / "bin" / "python"
    if not python.is_file():
        raise RuntimeError(f"`{python}` is missing: `make .venv-{peer}/.ready` installs it")
    return str(python)


def _core_command(url: str, streams: int, requests: int) -> list[str]:
    trial = Trial(url=url, requests=requests, tokens=TOKENS, streams=streams)
    return ["sh", "-c", 'exec "$@" > seen.json', "sh", *trial.command()]


def _read_core(folder: Path) -> Said:
    times = selftest.times_seen(json.loads((folder / "seen.json").read_text())["requests"])
    return Said(*(percentile(ordered, percent) for ordered in (times.ttft_ms, times.gap_ms) for percent in (50, 99)))


def _bench_command(url: str, streams: int, requests: int, *tokenizer: str) -> list[str]:
    options = {"concurrency": streams, "requests": requests, "output-tokens": TOKENS, "endpoint": "chat"}
    options |= {"prompt-tokens": 32, "warmup": 0, "out": "report", "store": "store"}
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "llmopt", "bench", url, *flags, *tokenizer]


def _exact_command(url: str, streams: int, requests: int) -> list[str]:
    """With prompts of an exact length, as the peers make them."""
    return _bench_command(url, streams, requests, "--tokenizer", str(TOKENIZER))


def _read_bench(folder: Path) -> Said:
    (levels,) = json.loads((folder / "report" / "report.json").read_text())["results"].values()
    (summary,) = levels.values()
    found: dict[str, Any] = compact(summary)
    return Said(*(found[name] for name in ("ttft_ms_p50", "ttft_ms_p99", "itl_ms_p50", "itl_ms_p99")))


def _guidellm_command(url: str, streams: int, requests: int) -> list[str]:
    return [
        str(Path(_python("guidellm")).with_name("guidellm")),
        "run",
        *("--backend", f"kind=openai_http,target={url},model=truth"),
        *("--profile", f"kind=concurrent,streams={streams}"),
        *("--constraint", f"kind=max_requests,count={requests}"),
        *("--tokenizer", f"kind=huggingface_auto,model={TOKENIZER}"),
        *("--data", f"kind=synthetic_text,prompt_tokens=32,output_tokens={TOKENS}"),
        *("--output", "kind=json,path=report.json"),
        "--disable-console-interactive",
    ]


def _read_guidellm(folder: Path) -> Said:
    """Its gaps are means of a request each, weighted by tokens: it keeps no others."""
    (benchmark,) = json.loads((folder / "report.json").read_text())["benchmarks"]
    ttft, gap = (
        benchmark["metrics"][name]["successful"]["percentiles"]
        for name in ("time_to_first_token_ms", "inter_token_latency_ms")
    )
    return Said(ttft["p50"], ttft["p99"], gap["p50"], gap["p99"])


def _aiperf_command(url: str, streams: int, requests: int) -> list[str]:
    return [
        str(Path(_python("aiperf")).with_name("aiperf")),
        *("profile", "-m", "truth", "--url", url, "--endpoint-type", "chat", "--streaming"),
        *("--concurrency", str(streams), "--request-count", str(requests)),
        *("--isl", "32", "--osl", str(TOKENS), "--tokenizer", str(TOKENIZER), "--use-server-token-count"),
        *("--ui", "none", "--no-gpu-telemetry", "--no-server-metrics", "--artifact-dir", "report"),
    ]


def _read_aiperf(folder: Path) -> Said:
    """Its gaps are those between chunks; what it calls inter-token latency is the mean of a request."""
    report = json.loads((folder / "report" / "profile_export_aiperf.json").read_text())
    ttft, gap = report["time_to_first_token"], report["inter_chunk_latency"]
    return Said(ttft["p50"], ttft["p99"], gap["p50"], gap["p99"])


CLIENTS = {
    "llmopt client": Client(_core_command, _read_core),
    "llmopt bench": Client(_bench_command, _read_bench),
    "llmopt exact": Client(_exact_command, _read_bench),
    "guidellm": Client(_guidellm_command, _read_guidellm),
    "aiperf": Client(_aiperf_command, _read_aiperf),
}


def table(rows: dict[str, Row]) -> str:
    """One line a client; p50 / p99 of what it says, and how far that is from the truth of its own requests."""
    lines = [
        f"{'':14} {'TTFT p50 / p99 ms':>19} {'error':>17} {'gap p50 / p99 ms':>17} {'error':>17} {'held':>6} "
        f"{'req/s':>6} {'CPU s/1k':>9} {'start s':>8} {'RSS MB':>7}"
    ]
    for name, row in rows.items():
        said, true = row.said, row.true
        lines.append(
            f"{name:14} {said.ttft_p50:10.1f} /{said.ttft_p99:7.1f} {_errors(said.ttft_p50, true.ttft_p50)} /"
            f"{_errors(said.ttft_p99, true.ttft_p99)} {said.gap_p50:8.2f} /{said.gap_p99:7.2f} "
            f"{_errors(said.gap_p50, true.gap_p50)} /{_errors(said.gap_p99, true.gap_p99)} {row.held:6.1%} "
            f"{row.requests_per_s:6.0f} {row.cpu_s_per_1000_tokens:9.4f} {row.start_s:8.2f} {row.peak_rss_mb:7.0f}"
        )
    return "\n".join(lines)


def _errors(said: float, true: float) -> str:
    return f"{said / true - 1:+8.1%}"


def names() -> list[str]:
    """Those to measure: our client, and those that LLMOPT_BENCH_PEERS names, else all."""
    only = os.environ.get("LLMOPT_BENCH_PEERS", ",".join(CLIENTS)).split(",")
    return [name for name in CLIENTS if name in only or name == "llmopt client"]
