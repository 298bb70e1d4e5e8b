"""How near each method stays to the base, by KL divergence on the held-out text: the table in README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmopt import calibrate, evaluate, quantizers
from llmopt.artifacts.outcome import silent
from llmopt.profiles import CALIBRATION_TEXT, HELDOUT_TEXT

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3000)]

W4 = {"bits": 4, "group_size": 128}
W8A8 = {"method": "rtn", "bits": 8, "group_size": -1}
RUNS: dict[str, dict[str, Any]] = {
    "RTN W4 sym": {"method": "rtn", **W4},
    "GPTQ W4 sym": {"method": "gptq", **W4},
    "GPTQ W4 sym, no extras": {"method": "gptq", "compensate": False, "sweeps": 0, **W4},
    "GPTQ W4 sym, bits chosen": {"method": "gptq", "target_bpw": 4.127},  # what W4 g128 takes, scales included
    "AWQ scaling, GPTQ W4 sym": {"method": "gptq", "scaling": "awq", **W4},
    "AWQ W4 sym": {"method": "awq", "symmetric": True, **W4},
    "RTN W4 asym": {"method": "rtn", "symmetric": False, **W4},
    "GPTQ W4 asym": {"method": "gptq", "symmetric": False, **W4},
    "AWQ W4 asym": {"method": "awq", **W4},
    "GPTQ W3 sym": {"method": "gptq", "bits": 3},
    "FP8 dynamic": {"method": "fp8"},
    "W8A8 naive dynamic": {**W8A8, "activations": "dynamic"},
    "W8A8 naive static": {**W8A8, "activations": "static"},
    "W8A8 SmoothQuant dynamic": {"method": "smoothquant"},
    "W8A8 SmoothQuant static": {"method": "smoothquant", "activations": "static"},
}


def measure(base: Path, scratch: Path) -> dict[str, float]:
    """KL x 1e-3 of each run against `base`."""
    found = {}
    for number, (name, settings) in enumerate(RUNS.items()):
        resolved = quantizers.resolve(settings)
        out = scratch / str(number)
        out.mkdir()
        common = resolved.common
        ids = calibrate.from_text(
            base, CALIBRATION_TEXT, scratch / f"{number}-ids", samples=common.samples, seq_len=common.seq_len
        )
        quantizers.quantize(base, resolved, ids, out, silent)
        outcome = evaluate.evaluate(out, base, HELDOUT_TEXT, evaluate.resolve({}), scratch, silent)
        found[name] = float(outcome.metrics["kl_mean"]) * 1e3  # type: ignore[arg-type]
    return found


def test_quality(demo_model: Path, outlier_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain, outliers = measure(demo_model, tmp_path / "a"), measure(outlier_model, tmp_path / "b")
    print("\nmean KL x 1e-3         ", "demo model", "with outliers", sep="  ")
    for name in RUNS:
        print(f"{name:25}  {plain[name]:10.3f}  {outliers[name]:13.3f}")
    assert plain["GPTQ W4 sym"] <= plain["RTN W4 sym"] * 0.3
    assert plain["GPTQ W4 sym, bits chosen"] <= plain["GPTQ W4 sym"] * 0.65
    assert outliers["GPTQ W4 sym, bits chosen"] <= outliers["GPTQ W4 sym"] * 0.75
    assert outliers["AWQ scaling, GPTQ W4 sym"] <= outliers["GPTQ W4 sym"] / 2
    assert outliers["AWQ W4 sym"] < outliers["RTN W4 sym"] / 2
    assert outliers["AWQ W4 asym"] < outliers["RTN W4 asym"] / 2
    assert outliers["W8A8 SmoothQuant dynamic"] <= outliers["W8A8 naive dynamic"] / 10
    assert outliers["W8A8 SmoothQuant static"] <= outliers["W8A8 naive static"] / 10
