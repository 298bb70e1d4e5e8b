"""An artifact leaves one store as an OCI layout, and is found in another as if it had been made there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

RTN = ("--method", "rtn", "--group-size", 32)


def test_what_was_quantized_on_one_machine_is_a_hit_on_another(llmopt: Any, model: Path, tmp_path: Path) -> None:
    made = llmopt("quantize", model, *RTN, "--name", "small", "--json").json
    exported = llmopt("store", "export", "small", tmp_path / "layout", "--oci", "--json").json
    assert exported["artifact"] == made["artifact"]
    elsewhere = ("--store", tmp_path / "elsewhere")
    imported = llmopt("store", "import", f"{tmp_path / 'layout'}:small", "--name", "small", *elsewhere, "--json").json
    assert {key: imported[key] for key in ("artifact", "action")} == {key: made[key] for key in ("artifact", "action")}
    assert imported["attestations"] == 1
    again = llmopt("quantize", model, *RTN, *elsewhere, "--json").json
    assert again["cached"] is True
    assert again["artifact"] == made["artifact"]
    assert llmopt("store", "verify", *elsewhere).code == 0
