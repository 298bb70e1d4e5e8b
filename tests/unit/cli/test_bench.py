"""`llmopt bench` as CI uses it: exit codes, files, annotations, one JSON object; and what goes with it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"
SAMPLES = BENCH / "report" / "samples"
SMALL = ("--output-tokens", 4, "--prompt-tokens", 16, "--warmup", 0)
QUICK = (*SMALL, "--concurrency", 1, "--requests", 2)
SECRET = "sk-e2e-very-secret"

Llmopt = Callable[..., Any]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The root of the odd server of the bench's tests; a behaviour is put behind it."""
    program = [sys.executable, str(BENCH / "odd_server.py")]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process.stdout.readline().split()[1]
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def outside_of_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "LLMOPT_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def report_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def gate(server: str, ttft: int, against: int, *more: object) -> tuple[object, ...]:
    urls = (f"{server}/ttft={ttft}", "--against", f"{server}/ttft={against}")
    return ("bench", *urls, *QUICK, "--gate", "--gate-metrics", "ttft_ms_p50", *more)


@pytest.mark.parametrize(
    ("ttft", "against", "more", "code", "verdict"),
    [
        (4, 40, ("--rounds", 6, "--max-rounds", 6), 0, "passed"),
        (40, 4, ("--rounds", 6, "--max-rounds", 6), 5, "failed"),
        (4, 4, ("--rounds", 1, "--max-rounds", 1), 7, "inconclusive"),
    ],
)
def test_the_exit_code_is_the_verdict(
    llmopt: Llmopt, server: str, ttft: int, against: int, more: tuple[object, ...], code: int, verdict: str
) -> None:
    ran = llmopt(*gate(server, ttft, against, *more))
    assert ran.code == code, ran.err
    assert f"verdict   {verdict}: " in ran.out


def test_a_broken_threshold_exits_with_5_and_the_report_is_stored(llmopt: Llmopt, server: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = llmopt("bench", f"{server}/ttft=5", *QUICK, "--slo", "ttft_p50_ms<=1", "--out", out, "--name", "it")
    assert ran.code == 5
    assert "ttft_ms_p50<=1 is broken by `candidate` at c1" in ran.out
    assert report_in(out)["gate"]["verdict"] == "fail"
    assert [found["names"] for found in llmopt("store", "ls", "--json").json["artifacts"]] == [["it"]]


def test_a_limit_on_each_request_is_named_where_goodput_is_broken(llmopt: Llmopt, server: str) -> None:
    ran = llmopt("bench", f"{server}/ttft=5", *QUICK, "--slo", "ttft<=1")
    assert ran.code == 5
    assert "goodput_share>=0.99 of requests with ttft_ms<=1 is broken by `candidate` at c1: it was 0.0 %" in ran.out


def test_an_invalid_measurement_exits_with_6_and_keeps_its_report(llmopt: Llmopt, server: str, tmp_path: Path) -> None:
    ran = llmopt("bench", f"{server}/status=500", *QUICK, "--out", tmp_path / "out", "--junit", tmp_path / "j.xml")
    assert ran.code == 6
    assert ran.error.startswith("error: 2 of 2 requests of `candidate` at concurrency 1 failed: 2 `http_5xx`")
    assert report_in(tmp_path / "out")["valid"] is False
    assert 'type="invalid"' in (tmp_path / "j.xml").read_text()
    assert llmopt("store", "ls", "--json").json["artifacts"] == []


def test_json_is_one_object_with_the_verdict(llmopt: Llmopt, server: str) -> None:
    ran = llmopt("bench", f"{server}/plain", *QUICK, "--slo", "errors<=0", "--json")
    assert ran.code == 0
    assert ran.json["metrics"]["gate"]["verdict"] == "pass"
    assert ran.json["metrics"]["candidate"]["c1"]["requests"] == 2


def test_the_key_and_the_headers_are_nowhere(
    llmopt: Llmopt, server: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMOPT_API_KEY", SECRET)
    monkeypatch.setenv("TENANT", SECRET + "-tenant")
    own = ("--header", "X-Tenant: $TENANT", "--out")
    good = llmopt("bench", f"{server}/plain", *QUICK, *own, tmp_path / "good")
    bad = llmopt("bench", f"{server}/status=500", *QUICK, *own, tmp_path / "bad")  # it repeats the key in its errors
    assert (good.code, bad.code) == (0, 6)
    assert "key ***" in bad.error
    assert report_in(tmp_path / "good")["settings"]["headers"] == ["X-Tenant: $TENANT"]
    files = [file for folder in (store, tmp_path) for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 20
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []
    assert SECRET not in good.out + good.err + bad.out + bad.err


def test_a_key_that_is_refused_under_load_says_where_to_put_it(llmopt: Llmopt, server: str) -> None:
    ran = llmopt("bench", f"{server}/status=401", *QUICK)
    assert ran.code == 6
    assert "hint: put a key that is valid there in the environment variable `LLMOPT_API_KEY`" in ran.error


def test_github_gets_annotations_and_a_summary(
    llmopt: Llmopt, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "step.md"))
    (tmp_path / "step.md").write_text("before\n")
    ran = llmopt("bench", f"{server}/ttft=5", *QUICK, "--slo", "ttft_p50_ms<=1")
    assert ran.code == 5
    assert "::error title=llmopt bench%3A objective broken::ttft_ms_p50<=1 is broken" in ran.err
    step = (tmp_path / "step.md").read_text()
    assert step.startswith("before\n#")
    assert "Load test: failed" in step


def test_the_forms_that_are_asked_for_are_written(llmopt: Llmopt, server: str, tmp_path: Path) -> None:
    files = {form: tmp_path / "deep" / f"it.{form}" for form in ("junit", "html", "csv")}
    (tmp_path / "deep").mkdir()
    flags = [part for form, file in files.items() for part in (f"--{form}", file)]
    assert llmopt("bench", f"{server}/plain", *QUICK, *flags).code == 0
    assert files["junit"].read_text().startswith("<?xml")
    assert files["html"].read_text().lstrip().lower().startswith("<!doctype html>")
    assert len(files["csv"].read_text().splitlines()) >= 2


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("selftst",), 2, "no such command `bench selftst`\n\nhint: did you mean `llmopt bench selftest`?"),
        (("calibrat", "http://x"), 2, "hint: did you mean `llmopt bench calibrate`?"),
        (("localhost:8000",), 2, "has no scheme\n\nhint: write it as `http://localhost:8000`"),
        (("/nowhere",), 1, "no engine `/nowhere`"),
        (("http://127.0.0.1:1", "--concurency", "3"), 2, "did you mean `--concurrency`?"),
        (("http://127.0.0.1:1", "--baseline", "/nowhere"), 1, "no report at `/nowhere`"),
        (("http://127.0.0.1:1", "--baseline", "http://127.0.0.1:2"), 2, "is a server, not a report"),
        (("http://127.0.0.1:1", "--rate", "3", "--concurrency", "3"), 2, "two kinds of load"),
        (("http://127.0.0.1:1", "--rate", "3", "--in-process"), 2, "closed loop only"),
        (("http://127.0.0.1:1", "--slo", "ttft_p98_ms<=3"), 2, "reports have no `p98`"),
        (("http://127.0.0.1:1", "--header", "Authorization: abc"), 2, "would end up in the report"),
        (("http://127.0.0.1:1", "--header", "X-T: $LLMOPT_NOT_SET"), 2, "the environment has no `LLMOPT_NOT_SET`"),
        (("http://127.0.0.1:1", "--workload", "chatt"), 2, "did you mean `chat`?"),
        (("http://127.0.0.1:1", "--junit", "/nowhere/a/b.xml"), 1, "cannot write `/nowhere/a/b.xml`"),
        (("http://127.0.0.1:1",), 1, "cannot reach `http://127.0.0.1:1/v1/models`: Connection refused"),
        (("calibrate", "http://127.0.0.1:1", "--rounds", "5"), 2, "5 rounds tell no noise"),
        (("import", "/nowhere.json"), 1, "no result file at `/nowhere.json`"),
    ],
)
def test_a_slip_is_told_before_any_load(llmopt: Llmopt, arguments: tuple[str, ...], code: int, says: str) -> None:
    ran = llmopt("bench", *arguments)
    assert (ran.code, ran.out) == (code, "")
    assert says in ran.error


def test_a_report_does_not_go_into_a_file_s_place(llmopt: Llmopt, server: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    ran = llmopt("bench", f"{server}/plain", *QUICK, "--out", tmp_path / "file")
    assert ran.code == 2
    assert "candidate c1" not in ran.err
    assert (tmp_path / "file").read_text() == "mine"


def test_calibrate_tells_the_noise_and_stores_its_report(llmopt: Llmopt, server: str) -> None:
    ran = llmopt("bench", "calibrate", f"{server}/ttft=10", *QUICK, "--rounds", 6, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["calibration"]
    (stored,) = llmopt("store", "ls", "--json").json["artifacts"]
    assert stored["kind"] == "report"


def test_history_shows_the_reports_of_the_same_settings(llmopt: Llmopt, server: str) -> None:
    for requests in (2, 2, 3):
        assert llmopt("bench", f"{server}/ttft=5", *SMALL, "--concurrency", 1, "--requests", requests).code == 0
    newest = llmopt("bench", "history", "--metrics", "ttft_ms_p50", "--json").json
    assert newest["reports"] == 1  # three requests are another measurement
    first = llmopt("store", "ls", "--json").json["artifacts"][-1]["artifact"]
    alike = llmopt("bench", "history", first, "--metrics", "ttft_ms_p50", "--json").json
    assert [len(one["values"]) for one in alike["series"]] == [2]
    wrong = llmopt("bench", "history", "--metrics", "tfft_ms_p50")
    assert wrong.code == 1
    assert "did you mean `ttft_ms_p50`?" in wrong.error


def test_history_of_an_empty_store_says_how_to_fill_it(llmopt: Llmopt) -> None:
    ran = llmopt("bench", "history")
    assert ran.code == 1
    assert "hint: make one: `llmopt bench SUBJECT`" in ran.error


@pytest.mark.parametrize("tool", sorted(path.name for path in SAMPLES.iterdir()))
def test_results_of_another_tool_are_judged_as_our_own(llmopt: Llmopt, tool: str, tmp_path: Path) -> None:
    file = next(path for path in sorted((SAMPLES / tool).rglob("*.json")))
    ran = llmopt("bench", "import", file, "--slo", "ttft_p50_ms<=0.001", "--out", tmp_path / "out")
    assert ran.code in (5, 6), ran.err
    if ran.code == 5:
        report = report_in(tmp_path / "out")
        assert report["gate"]["verdict"] == "fail"
        again = llmopt("bench", "import", file, "--baseline", tmp_path / "out", "--json")
        assert again.code == 0, again.err
