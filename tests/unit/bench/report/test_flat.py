"""The flat forms: vLLM's keys, and CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmopt.bench.report import foreign
from llmopt.bench.report.flat import csv_rows, vllm
from llmopt.bench.report.requests import Requests
from llmopt.bench.report.rows import read

#: What `vllm bench serve --save-result` writes without `--save-detailed`, for one percentile.
VLLM_KEYS = {
    "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate",
    "burstiness", "max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens",
    "request_throughput", "request_goodput", "output_throughput", "total_token_throughput", "max_concurrent_requests",
    *(f"{statistic}_{metric}_ms" for statistic in ("mean", "median", "std", "p99")
      for metric in ("ttft", "tpot", "itl", "e2el")),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, make_levels: Callable[..., Any], make_report: Any) -> Any:
    levels, out = make_levels(streams=(1, 4), rounds=2, requests=12), tmp_path_factory.mktemp("report")
    with Requests(out) as requests:
        for level in levels:
            requests.append(level)
    return make_report(levels), read(out)


@pytest.fixture
def measured(saved: tuple[Any, Any]) -> tuple[Any, Any]:
    return deepcopy(saved[0]), saved[1]


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_every_key_of_vllm_is_there(measured: tuple[Any, Any]) -> None:
    found = objects(vllm(*measured))
    assert len(found) == 4
    for flat in found:
        assert flat.keys() >= VLLM_KEYS
        assert not any(isinstance(value, dict | list) for value in flat.values())


def test_one_level_is_plain_json(measured: tuple[Any, Any]) -> None:
    report, rows = measured
    report["results"] = {"candidate": {"c4": report["results"]["candidate"]["c4"]}}
    assert json.loads(vllm(report, rows))["max_concurrency"] == 4


def test_vllm_figures_are_those_of_the_report(measured: tuple[Any, Any]) -> None:
    report, _ = measured
    flat = objects(vllm(*measured))[0]
    summary = report["results"]["candidate"]["c1"]
    assert flat["p99_ttft_ms"] == summary["ttft_ms"]["p99"]
    assert flat["median_e2el_ms"] == summary["e2e_ms"]["p50"]
    assert flat["output_throughput"] == summary["tokens_per_s"]
    assert flat["completed"] + flat["failed"] == flat["num_prompts"] == summary["requests"]
    assert flat["total_output_tokens"] == summary["tokens"]


def test_the_deviation_is_that_of_the_requests(measured: tuple[Any, Any]) -> None:
    _, rows = measured
    values = np.concatenate([r.times_ms()["ttft_ms"] for r in rows if (r.subject, r.level) == ("candidate", "c1")])
    assert objects(vllm(*measured))[0]["std_ttft_ms"] == pytest.approx(values.std())


def test_a_closed_loop_has_as_many_at_once_as_streams(measured: tuple[Any, Any]) -> None:
    found = {flat["label"]: flat["max_concurrent_requests"] for flat in objects(vllm(*measured))}
    assert found == {"candidate-c1": 1, "candidate-c4": 4, "baseline-c1": 1, "baseline-c4": 4}


def test_a_rate_is_a_number_and_no_rate_is_inf(measured: tuple[Any, Any]) -> None:
    report, rows = measured
    summary = report["results"]["candidate"]["c1"]
    report["results"] = {"candidate": {"c1": summary, "r2.5": summary}}
    asked = [(flat["request_rate"], flat["max_concurrency"]) for flat in objects(vllm(report, rows))]
    assert asked == [("inf", 1), (2.5, None)]


def test_what_reads_vllm_reads_this(measured: tuple[Any, Any], tmp_path: Path) -> None:
    report, _ = measured
    (tmp_path / "vllm.json").write_text(vllm(*measured))
    found = foreign.read([tmp_path / "vllm.json"])
    assert (found.tool, sorted(found.levels)) == ("vllm", ["c1", "c4"])
    of: Any = found.levels["c4"]
    ours = [report["results"][subject]["c4"]["ttft_ms"]["p99"] for subject in ("candidate", "baseline")]
    assert min(ours) <= of["ttft_ms"]["p99"] <= max(ours)  # it has no word for a subject: they are rounds to it


def test_csv_has_a_row_for_each_round_and_one_for_all(measured: tuple[Any, Any]) -> None:
    report, _ = measured
    rows = list(csv.DictReader(csv_rows(report).splitlines()))
    assert [row["round"] for row in rows] == ["all", "0", "1"] * 4
    assert None not in rows[0]
    assert float(rows[0]["ttft_ms_p99"]) == report["results"]["candidate"]["c1"]["ttft_ms"]["p99"]
    assert float(rows[1]["ttft_ms_p99"]) == report["results"]["candidate"]["c1"]["rounds"][0]["ttft_ms_p99"]
