"""What commands show of a quantized model's errors."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmopt.artifacts.outcome import Outcome
from llmopt.formats.scheme import Scheme

Llmopt = Callable[..., Any]
METRICS = {
    "weight_bytes": 4 << 20,
    "bits_per_weight": 4.25,
    "calibration_tokens": 2048,
    "relative_error_mean": 0.0406,
    "relative_error_max": 0.07,
    "relative_error_max_linear": "model.layers.6.mlp.up_proj",
}


@pytest.fixture
def quantizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `llmopt quantize` come to errors that are known."""
    from llmopt import quantizers
    from llmopt.quantizers import errors_report

    def work(model: Path, settings: object, calibration: object, out: Path, *_: object, **__: object) -> Outcome:
        (out / "config.json").write_text("{}")
        errors = {f"model.layers.{n}.mlp.up_proj": 0.01 * (1 + n) for n in range(7)}
        schemes = dict.fromkeys(errors, Scheme(bits=4, group_size=128, symmetric=True))
        errors_report.write(out, errors, schemes, method="rtn")
        return Outcome(metrics=METRICS)

    monkeypatch.setattr(quantizers, "quantize", work)


@pytest.mark.usefixtures("quantizes")
def test_quantize_ends_with_bits_size_and_errors(llmopt: Llmopt, tiny: Path) -> None:
    out = llmopt("quantize", tiny, "--method", "rtn").out
    lines = [" ".join(line.split()) for line in out.partition("\n\n")[2].splitlines()]
    assert lines == [
        "bits per weight 4.250",
        "size of weights 4.0 MiB",
        "mean relative error 0.0406",
        "max relative error 0.0700 model.layers.6.mlp.up_proj",
        "",
        "calibration_tokens: 2048",
    ]


@pytest.mark.usefixtures("quantizes")
def test_store_show_names_the_five_worst(llmopt: Llmopt, tiny: Path) -> None:
    artifact = llmopt("quantize", tiny, "--method", "rtn", "--json").json["artifact"]
    worst = [line for line in llmopt("store", "show", artifact).out.splitlines() if line.startswith("worst")]
    assert worst == [f"worst     {0.01 * n:.4f}  model.layers.{n - 1}.mlp.up_proj, 4 bits" for n in (7, 6, 5, 4, 3)]
    value = llmopt("store", "show", artifact, "--json").json["worst_linears"]
    assert value[0] == {"linear": "model.layers.6.mlp.up_proj", "error": 0.07, "bits": 4}
    assert len(value) == 5


@pytest.mark.usefixtures("quantizes")
def test_damaged_errors_are_told_and_the_rest_is_shown(llmopt: Llmopt, tiny: Path, store: Path) -> None:
    artifact = llmopt("quantize", tiny, "--method", "rtn", "--json").json["artifact"]
    shutil.rmtree(store / "blobs")
    ran = llmopt("store", "show", artifact)
    assert ran.code == 0
    assert "`errors.json` is not as stored" in ran.err
    assert "made by   quantize.rtn" in ran.out


def test_what_has_no_errors_shows_none(llmopt: Llmopt, tiny: Path) -> None:
    artifact = llmopt("eval", tiny, "--windows", 1, "--seq-len", 16, "--json").json["artifact"]
    ran = llmopt("store", "show", artifact)
    assert "worst" not in ran.out
    assert ran.err == ""
