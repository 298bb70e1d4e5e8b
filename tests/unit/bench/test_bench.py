"""The whole of bench, from subjects to a report folder."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmopt.artifacts.outcome import Outcome, silent
from llmopt.bench import Subject, measure, resolve
from llmopt.errors import Exit, LlmoptError, MeasurementInvalidError

MakeEngine = Callable[..., Path]
Command = Callable[[Path], list[str]]

QUICK = {"concurrency": [1, 3], "requests": 6, "output_tokens": 8, "prompt_tokens": 16, "warmup": 1}


def bench_url(url: str, out: Path, **options: Any) -> Outcome:
    return measure({"candidate": Subject(name="candidate", url=url)}, resolve({**QUICK, **options}), out, silent)


def report_in(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def requests_in(out: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    found: list[dict[str, Any]] = pq.read_table(out / "requests.parquet").to_pylist()
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def pids_in(log: Path) -> list[int]:
    return [int(pid) for pid in re.findall(r"^pid (\d+)$", log.read_text(), re.MULTILINE)]


def test_a_bench_gives_figures_and_a_report(truth: Any, tmp_path: Path) -> None:
    outcome = bench_url(truth.url("ttft=20,gap=2"), tmp_path / "report")
    figures = outcome.metrics["candidate"]
    assert isinstance(figures, dict)
    assert list(figures) == ["c1", "c3"]
    for at in figures.values():
        assert isinstance(at, dict)
        assert (at["requests"], at["errors"]) == (6, 0)
        assert at["ttft_ms_p50"] >= 20  # type: ignore[operator]
        assert at["e2e_ms_p50"] >= 34  # type: ignore[operator]
    report = report_in(tmp_path / "report")
    assert (report["schema"], report["valid"]) == ("llmopt.report/2", True)
    assert report["settings"]["concurrency"] == [1, 3]
    assert report["subjects"]["candidate"]["model"] == "truth"
    assert report["results"]["candidate"]["c3"]["tokens"] == 48
    assert {"cpu", "cores", "memory_bytes", "system", "versions"} <= set(report["environment"])
    lines = requests_in(tmp_path / "report")
    assert len(lines) == 12  # the warm-up is not in it
    assert all(len(line["chunks_us"]) == 8 and line["chunks_us"][0] >= 20_000 for line in lines)
    assert "| candidate | c3 | 6 | 0 |" in (tmp_path / "report" / "report.md").read_text()


def test_the_report_s_figures_follow_from_its_requests(truth: Any, tmp_path: Path) -> None:
    bench_url(truth.url("ttft=5,gap=1"), tmp_path)
    report = report_in(tmp_path)["results"]["candidate"]["c3"]
    lines = [line for line in requests_in(tmp_path) if line["level"] == "c3"]
    assert report["ttft_ms"]["max"] == pytest.approx(max(line["chunks_us"][0] for line in lines) / 1e3, abs=0.002)
    assert report["e2e_ms"]["min"] == pytest.approx(min(line["chunks_us"][-1] for line in lines) / 1e3, abs=0.002)
    assert report["itl_ms"]["count"] == 6 * 7


def test_an_engine_is_served_for_the_measurement_only(
    make_engine: MakeEngine, fake_serve: Command, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    subject = Subject(name="candidate", engine=make_engine("gap=1"), artifact="sha256:ab")
    outcome = measure({"candidate": subject}, resolve(QUICK), out, silent, command=fake_serve)
    assert "candidate" in outcome.metrics
    assert report_in(out)["subjects"]["candidate"] == {
        "model": "truth",
        "lineage": [],
        "engine": "engine",
        "artifact": "sha256:ab",
    }
    (pid,) = pids_in(out / "server-candidate.log")
    assert not is_running(pid)


def test_two_subjects_get_the_same_prompts_in_every_round_and_a_ratio(
    truth: Any, make_engine: MakeEngine, fake_serve: Command, tmp_path: Path
) -> None:
    slow, quick = truth.url("ttft=40,slow_one"), truth.url("ttft=2,quick_one")
    subjects = {"candidate": Subject(name="candidate", url=slow), "baseline": Subject(name="baseline", url=quick)}
    seen = len(truth.log())
    settings = resolve({**QUICK, "concurrency": 2, "requests": 4, "rounds": 3, "seed": 1})
    outcome = measure(subjects, settings, tmp_path, silent)
    stints = [entry["prompt"] for entry in truth.log()[seen:]]
    rounds = [stints[i * 10 : i * 10 + 10] for i in range(3)]  # two subjects, a warm-up and four requests
    for prompts in rounds:
        assert sorted(prompts[:5]) == sorted(prompts[5:])
        assert len(set(prompts)) == 5
    assert len(set(stints)) == 15  # a round's prompts are new to the server
    assert outcome.metrics["ratio"]["c2"]["ttft_ms_p50"] > 1.5  # type: ignore[index,call-overload,operator]
    report = report_in(tmp_path)
    assert [each["round"] for each in report["results"]["candidate"]["c2"]["rounds"]] == [0, 1, 2]
    assert report["results"]["baseline"]["c2"]["requests"] == 12
    assert report["gate"] is None  # three rounds tell nothing, and nobody asked
    (told,) = [
        line for line in (tmp_path / "summary.md").read_text().splitlines() if line.startswith("- c2: TTFT p50 +")
    ]
    assert told.endswith("in 3 rounds, which may be noise")


def test_rounds_take_the_subjects_in_random_order_by_the_seed(truth: Any, tmp_path: Path) -> None:
    subjects = {name: Subject(name=name, url=truth.url()) for name in ("candidate", "baseline")}
    orders = []
    for seed in (0, 0, 7):
        said: list[dict[str, Any]] = []

        def hear(line: str, /, said: list[dict[str, Any]] = said, **facts: Any) -> None:
            said.append({"line": line, **facts})

        settings = resolve({**QUICK, "concurrency": 1, "requests": 1, "warmup": 0, "rounds": 8, "seed": seed})
        measure(subjects, settings, tmp_path / str(len(orders)), hear)
        levels = [facts for facts in said if "done" in facts]
        assert [(facts["done"], facts["total"]) for facts in levels] == [(n, 16) for n in range(1, 17)]
        assert [facts["round"] for facts in levels] == [n // 2 for n in range(16)]
        orders.append([facts["subject"] for facts in levels])
    assert orders[0] == orders[1] != orders[2]
    assert len({tuple(orders[0][i : i + 2]) for i in range(0, 16, 2)}) == 2


def test_prompts_are_exact_and_the_server_s_count_is_checked(truth: Any, tokenizer_file: Path, tmp_path: Path) -> None:
    from llmopt.bench.workload.prompts import load_tokenizer

    for counted, notes in ((16, 0), (17, 1)):  # said once of both levels
        seen = len(truth.log())
        subject = Subject(name="candidate", url=truth.url(f"prompt_tokens={counted}"), tokenizer=tokenizer_file)
        outcome = measure({"candidate": subject}, resolve(QUICK), tmp_path / str(counted), silent)
        sent = [entry["prompt"] for entry in truth.log()[seen:]]
        assert {len(load_tokenizer(tokenizer_file).encode(prompt).ids) for prompt in sent} == {16}
        assert str(outcome.events).count("count another length of the prompt than 16 tokens: 17") == notes


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        ("nousage", "6 of 6 answers have no usage"),
        ("tokens=5", "6 of 6 answers ended early"),
        ("tokens=9", "6 of 6 answers are too long"),
        ("whole", "6 of 6 answers were not streamed"),
        ("together=4", "of the tokens came together with another"),
        ("onebyone", "the server closed connections"),
    ],
)
def test_a_server_that_does_not_do_as_asked_is_told_of(truth: Any, tmp_path: Path, behaviour: str, says: str) -> None:
    outcome = bench_url(truth.url(behaviour + ",gap=1"), tmp_path, concurrency=1)
    assert any(says in event for event in outcome.events)
    assert report_in(tmp_path)["notes"] == list(outcome.events)


def test_a_duration_repeats_prompts_only_when_they_are_used_up(
    truth: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"requests": None, "duration_s": 0.3, "concurrency": 2}
    assert "prompts came again" not in str(bench_url(truth.url("ttft=10"), tmp_path / "a", **options).events)
    monkeypatch.setattr("llmopt.bench.level._POOL", 3)
    outcome = bench_url(truth.url("ttft=10"), tmp_path / "b", **options)
    assert "prompts came again after 3 requests" in str(outcome.events)


def test_a_server_that_dies_under_load_is_an_invalid_measurement(
    make_engine: MakeEngine, fake_serve: Command, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    subject = Subject(name="candidate", engine=make_engine("die=5,gap=1"))
    with pytest.raises(MeasurementInvalidError, match=r"`candidate` died under load \(killed by SIGKILL\)") as caught:
        measure({"candidate": subject}, resolve({**QUICK, "warmup": 0}), out, silent, command=fake_serve)
    assert caught.value.code is Exit.MEASUREMENT_INVALID
    assert "fatal: the device is gone" in (caught.value.hint or "")
    report = report_in(out)
    assert report["valid"] is False
    assert "died under load" in report["invalid_because"]
    assert set(report["results"]["candidate"]["c1"]["errors"]) == {"cut", "refused"}
    assert "not valid" in (out / "report.md").read_text()
    assert not is_running(pids_in(out / "server-candidate.log")[0])


def test_a_server_that_dies_in_the_warm_up_is_found_too(
    make_engine: MakeEngine, fake_serve: Command, tmp_path: Path
) -> None:
    subject = Subject(name="candidate", engine=make_engine("die=5"))
    with pytest.raises(MeasurementInvalidError, match="died under load"):
        measure({"candidate": subject}, resolve(QUICK), tmp_path / "report", silent, command=fake_serve)


def test_a_server_that_cannot_start_is_an_error(make_engine: MakeEngine, fake_serve: Command, tmp_path: Path) -> None:
    subject = Subject(name="candidate", engine=make_engine("broken"))
    with pytest.raises(LlmoptError, match="did not start") as caught:
        measure({"candidate": subject}, resolve(QUICK), tmp_path / "report", silent, command=fake_serve)
    assert caught.value.code is Exit.ERROR
    assert "no such device: NPU" in (caught.value.hint or "")


def test_errors_above_one_percent_are_an_invalid_measurement_with_its_report(truth: Any, tmp_path: Path) -> None:
    with pytest.raises(MeasurementInvalidError, match=r"4 of 20 requests of `candidate` at concurrency 2 failed"):
        bench_url(truth.url("every=5"), tmp_path, concurrency=2, requests=20, warmup=0)
    report = report_in(tmp_path)
    assert report["valid"] is False
    assert report["results"]["candidate"]["c2"]["errors"]["http_5xx"] == 4
    assert len(requests_in(tmp_path)) == 20


def test_no_answer_at_all_is_an_error_before_the_load(truth: Any, tmp_path: Path) -> None:
    with pytest.raises(LlmoptError, match=r"`candidate` answers no request: http_5xx \(HTTP 500"):
        bench_url(truth.url("status=500"), tmp_path)
    assert report_in(tmp_path)["valid"] is False


def test_no_answer_at_all_without_a_warm_up_is_an_invalid_measurement(truth: Any, tmp_path: Path) -> None:
    with pytest.raises(MeasurementInvalidError, match="6 of 6 requests"):
        bench_url(truth.url("status=500"), tmp_path, warmup=0)


def test_an_unreachable_server_is_an_error_with_a_hint(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(LlmoptError, match=r"cannot reach `http://127\.0\.0\.1") as caught:
            bench_url(f"http://127.0.0.1:{unused.getsockname()[1]}", tmp_path)
    assert caught.value.code is Exit.ERROR
    assert caught.value.hint == "does the server run, and are host and port right?"


def test_a_host_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LlmoptError, match="cannot reach"):
        bench_url("http://no-such-host.invalid:8000", tmp_path)


def test_plain_http_where_tls_was_asked_for_is_an_error(truth: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        import threading

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(LlmoptError, match="no TLS connection to"):
            bench_url(f"https://127.0.0.1:{listener.getsockname()[1]}", tmp_path)
        thread.join()


@pytest.mark.parametrize("behaviour", ["models_status=401", "status=401", "models_status=403"])
def test_a_server_that_wants_a_key_says_where_to_put_it(
    truth: Any, tmp_path: Path, behaviour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LLMOPT_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(LlmoptError, match=r"wants a key \(HTTP 40") as caught:
        bench_url(truth.url(behaviour), tmp_path)
    assert "`LLMOPT_API_KEY`" in (caught.value.hint or "")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1")
    with pytest.raises(LlmoptError, match="refuses the key"):
        bench_url(truth.url(behaviour), tmp_path)


def test_a_key_is_sent_and_never_written_down(truth: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOPT_API_KEY", "sk-secret-2")
    seen = len(truth.log())
    bench_url(truth.url(), tmp_path / "good")
    assert {entry["authorization"] for entry in truth.log()[seen:]} == {"Bearer sk-secret-2"}
    with pytest.raises(LlmoptError) as caught:  # this server repeats the key in its errors
        bench_url(truth.url("status=500"), tmp_path / "bad", warmup=0)
    assert "status 500, key ***" in caught.value.message
    for file in tmp_path.rglob("*.*"):
        assert b"sk-secret" not in file.read_bytes()


def test_a_server_that_lists_no_model_wants_one_named(truth: Any, tmp_path: Path) -> None:
    with pytest.raises(LlmoptError, match="lists no model") as caught:
        bench_url(truth.url("models_status=404"), tmp_path)
    assert "--model" in (caught.value.hint or "")
    assert bench_url(truth.url("models_status=404"), tmp_path, model="mine").metrics
    assert report_in(tmp_path)["subjects"]["candidate"]["model"] == "mine"


def test_a_url_may_end_in_v1(truth: Any, tmp_path: Path) -> None:
    assert bench_url(truth.url() + "/v1/", tmp_path).metrics


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_found_before_the_load(truth: Any, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(LlmoptError, match="cannot write to"):
        bench_url(truth.url(), tmp_path / "report")


def test_an_output_below_a_file_is_found_before_the_load(truth: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LlmoptError, match="cannot write to"):
        bench_url(truth.url(), tmp_path / "file" / "report")


def test_ctrl_c_stops_the_server_and_marks_the_report(
    make_engine: MakeEngine, fake_serve: Command, tmp_path: Path
) -> None:
    engine, out = make_engine("ttft=20"), tmp_path / "report"
    program = f"""
from pathlib import Path
from llmopt.bench import Subject, measure, resolve
subject = Subject(name="candidate", engine=Path({str(engine)!r}))
settings = resolve({{**{QUICK!r}, "concurrency": [1, 2, 3, 4, 5, 6], "requests": None, "duration_s": 1.0}})
measure({{"candidate": subject}}, settings, Path({str(out)!r}), lambda line, **facts: print(line, flush=True),
        command=lambda _: {fake_serve(engine)!r})
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as bench:
        assert bench.stdout is not None
        assert any("candidate c1:" in line for line in iter(bench.stdout.readline, ""))
        time.sleep(0.3)  # into the next level
        bench.send_signal(signal.SIGINT)
        _, errors = bench.communicate(timeout=30)
    assert bench.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert not is_running(pids_in(out / "server-candidate.log")[0])
    report = report_in(out)
    assert (report["valid"], report["invalid_because"]) == (False, "interrupted")
    assert {"c1"} <= set(report["results"]["candidate"]) < {f"c{n}" for n in range(1, 7)}


def test_bench_loads_no_heavy_library(truth: Any, tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
import llmopt.bench
assert "asyncio" not in sys.modules
from llmopt.artifacts.outcome import silent
from llmopt.bench import Subject, measure, resolve
subject = Subject(name="candidate", url={truth.url()!r})
measure({{"candidate": subject}}, resolve({QUICK!r}), Path({str(tmp_path)!r}), silent)
heavy = {{"torch", "transformers", "httpx", "openvino", "rich", "tokenizers"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
