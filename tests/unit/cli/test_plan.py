"""`llmopt plan`: what a user reads and what a script gets."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Llmopt = Callable[..., Any]


def rows(out: str) -> list[str]:
    """The rows of the table."""
    lines = out.splitlines()
    start = next(index for index, line in enumerate(lines) if "HARDWARE" in line)
    return lines[start + 1 : lines.index("", start)]


def test_70b_takes_280_gb_in_fp32_and_140_in_fp16(llmopt: Llmopt) -> None:
    ran = llmopt("plan", "70B")
    assert ran.code == 0
    assert "fp32 280 GB, fp16 140 GB" in ran.out


def test_every_instance_is_a_row_or_says_why_not(llmopt: Llmopt) -> None:
    from llmopt.planner.hardware import instances

    out = llmopt("plan", "70B").out
    for row in instances():
        assert re.search(rf"\s{re.escape(row.name)}\s", out), row.name


def test_one_row_is_the_best_and_as_cheap_as_any(llmopt: Llmopt) -> None:
    found = rows(llmopt("plan", "8B").out)
    assert [index for index, line in enumerate(found) if line.startswith("*")] == [0]
    costs = [float(line.split()[-1]) for line in found if not line.endswith("?")]
    assert costs[1:] == sorted(costs[1:])
    assert costs[0] <= 1.02 * costs[1] + 0.01


def test_a_192_gb_instance_says_of_each_precision_whether_it_fits(llmopt: Llmopt) -> None:
    report = llmopt("plan", "70B", "--hardware", "g5.48xlarge", "--json").json
    fits = {option["precision"]: option["fits"] for option in report["options"]}
    assert fits == {"fp32": False, "fp16": True, "fp8": False, "int8": True, "w4a16": True}
    assert report["best"]["hardware"] == "g5.48xlarge"


def test_the_source_of_the_price_and_of_the_row_is_told(llmopt: Llmopt) -> None:
    (option,) = llmopt("plan", "7B", "--hardware", "g5.xlarge", "--precision", "fp16", "--json").json["options"]
    assert option["price_source"].startswith("AWS Price List us-east-1")
    assert "A10G" in option["source"]


def test_a_price_of_ones_own_replaces_the_tables(llmopt: Llmopt) -> None:
    found = [
        llmopt("plan", "7B", "--hardware", "g5.xlarge", "--precision", "fp16", "--price", price, "--json").json["best"]
        for price in ("2", "g5.xlarge=4")
    ]
    assert [option["price_usd_h"] for option in found] == [2, 4]
    assert found[1]["usd_per_million_tokens"] == pytest.approx(2 * found[0]["usd_per_million_tokens"])
    assert found[0]["price_source"] == "given"


def test_an_unknown_price_is_asked_for(llmopt: Llmopt) -> None:
    ran = llmopt("plan", "7B", "--hardware", "H100")
    assert "price not known, give it with `--price`" in ran.out
    assert "* is fastest for its devices" in ran.out


def test_a_limit_makes_batches_smaller(llmopt: Llmopt) -> None:
    command = ("plan", "8B", "--hardware", "g6e.xlarge", "--precision", "fp8", "--json")
    free, held = (llmopt(*command, *more).json["best"]["batch"] for more in ((), ("--slo", "tpot_p50_ms<=25")))
    assert held < free


def test_a_workload_of_bench_gives_its_lengths(llmopt: Llmopt) -> None:
    report = llmopt("plan", "8B", "--workload", "code", "--json").json
    assert 1500 < report["workload"]["prompt_tokens"] < 2600  # median 1,469 and p90 5,186, cut at 7,437
    assert 15 < report["workload"]["output_tokens"] < 60


def test_a_short_model_gets_shorter_requests(llmopt: Llmopt, tiny: Path) -> None:
    report = llmopt("plan", tiny, "--json").json
    assert report["workload"]["prompt_tokens"] + report["workload"]["output_tokens"] <= 256


def test_given_lengths_go_before_the_workloads(llmopt: Llmopt) -> None:
    report = llmopt("plan", "8B", "--workload", "code", "--output-tokens", 77, "--json").json
    assert report["workload"]["output_tokens"] == 77


def test_requests_in_flight_are_spread_over_instances(llmopt: Llmopt) -> None:
    ran = llmopt("plan", "8B", "--hardware", "g6.xlarge", "--precision", "fp16", "--concurrency", 500)
    assert re.search(r"\d+ x g6.xlarge", ran.out)


def test_a_quantized_artifact_is_planned_as_it_lies(llmopt: Llmopt, make_checkpoint: Callable[..., Path]) -> None:
    model = make_checkpoint("llama", hidden_size=512, intermediate_size=1024, num_attention_heads=8)
    made = llmopt("quantize", model, "--method", "rtn", "--group-size", 128, "--name", "small", "--json").json
    length = ("--prompt-tokens", 64, "--output-tokens", 16)
    report = llmopt("plan", "small", "--hardware", "A10G", *length, "--json").json
    stored = report["options"][0]
    assert stored["precision"] == "compressed-tensors w4a16 g128"
    assert stored["memory"]["weights"] == pytest.approx(report["model"]["stored_bytes"], rel=0.02)
    assert report["model"]["stored_bytes"] < made["bytes"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("8B", "--hardware", "g5.49xlarge"), 2, "unknown hardware `g5.49xlarge`"),
        (("8B", "--precision", "fp99"), 2, "unknown precision `fp99`"),
        (("8B", "--kv-cache", "fp4"), 2, "the KV cache cannot be `fp4`"),
        (("8B", "--slo", "itl_p99_ms<=20"), 2, "the planner does not predict `itl_ms`"),
        (("8B", "--slo", "ttft>=200"), 2, "would fail what is good"),
        (("8B", "--tp", "3"), 2, "32 attention heads cannot be divided among 3 devices"),
        (("8B", "--price", "3"), 2, "could be of"),
        (("8B", "--price", "g5.xlarge=cheap"), 2, "is no price"),
        (("8B", "--hardware", "H100", "--price", "L4=1"), 2, "is of hardware that is not planned"),
        (("8B", "--workload", "nothing"), 2, "no workload is named `nothing`"),
        (("8B", "--prompt-tokens", "1000000"), 2, "longer than the 131,072 of the model"),
        (("0B",), 2, "no number of parameters"),
        (("./nothing",), 1, "no model at `./nothing`"),
        (("70",), 2, "`70` is no number of parameters"),
        (("70X",), 2, "`70X` is no number of parameters"),
        (("nothing",), 1, "no folder and no artifact `nothing`"),
    ],
)
def test_what_cannot_be_planned_is_told_with_a_hint(
    llmopt: Llmopt, arguments: tuple[str, ...], code: int, message: str
) -> None:
    ran = llmopt("plan", *arguments)
    assert ran.code == code
    assert message in ran.error
    assert "hint: " in ran.error


def test_nothing_that_fits_is_an_answer(llmopt: Llmopt) -> None:
    ran = llmopt("plan", "405B", "--hardware", "g4dn.xlarge")
    assert ran.code == 0
    assert "Nothing fits." in ran.out
    assert ran.out.count("g4dn.xlarge ") == 5


def test_what_fits_but_is_too_slow_is_told_apart(llmopt: Llmopt) -> None:
    ran = llmopt("plan", "8B", "--hardware", "g6.xlarge", "--slo", "ttft_p99_ms<=1")
    assert (ran.code, "Nothing fits that meets the limits." in ran.out) == (0, True)


@pytest.mark.parametrize(("arguments", "width"), [((), 120), (("--hardware", "g5.48xlarge,p4d.24xlarge"), 80)])
def test_the_table_and_the_notes_stay_within_a_terminal(
    llmopt: Llmopt, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    out = llmopt("plan", "70B", *arguments).out
    notes = out[out.index("* costs least") :].splitlines()
    assert max(len(line) for line in [*rows(out), *notes]) <= width


def test_hardware_whose_speed_is_unknown_is_told_to_be_unchecked(llmopt: Llmopt) -> None:
    limit = ("--slo", "ttft_p99_ms<=500")
    note = "note: `-`: no speed is predicted for it, so no limit was checked"
    assert note in llmopt("plan", "8B", "--hardware", "inf2.xlarge", *limit).out
    assert note not in llmopt("plan", "8B", "--hardware", "g6e.xlarge", *limit).out


def test_hardware_named_twice_is_one_row(llmopt: Llmopt) -> None:
    report = llmopt("plan", "8B", "--hardware", "H100,h100", "--precision", "fp8", "--json").json
    assert len(report["options"]) == 1


def test_the_readme_shows_what_is_printed(llmopt: Llmopt) -> None:
    readme = (Path(__file__).resolve().parents[3] / "README.md").read_text(encoding="utf-8")
    start = readme.index("$ llmopt plan 70B --hardware g5.48xlarge,p4d.24xlarge")
    shown = readme[start : readme.index("\n$ ", start)].splitlines()[1:]
    printed = llmopt("plan", "70B", "--hardware", "g5.48xlarge,p4d.24xlarge").out.splitlines()
    assert len(shown) > 10
    assert [line for line in shown if line != "  ..." and line not in printed] == []


def test_planning_loads_no_torch() -> None:
    code = "import sys; from llmopt.cli.app import main; main(['plan', '8B', '--json']); print(sorted(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(re.findall(r"'(\w+)", ran.stdout.splitlines()[-1]))
    assert not loaded & {"torch", "transformers", "openvino", "huggingface_hub"}
