"""The samples were written by the tools against a server with TTFT 60 ms, gap 5 ms and 8 tokens, and trimmed; those of
vLLM and genai-perf, which are too large to install, follow their source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmopt.bench.gate.names import TIMES
from llmopt.bench.gate.stored import against_report, figure
from llmopt.bench.report import foreign
from llmopt.bench.report.foreign import Imported
from llmopt.errors import LlmoptError, MeasurementInvalidError

SAMPLES = Path(__file__).parent / "samples"
FILES = {
    "guidellm 0.3": SAMPLES / "guidellm-0.3" / "benchmarks.json",
    "guidellm 0.5": SAMPLES / "guidellm-0.5" / "benchmarks.json",
    "guidellm 0.8": SAMPLES / "guidellm-0.8" / "benchmarks.json",
    "aiperf 0.13": SAMPLES / "aiperf-0.13" / "profile_export_aiperf.json",
    "genai-perf": SAMPLES / "genai-perf" / "profile_export_genai_perf.json",
    "vllm": SAMPLES / "vllm" / "detailed.json",
}
each = pytest.mark.parametrize("name", FILES)


def read(name: str) -> Imported:
    return foreign.read([FILES[name]])


def only(imported: Imported) -> dict[str, Any]:
    return next(iter(imported.levels.values()))


@each
def test_figures_are_in_our_units_and_close_to_what_the_server_did(name: str) -> None:
    """Close: the clients were late when the machine was busy; a wrong unit is wrong by a thousand."""
    summary = only(read(name))
    assert 60 <= summary["ttft_ms"]["p50"] <= 300
    assert 2.5 <= summary["tpot_ms"]["p50"] <= 10
    assert 90 <= summary["e2e_ms"]["p50"] <= 400
    assert summary["ttft_ms"]["p50"] <= summary["ttft_ms"]["p99"]
    assert summary["tokens_per_s"] == pytest.approx(8 * summary["requests_per_s"], rel=0.01)


@each
def test_every_figure_says_what_it_counts(name: str) -> None:
    imported = read(name)
    for summary in imported.levels.values():
        assert {key for key in summary if key in TIMES} <= set(imported.conventions)


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(("guidellm", "genai"))])
def test_a_mean_of_each_request_is_never_taken_for_the_gaps(name: str) -> None:
    summary = only(read(name))
    assert "itl_ms" not in summary
    assert "itl_request_mean_ms" in summary


def test_gaps_that_were_kept_are_gaps() -> None:
    assert only(read("aiperf 0.13"))["itl_ms"]["count"] == 10 * 7
    assert only(read("vllm"))["itl_ms"]["count"] == 9 * 7


def test_the_rates_of_guidellm_are_requests_over_time() -> None:
    data = json.loads(FILES["guidellm 0.8"].read_text())
    for benchmark, summary in zip(data["benchmarks"], read("guidellm 0.8").levels.values(), strict=True):
        assert summary["requests_per_s"] == pytest.approx(10 / benchmark["duration"], rel=1e-3)


def test_levels_are_named_as_ours() -> None:
    assert list(read("guidellm 0.8").levels) == ["c2", "c4"]
    assert [list(read(name).levels) for name in ("guidellm 0.3", "aiperf 0.13", "genai-perf", "vllm")] == [
        ["c2"],
        ["c4"],
        ["c2"],
        ["c2"],
    ]


@pytest.mark.parametrize(
    ("load", "label"),
    [
        ({"request_rate": 2.5, "max_concurrency": 8}, "r2.5"),
        ({"request_rate": "inf", "max_concurrency": 8}, "c8"),
        ({"request_rate": "inf", "max_concurrency": None}, "throughput"),
    ],
)
def test_a_rate_counts_before_the_streams(load: dict[str, Any], label: str, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_text(json.dumps(json.loads(FILES["vllm"].read_text()) | load))
    assert list(foreign.read([file]).levels) == [label]


@each
def test_the_model_is_known(name: str) -> None:
    assert read(name).model == "truth"


@pytest.mark.parametrize("name", [name for name in FILES if name != "genai-perf"])
def test_requests_are_rows_of_ours(name: str) -> None:
    rows = [row for row in read(name).requests if "error" not in row]
    assert len(rows) >= 9
    for row in rows:
        sent, first, end = row["sent_us"], row["first_us"], row["end_us"]
        assert isinstance(first, int)
        assert isinstance(end, int)
        assert 60_000 <= first <= end
        assert sent is None or (isinstance(sent, int) and sent >= 0)
        assert row["completion_tokens"] == 8


def test_the_first_request_is_sent_at_0() -> None:
    for name in ("guidellm 0.3", "guidellm 0.8", "aiperf 0.13"):
        assert min(row["sent_us"] for row in read(name).requests if isinstance(row["sent_us"], int)) == 0


def test_stamps_add_up_to_the_figures() -> None:
    for row in read("aiperf 0.13").requests:
        chunks = row["chunks_us"]
        assert isinstance(chunks, list)
        assert len(chunks) == 8
        assert chunks[0] == row["first_us"]
        assert chunks == sorted(chunks)  # type: ignore[type-var]


def test_a_failed_request_is_counted_and_too_many_make_the_run_invalid() -> None:
    imported = read("vllm")
    assert only(imported)["errors"] == {"error": 1}
    (row,) = [row for row in imported.requests if "error" in row]
    assert row["detail"] == "aiohttp.client_exceptions.ServerDisconnectedError: Server disconnected"
    assert imported.invalid_because == "10.0% of the requests at c2 failed"
    with pytest.raises(MeasurementInvalidError):
        against_report(read("genai-perf").report(), imported.report())


def test_an_import_can_be_gated_against_itself() -> None:
    for name in ("guidellm 0.8", "aiperf 0.13"):
        report = read(name).report()
        assert against_report(report, report, metrics=["ttft_ms_p50"]).verdict == "pass"


def test_several_runs_at_one_level_are_its_rounds() -> None:
    imported = foreign.read([FILES["aiperf 0.13"]] * 3)
    summary = only(imported)
    assert [round_["ttft_ms_p50"] for round_ in summary["rounds"]] == [summary["ttft_ms"]["p50"]] * 3
    assert {row["round"] for row in imported.requests} == {0, 1, 2}
    assert against_report(imported.report(), imported.report()).verdict == "pass"
    assert any("median of 3 runs" in note for note in imported.notes)


def test_appended_results_are_rounds(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    line = json.dumps(json.loads(FILES["vllm"].read_text()))
    file.write_text(f"{line}\n{line}\n")
    assert len(only(foreign.read([file]))["rounds"]) == 2


def test_a_folder_is_searched_for_the_result() -> None:
    assert foreign.read([SAMPLES / "aiperf-0.13"]).levels == read("aiperf 0.13").levels


@each
def test_an_import_is_plain_json(name: str) -> None:
    imported = read(name)
    report = imported.report()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert figure(report["results"]["candidate"][next(iter(imported.levels))], "ttft_ms_p50") is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "no JSON object"),
        ("{}", "cannot|not a result"),
        ('{"schema": "other", "rows": []}', "`schema`, `rows`"),
        ('{"benchmarks": [{"metrics": {}}]}', "another layout"),
        ('{"benchmarks": []}', "no run"),
        ('{"completed": 1, "request_throughput": 2}', "another layout.*duration"),
        ('{"request_latency": {"unit": "fortnights", "avg": 1}}', "another layout.*fortnights"),
    ],
)
def test_what_is_not_understood_is_an_error_that_says_so(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_text(text)
    with pytest.raises(LlmoptError, match=message) as raised:
        foreign.read([file])
    assert raised.value.hint


@pytest.mark.parametrize("name", [".", "nothing.json"])
def test_a_path_without_a_result_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(LlmoptError, match=str(tmp_path)):
        foreign.read([tmp_path / name])


def test_results_of_two_tools_are_not_mixed() -> None:
    with pytest.raises(LlmoptError, match="aiperf, vllm"):
        foreign.read([FILES["aiperf 0.13"], FILES["vllm"]])
