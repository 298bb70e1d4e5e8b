"""The main job: one command from a checkpoint to a quantized, compiled, load-tested engine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

Stage = Callable[[str], dict[str, Any]]


def test_every_stage_makes_its_artifact(chain: Any, stage: Stage) -> None:
    kinds = {s["stage"]: (s["kind"], s["status"], s["cached"]) for s in chain.json["stages"]}
    assert kinds == {
        "calibrate": ("calibration", "complete", False),
        "quantize": ("quantized-model", "complete", False),
        "compile": ("engine", "compiled", False),
        "compile-base": ("engine", "compiled", False),
        "eval": ("report", "complete", False),
        "bench": ("report", "complete", False),
    }
    assert stage("compile")["bytes"] < stage("compile-base")["bytes"]


def test_quality_and_load_are_measured(stage: Stage) -> None:
    quality = stage("eval")["metrics"]
    assert 0 < quality["kl_mean"] < 1
    assert quality["perplexity"] > 1
    assert 0 < quality["top1_agreement"] <= 1
    for subject in ("candidate", "baseline"):
        for level in ("c1", "c2"):
            figures = stage("bench")["metrics"][subject][level]
            assert figures["errors"] == 0
            assert figures["tokens_per_s"] > 0
            assert figures["ttft_ms_p50"] > 0


def test_the_second_run_does_nothing_and_says_so(shared: Any, pipeline: Path, chain: Any) -> None:
    again = shared("run", pipeline, "--json")
    assert again.json["cached"] is True
    assert [s["artifact"] for s in again.json["stages"]] == [s["artifact"] for s in chain.json["stages"]]
    assert again.err == ""


def test_a_cached_run_is_quick_and_loads_nothing_that_computes(shared: Any, pipeline: Path, chain: Any) -> None:
    """A loose bound, for machines busy with other things; `make bench` has the figure."""
    assert min(shared("run", pipeline).cpu_s for _ in range(2)) < 1.5
    code = (
        "import sys\n"
        "from llmopt.cli.app import main\n"
        f"code = main(['run', {str(pipeline)!r}])\n"
        "print(*sys.modules, file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=shared.environment, check=True
    )
    loaded = set(ran.stderr.split())
    assert not loaded & {"torch", "transformers", "tokenizers", "openvino", "openvino_genai", "rich", "uvicorn"}


def test_the_run_ends_in_one_table(shared: Any, pipeline: Path, chain: Any) -> None:
    table, _, artifacts = shared("run", pipeline).out.partition("\n\n")
    assert [line.split("  ")[0] for line in table.splitlines()[1:6]] == [
        "model", "engine", "perplexity", "KL from base, nats", "top-1 agreement"
    ]  # fmt: skip
    for stage in chain.json["stages"]:
        assert stage["artifact"][:19] in artifacts


def test_a_dry_run_of_a_changed_pipeline_explains_itself(shared: Any, pipeline: Path, chain: Any) -> None:
    ran = shared("run", pipeline, "--set", "quantize.bits=3", "--dry-run", "--explain")
    assert ran.code == 0
    assert "settings.bits: 4 -> 3" in ran.out
    assert "unknown until `quantize` has run" in ran.out


def test_each_command_gives_what_the_run_gave(shared: Any, model: Path, stage: Stage) -> None:
    quantized = shared("quantize", model, "--samples", 4, "--seq-len", 64, "--json").json
    assert quantized["cached"]
    assert quantized["artifact"] == stage("quantize")["artifact"]
    digits = quantized["artifact"].removeprefix("sha256:")[:10]
    engine = shared("compile", digits, "--json").json
    assert engine["cached"]
    assert engine["artifact"] == stage("compile")["artifact"]
    report = shared("eval", digits, "--against", model, "--windows", 4, "--seq-len", 64, "--json").json
    assert report["cached"]
    assert report["artifact"] == stage("eval")["artifact"]


def test_quantizing_and_compiling_again_elsewhere_gives_the_same_artifacts(
    llmopt: Any, model: Path, stage: Stage
) -> None:
    quantized = llmopt("quantize", model, "--samples", 4, "--seq-len", 64, "--json").json
    assert not quantized["cached"]
    assert quantized["artifact"] == stage("quantize")["artifact"]
    engine = llmopt("compile", quantized["artifact"], "--json").json
    assert not engine["cached"]
    assert engine["artifact"] == stage("compile")["artifact"]


def test_an_exported_model_is_an_input_like_the_stored_one(shared: Any, stage: Stage, tmp_path: Path) -> None:
    assert shared("store", "export", stage("quantize")["artifact"], tmp_path / "out").code == 0
    engine = shared("compile", tmp_path / "out", "--json").json
    assert engine["cached"]
    assert engine["artifact"] == stage("compile")["artifact"]


def test_an_engine_answers_over_http_and_stops_on_ctrl_c(shared: Any, stage: Stage) -> None:
    process = shared.start("serve", stage("compile")["artifact"], "--port", 0, "--model-name", "demo")
    try:
        line = process.stdout.readline()
        assert line.startswith("ready http://127.0.0.1:"), process.stderr.read()
        body = json.dumps({"model": "demo", "prompt": "def main", "max_tokens": 4, "temperature": 0}).encode()
        request = urllib.request.Request(
            f"{line.split()[1]}/v1/completions", body, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] >= 1
    finally:
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out == ""
