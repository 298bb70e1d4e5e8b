"""Every kind of load from settings to report: rates, traces, conversations, sweeps, windows, gates."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llmopt.artifacts.outcome import Outcome, silent
from llmopt.bench import Subject, measure, resolve
from llmopt.bench import sweep as searching
from llmopt.errors import LlmoptError, MeasurementInvalidError, SettingsError

QUICK = {"requests": 4, "output_tokens": 4, "prompt_tokens": 16, "warmup": 0}


def bench(
    candidate: str, out: Path, *, against: str | None = None, report: Path | None = None, **options: Any
) -> Outcome:
    subjects = {"candidate": Subject(name="candidate", url=candidate)}
    if against is not None:
        subjects["baseline"] = Subject(name="baseline", url=against)
    settings = {name: value for name, value in {**QUICK, **options}.items() if value is not None}
    return measure(subjects, resolve(settings), out, silent, baseline=report)


def report_in(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def requests_in(out: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    found: list[dict[str, Any]] = pq.read_table(out / "requests.parquet").to_pylist()
    return found


def came_s(log: Sequence[dict[str, Any]]) -> list[float]:
    """When each request reached the server, after the first."""
    return [(entry["received_ns"] - log[0]["received_ns"]) / 1e9 for entry in log]


def trace(folder: Path, times_ms: Sequence[int]) -> str:
    rows = [{"timestamp": at, "input_length": 20, "output_length": 3, "hash_ids": [i]} for i, at in enumerate(times_ms)]
    file = folder / "trace.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_a_rate_sends_on_time_however_slow_the_server(truth: Any, tmp_path: Path) -> None:
    seen = len(truth.log())
    bench(truth.url("ttft=300"), tmp_path, rate=50, arrivals="constant", requests=6)
    arrived = came_s(truth.log()[seen:])
    assert all(at >= 0.02 * n - 0.015 for n, at in enumerate(arrived))
    assert arrived[-1] < 0.3  # before the first answer
    at_rate = report_in(tmp_path)["results"]["candidate"]["r50"]
    assert at_rate["ttft_scheduled_ms"]["min"] >= 300
    assert {row["level"] for row in requests_in(tmp_path)} == {"r50"}


def test_a_limit_in_flight_makes_requests_late_which_is_told(truth: Any, tmp_path: Path) -> None:
    outcome = bench(truth.url("ttft=30"), tmp_path, rate=100, in_flight=1, arrivals="constant", requests=20)
    at_rate = report_in(tmp_path)["results"]["candidate"]["r100"]
    assert at_rate["ttft_scheduled_ms"]["max"] > 300 > at_rate["ttft_ms"]["p50"]
    assert "for want of a place among 1 in flight" in str(outcome.events)


def test_thresholds_of_an_open_loop_count_from_when_requests_were_due(truth: Any, tmp_path: Path) -> None:
    """A server that answers one at a time looks quick to whoever counts from the sending."""
    slos = ["ttft_ms_p90<=200", "ttft_ms<=200"]
    bench(truth.url("ttft=30"), tmp_path, rate=100, in_flight=1, arrivals="constant", requests=20, slo=slos)
    report = report_in(tmp_path)
    assert report["results"]["candidate"]["r100"]["ttft_ms"]["p90"] < 200
    assert report["gate"]["verdict"] == "fail"
    assert [each["figure"] for each in report["gate"]["slo"]] == ["ttft_scheduled_ms_p90", "goodput_share"]
    assert not any(each["met"] for each in report["gate"]["slo"])
    assert "since requests were due" in (tmp_path / "report.md").read_text()


def test_a_comparison_at_a_rate_counts_from_when_requests_were_due(truth: Any, tmp_path: Path) -> None:
    subjects = {side: Subject(name=side, url=truth.url("ttft=5")) for side in ("candidate", "baseline")}
    settings = {"rate": 100, "arrivals": "constant", "requests": 4, "output_tokens": 3, "warmup": 0, "rounds": 6}
    measure(subjects, resolve(settings), tmp_path, silent)
    compared = [each["metric"] for each in report_in(tmp_path)["gate"]["comparisons"]]
    assert compared == ["ttft_scheduled_ms_p50", "tpot_ms_p50", "e2e_scheduled_ms_p50", "tokens_per_s"]


def test_a_trace_is_replayed_at_its_times(truth: Any, tmp_path: Path) -> None:
    seen = len(truth.log())
    bench(truth.url(), tmp_path, workload=trace(tmp_path, [0, 100, 300]), requests=None, prompt_tokens=None,
          output_tokens=None, speed=2.0)  # fmt: skip
    first, second, third = came_s(truth.log()[seen:])
    assert first == 0
    assert second >= 0.035
    assert third >= 0.135
    assert [row["wanted_tokens"] for row in requests_in(tmp_path)] == [3, 3, 3]
    assert list(report_in(tmp_path)["results"]["candidate"]) == ["trace"]


@pytest.mark.parametrize("press", [{}, {"rate": [20.0, 40.0]}, {"concurrency": [1, 2]}])
def test_a_trace_begins_anew_with_every_level_and_round(truth: Any, tmp_path: Path, press: dict[str, Any]) -> None:
    own = {"prompt_tokens": None, "output_tokens": None, "requests": None, "warmup": 1, "rounds": 2}
    bench(truth.url(), tmp_path, workload=trace(tmp_path, [0, 10]), **own, **press)
    rows = requests_in(tmp_path)
    loads = {(row["level"], row["round"]) for row in rows}
    assert len(loads) == 2 * max(1, *map(len, [*press.values(), []]))
    assert all({row["prompt"] for row in rows if (row["level"], row["round"]) == load} == {0, 1} for load in loads)


def test_a_conversation_goes_on_from_the_real_answer(truth: Any, tmp_path: Path) -> None:
    seen = len(truth.log())
    bench(truth.url("tokens=2"), tmp_path, endpoint="chat", turns=2, concurrency=1, requests=1)
    first, second = (entry["request"]["messages"] for entry in truth.log()[seen:])
    assert second[: len(first)] == first
    assert [message["role"] for message in second[len(first) :]] == ["assistant", "user"]
    assert second[len(first)]["content"] == "alpha beta"
    assert [(row["prompt"], row["turn"]) for row in requests_in(tmp_path)] == [(0, 0), (0, 1)]


def test_several_servers_take_turns(truth: Any, tmp_path: Path) -> None:
    urls = f"{truth.url('ttft=1')},{truth.url('ttft=2')}"
    bench(urls, tmp_path, concurrency=1, requests=6)
    assert sorted(row["target"] for row in requests_in(tmp_path)) == [0, 0, 0, 1, 1, 1]
    assert report_in(tmp_path)["subjects"]["candidate"]["url"] == urls


def test_what_is_outside_the_window_counts_in_no_figure(truth: Any, tmp_path: Path) -> None:
    options = {"rate": 50, "arrivals": "constant", "requests": 20, "warmup_s": 0.1, "cooldown_s": 0.1}
    bench(truth.url("ttft=2"), tmp_path, **options)
    found = report_in(tmp_path)["results"]["candidate"]["r50"]
    assert found["requests"] == len(requests_in(tmp_path)) == 20
    assert 5 <= found["ttft_ms"]["count"] <= 12


@pytest.fixture
def short_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = searching.Limits(most=4, measurements=4)
    monkeypatch.setattr(searching, "sweep", partial(searching.sweep, limits=limits))


@pytest.mark.usefixtures("short_sweep")
def test_a_sweep_is_judged_at_the_load_that_it_finds_best(truth: Any, tmp_path: Path) -> None:
    bench(truth.url("ttft=10"), tmp_path, sweep="concurrency", slo=["ttft_ms_p50<=500"])
    report = report_in(tmp_path)
    assert (report["sweep"]["best"], report["gate"]["verdict"]) == (4, "pass")
    assert [each["level"] for each in report["gate"]["slo"]] == ["c4"]


@pytest.mark.usefixtures("short_sweep")
def test_a_sweep_in_which_nothing_meets_the_thresholds_fails_and_says_so(truth: Any, tmp_path: Path) -> None:
    outcome = bench(truth.url("ttft=10"), tmp_path, sweep="concurrency", slo=["ttft_ms_p50<=1"])
    report = report_in(tmp_path)
    assert (report["sweep"]["best"], report["gate"]["verdict"]) == (None, "fail")
    assert [(each["level"], each["met"]) for each in report["gate"]["slo"]] == [("c1", False)]
    assert outcome.metrics["gate"]["verdict"] == "fail"  # type: ignore[index,call-overload]
    assert 'failures="1"' in (tmp_path / "junit.xml").read_text()
    assert "no load of the sweep meets the objectives" in (tmp_path / "summary.md").read_text()


@pytest.mark.usefixtures("short_sweep")
def test_a_sweep_keeps_all_its_streams_busy_and_its_loads_in_order(truth: Any, tmp_path: Path) -> None:
    bench(truth.url("ttft=5"), tmp_path, sweep="concurrency", requests=2)
    found = report_in(tmp_path)["results"]["candidate"]
    assert list(found) == sorted(found, key=lambda label: int(label[1:]))
    assert found["c4"]["requests"] >= 16


ONE = {"concurrency": 1, "requests": 2, "gate": True, "gate_metrics": ["ttft_ms_p50"]}


def test_a_gate_fails_what_is_slower(truth: Any, tmp_path: Path) -> None:
    slow, quick = truth.url("ttft=40"), truth.url("ttft=4")
    outcome = bench(slow, tmp_path, against=quick, rounds=6, max_rounds=6, **ONE)
    gate = report_in(tmp_path)["gate"]
    assert gate["verdict"] == "fail" == outcome.metrics["gate"]["verdict"]  # type: ignore[index,call-overload]
    (comparison,) = gate["comparisons"]
    assert comparison["low"] > 1.05
    assert "<failure" in (tmp_path / "junit.xml").read_text()
    assert "❌" in (tmp_path / "summary.md").read_text()


def test_a_gate_passes_what_is_within_the_margin(truth: Any, tmp_path: Path) -> None:
    same = truth.url("ttft=30")
    bench(same, tmp_path, against=same, rounds=6, max_rounds=6, margin="90%", **ONE)
    assert report_in(tmp_path)["gate"]["verdict"] == "pass"
    assert 'failures="0"' in (tmp_path / "junit.xml").read_text()


def test_a_gate_that_cannot_tell_takes_more_rounds(truth: Any, tmp_path: Path) -> None:
    same = truth.url("ttft=1")
    bench(same, tmp_path, against=same, rounds=1, max_rounds=4, **ONE)
    report = report_in(tmp_path)
    assert report["gate"]["verdict"] == "inconclusive"
    assert report["gate"]["looks"] == [1, 2, 4]
    assert [each["round"] for each in report["results"]["candidate"]["c1"]["rounds"]] == [0, 1, 2, 3]
    assert "4 rounds cannot tell" in report["gate"]["comparisons"][0]["reason"]


def test_a_stored_baseline_is_judged_with_a_wider_margin_and_it_is_said(truth: Any, tmp_path: Path) -> None:
    own = {"concurrency": 1, "requests": 4, "rounds": 6}
    bench(truth.url("ttft=4"), tmp_path / "base", **own)
    options = {**own, "max_rounds": 6, "gate": True, "gate_metrics": ["ttft_ms_p50"]}
    outcome = bench(truth.url("ttft=80"), tmp_path / "new", report=tmp_path / "base", **options)
    gate = report_in(tmp_path / "new")["gate"]
    assert gate["verdict"] == "fail"
    assert gate["comparisons"][0]["margin"] > gate["margin"]
    assert gate["baseline"].startswith("sha256:")
    said = "margins are widened by"
    assert said in str(outcome.events)
    assert all(said in (tmp_path / "new" / name).read_text() for name in ("summary.md", "report.md", "report.html"))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"valid": False}, "cannot be used"),
        ({"schema": "llmopt.report/1"}, "has the schema"),
        ({"results": {}}, "measured at no level"),
    ],
)
def test_a_baseline_that_cannot_be_one_is_found_before_the_load(
    truth: Any, tmp_path: Path, change: dict[str, Any], error: str
) -> None:
    bench(truth.url(), tmp_path / "base", concurrency=1)
    (tmp_path / "base" / "report.json").write_text(json.dumps(report_in(tmp_path / "base") | change))
    seen = len(truth.log())
    with pytest.raises(LlmoptError, match=error):
        bench(truth.url(), tmp_path / "new", report=tmp_path / "base", concurrency=1)
    assert len(truth.log()) == seen


def test_a_gate_needs_something_to_compare_with(truth: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nothing to compare with"):
        bench(truth.url(), tmp_path, concurrency=1, gate=True)


def test_rows_of_a_file_that_come_again_are_told(truth: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "one", "output_tokens": 2}\n{"prompt": "two", "output_tokens": 2}\n')
    own = {"workload": str(file), "prompt_tokens": None, "output_tokens": None, "concurrency": 1}
    outcome = bench(truth.url(), tmp_path / "out", **own)
    assert "prompts came again after 2 requests" in str(outcome.events)


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        ("status=429", "http_429"), ("status=401", "http_401"), ("cut=2", "cut"), ("bad=json", "malformed"),
        ("bad=utf8", "malformed"), ("bad=chunk", "malformed"), ("bad=error", "server_error"), ("hang=2", "timeout"),
        ("tokens=100000,gap=10", "timeout"), ("html", "malformed"), ("garbage", "malformed"),
    ],
)  # fmt: skip
def test_a_bad_answer_has_its_class_and_takes_no_good_one_with_it(
    truth: Any, tmp_path: Path, behaviour: str, kind: str
) -> None:
    both = f"{truth.url()},{truth.url(behaviour)}"
    with pytest.raises(MeasurementInvalidError, match=f"2 of 4 requests .* `{kind}`"):
        bench(both, tmp_path, concurrency=1, timeout_s=0.3)
    report = report_in(tmp_path)
    assert report["results"]["candidate"]["c1"]["errors"] == {kind: 2}
    rows = requests_in(tmp_path)
    assert [len(row["chunks_us"]) for row in rows if row["target"] == 0] == [4, 4]
    assert [row["error"] for row in rows] == [None, kind, None, kind]


def test_429_tells_how_long_to_wait(truth: Any, tmp_path: Path) -> None:
    with pytest.raises(MeasurementInvalidError, match=r"Retry-After: 7") as caught:
        bench(truth.url("status=429,retry_after=7"), tmp_path, concurrency=1)
    assert "limits requests" in (caught.value.hint or "")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with `openssl`")
def test_a_certificate_that_nobody_trusts_is_told_before_the_load(tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    subprocess.run([*command.split(), "-keyout", both, "-out", both], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(both)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            raw, _ = listener.accept()
            with contextlib.suppress(OSError), context.wrap_socket(raw, server_side=True):
                pass

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(LlmoptError, match=r"no TLS connection to .*CERTIFICATE_VERIFY_FAILED") as caught:
            bench(f"https://localhost:{listener.getsockname()[1]}", tmp_path / "out", concurrency=1)
        thread.join()
    assert "`SSL_CERT_FILE`" in (caught.value.hint or "")


def test_plain_http_behind_https_is_told_before_the_load(
    truth: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmopt.bench.preflight._PROBE_TIMEOUT_S", 0.3)
    with pytest.raises(LlmoptError) as caught:
        bench(truth.root.replace("http:", "https:"), tmp_path, concurrency=1)
    assert "`http://`" in (caught.value.hint or "")


def test_what_cannot_go_together_is_found_before_the_load(truth: Any, tmp_path: Path) -> None:
    seen, url = len(truth.log()), truth.url()
    wrong: list[dict[str, Any]] = [
        {"sweep": "rate", "against": url}, {"in_process": True, "concurrency": 1},
        {"headers": ["X-A: 1", "x-a: 2"], "concurrency": 1}, {"sweep": "rate", "rate": 3},
        {"sweep": "rate", "rounds": 2},
    ]  # fmt: skip
    for options in wrong:
        with pytest.raises(SettingsError):
            bench(url, tmp_path, **options)
    assert len(truth.log()) == seen


def test_a_window_without_a_request_is_an_invalid_measurement(truth: Any, tmp_path: Path) -> None:
    with pytest.raises(
        MeasurementInvalidError, match=r"no request of .* was sent between the warm-up and the cool-down"
    ):
        bench(truth.url(), tmp_path, rate=100, requests=10, warmup_s=5)
    with pytest.raises(SettingsError, match="leave nothing of a load of 1 s"):
        bench(truth.url(), tmp_path, rate=100, duration_s=1, warmup_s=0.5, cooldown_s=0.5)


def test_the_gate_s_figures_may_be_written_either_way() -> None:
    settings = resolve({"gate_metrics": ["ttft_p50_ms", " tokens_per_s"]})
    assert settings.gate_metrics == ("ttft_ms_p50", "tokens_per_s")
