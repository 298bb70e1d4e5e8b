"""Results of other load testers as reports of ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmopt.artifacts.outcome import Outcome
from llmopt.bench import check_import, import_results, resolve
from llmopt.errors import LlmoptError, MeasurementInvalidError

VLLM = Path(__file__).parent / "report" / "samples" / "vllm" / "detailed.json"
Result = Callable[..., Path]


@pytest.fixture
def result(tmp_path: Path) -> Result:
    """result(name) -> a result of `vllm bench serve` in which nothing failed."""

    def make(name: str, ttft_s: float = 0.06) -> Path:
        values = json.loads(VLLM.read_text())
        count = len(values["ttfts"])
        good = {"failed": 0, "completed": count, "errors": [""] * count, "ttfts": [ttft_s] * count}
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(values | good | {"median_ttft_ms": ttft_s * 1e3}))
        return file

    return make


def made(files: list[Path], out: Path, baseline: Path | None = None, **options: Any) -> Outcome:
    return import_results(files, resolve(options), out, baseline=baseline)


def report_in(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def test_a_run_in_which_requests_failed_is_not_valid_and_has_its_report(tmp_path: Path) -> None:
    with pytest.raises(MeasurementInvalidError, match="failed"):
        made([VLLM], tmp_path, slo=["ttft_ms_p50<=1"])
    report = report_in(tmp_path)
    assert (report["valid"], report["gate"]) == (False, None)
    assert "not valid" in (tmp_path / "summary.md").read_text()


def test_what_is_no_result_is_found_before(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(LlmoptError):
        check_import([tmp_path / "x.json"], resolve({}), None)


def test_a_gate_needs_a_baseline() -> None:
    with pytest.raises(LlmoptError, match="nothing to compare with"):
        check_import([VLLM], resolve({"gate": True}), None)


def test_several_files_are_rounds_and_their_requests_are_kept(tmp_path: Path, result: Result) -> None:
    import pyarrow.parquet as pq

    made([result(str(n)) for n in range(3)], tmp_path / "out", slo=["ttft_ms_p50<=100"])
    report = report_in(tmp_path / "out")
    assert len(report["results"]["candidate"]["c2"]["rounds"]) == 3
    assert report["results"]["candidate"]["c2"]["requests"] == 30
    assert report["gate"]["verdict"] == "pass"
    assert set(pq.read_table(tmp_path / "out" / "requests.parquet").column("round").to_pylist()) == {0, 1, 2}


def test_it_is_gated_against_a_stored_report(tmp_path: Path, result: Result) -> None:
    made([result(f"base{n}", 0.06 + 1e-4 * n) for n in range(6)], tmp_path / "base")
    slower = [result(f"new{n}", 0.12 + 1e-4 * n) for n in range(6)]
    options = {"gate": True, "gate_metrics": ["ttft_ms_p50"]}
    outcome = made(slower, tmp_path / "new", tmp_path / "base", **options)
    assert outcome.metrics["gate"]["verdict"] == "fail"  # type: ignore[index,call-overload]
    assert "margins are widened by" in str(outcome.events)
