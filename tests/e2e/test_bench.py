"""`llmopt bench` as a process of its own: signals, and the engines of the demo."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

Stage = Callable[[str], dict[str, Any]]
SMALL = ("--output-tokens", 8, "--warmup", 0)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The truth server: a first token after 20 ms, then one every 2 ms."""
    command = [sys.executable, "-m", "llmopt.bench.truth", "--ttft-ms", "20", "--gap-ms", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield next(word for word in process.stdout.readline().split() if word.startswith("http://"))
        finally:
            process.kill()


def start_and_signal(llmopt: Any, number: signal.Signals, *arguments: object) -> tuple[int, str, str]:
    """What became of a bench that got a signal in its second level."""
    process = llmopt.start("bench", *arguments, *SMALL, "--concurrency", "2,3", "--duration", 1.5)
    heard = []
    for line in process.stderr:
        heard.append(line)
        if line.startswith("candidate c2:"):
            time.sleep(0.5)
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=60)
    return process.returncode, out, "".join(heard) + err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_bench_keeps_every_request_that_ended(
    llmopt: Any, server: str, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    code, said, err = start_and_signal(llmopt, number, server, "--out", out)
    assert code == 130, err
    assert said == ""
    assert "Traceback" not in err
    assert f"the unfinished report is in `{out}`" in err
    report = json.loads((out / "report.json").read_text())
    assert (report["valid"], report["invalid_because"]) == (False, "interrupted")
    rows = pq.read_table(out / "requests.parquet").to_pylist()
    for level in ("c2", "c3"):
        ended = [row for row in rows if row["level"] == level and row["error"] is None]
        assert len(ended) >= 10
        assert all(len(row["chunks_us"]) == 8 for row in ended)
    assert {row["error"] for row in rows} <= {None, "interrupted"}
    assert "interrupted" in (out / "summary.md").read_text()
    assert llmopt("store", "ls", "--json").json["artifacts"] == []


def test_a_bench_that_is_killed_leaves_its_finished_levels_readable(llmopt: Any, server: str, tmp_path: Path) -> None:
    code, _, err = start_and_signal(llmopt, signal.SIGKILL, server, "--out", tmp_path / "out")
    assert code == -signal.SIGKILL, err
    (part,) = (llmopt.store / "tmp").rglob("*.parquet")
    assert set(pq.read_table(part).column("level").to_pylist()) == {"c2"}
    assert llmopt("store", "verify").code == 0
    assert llmopt("bench", server, *SMALL, "--concurrency", 1, "--requests", 2, "--out", tmp_path / "out").code == 0


def test_an_engine_is_measured_with_its_server_and_without(shared: Any, stage: Stage, tmp_path: Path) -> None:
    engine = stage("compile")["artifact"]
    small = (*SMALL, "--concurrency", 2, "--requests", 4, "--prompt-tokens", 16, "--json")
    stamps = []
    for more in ((), ("--in-process",)):
        ran = shared("bench", engine, *small, *more)
        report = json.loads((Path(ran.json["path"]) / "report.json").read_text())
        assert report["results"]["candidate"]["c2"]["errors"] == {}
        assert report["results"]["candidate"]["c2"]["tokens"] == 32
        assert [step["kind"] for step in report["subjects"]["candidate"]["lineage"]] == [
            "engine", "quantized-model", "model"
        ]  # fmt: skip
        stamps.append(report["results"]["candidate"]["c2"]["stamps"])
    assert stamps == ["kernel", "engine"]


def test_an_engine_is_gated_against_the_one_it_was_made_from(shared: Any, stage: Stage) -> None:
    engines = (stage("compile")["artifact"], "--against", stage("compile-base")["artifact"])
    more = ("--gate", "--rounds", 1, "--max-rounds", 1, "--concurrency", 1, "--requests", 2, "--prompt-tokens", 16)
    ran = shared("bench", *engines, *SMALL, *more)
    assert ran.code == 7, ran.err
    assert "1 round cannot tell: 6 are the least and 12 advised" in ran.out


def test_the_pipeline_s_thresholds_are_its_exit_code(shared: Any, pipeline: Path, chain: Any) -> None:
    ran = shared("run", pipeline, "--set", 'bench.slo=["ttft_ms_p50<=0.001"]')
    assert ran.code == 5, ran.err
