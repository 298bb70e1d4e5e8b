"""`llmopt run`: the table at its end, and what it says of what was there already."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmopt.artifacts.outcome import Outcome

Llmopt = Callable[..., Any]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> tuple[str, ...]:
    """`llmopt run demo` on a tiny model, with stages that only report figures."""
    from llmopt import bench, compilers, evaluate, quantizers

    level = {"ttft_ms_p50": 12.0, "itl_ms_p50": 2.0, "tokens_per_s": 100.0}
    figures: dict[str, dict[str, Any]] = {
        "quantize": {"weight_bytes": 1},
        "compile": {},
        "eval": {"perplexity": 12.5, "base_perplexity": 12.0, "kl_mean": 0.0125, "top1_agreement": 0.9675},
        "bench": {
            "candidate": {"c1": level, "c4": level | {"tokens_per_s": 300.0}},
            "baseline": {"c1": level | {"ttft_ms_p50": 24.0}, "c4": level},
        },
    }

    def instead(name: str, size: int) -> Callable[..., Outcome]:
        def work(*arguments: Any, **_: Any) -> Outcome:
            place = max(n for n, argument in enumerate(arguments) if isinstance(argument, Path))
            out, progress = arguments[place : place + 2]
            progress(f"working on {name}")
            model = arguments[0] if isinstance(arguments[0], Path) else ""
            (out / "result.json").write_text(f"{model and len(list(model.iterdir()))}".ljust(size))
            if name == "compile":
                (out / "engine.json").write_text("{}")
            return Outcome(metrics=figures[name], status="compiled" if name == "compile" else "complete")

        return work

    monkeypatch.setattr(quantizers, "quantize", instead("quantize", 2048))
    monkeypatch.setattr(compilers, "check", lambda *_: None)
    monkeypatch.setattr(compilers, "compile_model", instead("compile", 4096))
    monkeypatch.setattr(evaluate, "check", lambda *_, **__: None)
    monkeypatch.setattr(evaluate, "evaluate", instead("eval", 8))
    monkeypatch.setattr(bench, "check", lambda *_: None)
    monkeypatch.setattr(bench, "measure", instead("bench", 8))
    small = ("quantize.samples=2", "quantize.seq_len=16", f"model={tiny}")
    return ("run", "demo", *(part for setting in small for part in ("--set", setting)))


def row(text: str, label: str) -> list[str]:
    """The cells of a line of the table."""
    (line,) = (line for line in text.splitlines() if line.startswith(label))
    return [cell for cell in line.removeprefix(label).split("  ") if cell.strip()]


def test_one_table_sets_the_quantized_model_beside_the_base(llmopt: Llmopt, demo: tuple[str, ...]) -> None:
    ran = llmopt(*demo)
    assert ran.code == 0, ran.err
    assert [cell.strip() for cell in row(ran.out, "perplexity")] == ["12.000", "12.500", "1.04"]
    assert [cell.strip() for cell in row(ran.out, "KL from base, nats")] == ["0.01250"]
    assert [cell.strip() for cell in row(ran.out, "top-1 agreement")] == ["96.75%"]
    assert [cell.strip() for cell in row(ran.out, "TTFT p50, 1 at once")] == ["24.0 ms", "12.0 ms", "0.50"]
    assert [cell.strip() for cell in row(ran.out, "tokens/s, 4 at once")] == ["100.0", "300.0", "3.00"]
    assert "2.0 KiB" in row(ran.out, "model")[1]
    assert "4.0 KiB" in row(ran.out, "engine")[0]


def test_every_artifact_is_listed_with_what_it_took(llmopt: Llmopt, demo: tuple[str, ...]) -> None:
    ran = llmopt(*demo)
    listed = ran.out.partition("STAGE")[2].splitlines()[1:]
    assert [line.split()[0] for line in listed] == ["calibrate", "quantize", "compile", "compile-base", "eval", "bench"]
    assert all("sha256:" in line and line.endswith(" s") for line in listed)
    again = llmopt(*demo)
    assert all(line.endswith("cached") for line in again.out.partition("STAGE")[2].splitlines()[1:])
    assert again.err == ""


def test_json_of_a_run_is_that_of_its_engine_and_lists_all_stages(llmopt: Llmopt, demo: tuple[str, ...]) -> None:
    value = llmopt(*demo, "--json").json
    assert value["kind"] == "engine"
    assert value["pipeline"] == "demo"
    assert value["cached"] is False
    names = ["calibrate", "quantize", "compile", "compile-base", "eval", "bench"]
    assert [stage["stage"] for stage in value["stages"]] == names
    assert all(stage["artifact"] for stage in value["stages"])
    assert value["artifact"] == value["stages"][2]["artifact"]
    assert llmopt(*demo, "--json").json["cached"] is True


def test_a_dry_run_lists_what_is_to_do(llmopt: Llmopt, demo: tuple[str, ...], store: Path) -> None:
    before = llmopt(*demo, "--dry-run")
    assert before.code == 0
    assert "to do" in before.out.splitlines()[1]
    assert "unknown until `calibrate` has run" in before.out.splitlines()[2]
    assert not store.exists()
    llmopt(*demo)
    after = llmopt(*demo, "--dry-run")
    assert all(line.endswith("in the store") for line in after.out.splitlines()[1:])


def test_explain_says_what_differs(llmopt: Llmopt, demo: tuple[str, ...]) -> None:
    llmopt(*demo)
    ran = llmopt(*demo, "--set", "quantize.bits=3", "--dry-run", "--explain")
    assert "quantize is not in the store:\n  settings.bits: 4 -> 3" in ran.out
    ran = llmopt(*demo, "--set", "quantize.bits=3", "--explain")
    assert "quantize: settings.bits: 4 -> 3" in ran.err


def test_out_has_a_folder_for_each_stage(llmopt: Llmopt, demo: tuple[str, ...], tmp_path: Path) -> None:
    assert llmopt(*demo, "--out", tmp_path / "out").code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "quantize", "compile", "compile-base", "eval", "bench"
    }  # fmt: skip


def test_an_interrupted_bench_leaves_its_report_in_out(
    llmopt: Llmopt, demo: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmopt import bench

    def measure(subjects: object, settings: object, out: Path, progress: object, **_: object) -> Outcome:
        (out / "report.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure", measure)
    ran = llmopt(*demo, "--out", tmp_path / "out")
    assert ran.code == 130
    assert [str(path.relative_to(tmp_path)) for path in (tmp_path / "out").rglob("*.*")] == ["out/bench/report.json"]
    assert f"the unfinished report is in `{tmp_path / 'out' / 'bench'}`" in ran.err


def test_a_pipeline_without_quantization_has_one_column(llmopt: Llmopt, demo: tuple[str, ...], tiny: Path) -> None:
    ran = llmopt("run", "exact", "--set", f"model={tiny}")
    assert ran.code == 0
    assert "quantized" not in ran.out.splitlines()[0]
    assert [cell.strip() for cell in row(ran.out, "engine")] == ["4.0 KiB"]


def test_the_wrong_pipeline_is_told_before_anything(llmopt: Llmopt, store: Path) -> None:
    ran = llmopt("run", "demo")
    assert ran.code == 2
    assert ran.err.startswith("error: the pipeline `demo` names no model\n")
    assert not store.exists()
