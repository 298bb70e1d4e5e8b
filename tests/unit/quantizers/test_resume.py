"""However often a quantization is ended early, it goes on from the last finished block, to the same bytes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmopt import calibrate, quantizers
from llmopt.artifacts.outcome import silent
from llmopt.quantizers.execution import DEFAULT, Execution
from llmopt.quantizers.journal import Journal

KILLED = Path(__file__).with_name("killed.py")
SMALL = {"samples": 8, "seq_len": 64, "group_size": 32}
METHODS: list[dict[str, Any]] = [
    {"method": "gptq"},
    {"method": "gptq", "compensate": False, "sweeps": 0},
    {"method": "awq"},
    {"method": "smoothquant", "activations": "static", "group_size": -1},
    {"method": "rtn"},
]


@pytest.fixture(scope="module")
def model(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("qwen2", num_hidden_layers=4)


def digest(folder: Path) -> str:
    files = sorted(f for f in folder.iterdir() if f.is_file())
    return hashlib.sha256(b"".join(f.name.encode() + f.read_bytes() for f in files)).hexdigest()


def run(model: Path, text: Path, out: Path, settings: dict[str, Any], execution: Execution = DEFAULT) -> str:
    out.mkdir(parents=True, exist_ok=True)
    resolved, ids = quantizers.resolve({**SMALL, **settings}), out.with_name(f"{out.name}-ids")
    if not ids.exists():
        calibrate.from_text(model, text, ids, samples=SMALL["samples"], seq_len=SMALL["seq_len"], seed=0)
    quantizers.quantize(model, resolved, ids, out, silent, execution)
    return digest(out)


class EndedEarlyError(Exception):
    pass


@pytest.mark.parametrize("save_after_s", [0.0, 1e9], ids=["activations kept", "activations run again"])
@pytest.mark.parametrize("settings", METHODS, ids=str)
def test_a_run_that_was_ended_goes_on_to_the_same_bytes(
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    save_after_s: float,
) -> None:
    execution = Execution(bfloat16=True, save_after_s=save_after_s)
    whole = run(model, text, tmp_path / "whole", settings, execution)
    record, done = Journal.record, []

    def stop_after(number: int) -> None:
        def stopping(self: Journal, part: int, sha256: str, facts: Any) -> None:
            record(self, part, sha256, facts)
            done.append(part)
            if part == number:
                raise EndedEarlyError

        monkeypatch.setattr(Journal, "record", stopping)

    for number in (1, 3, 4):
        stop_after(number)
        with pytest.raises(EndedEarlyError):
            run(model, text, tmp_path / "cut", settings, execution)
    stop_after(-1)
    assert run(model, text, tmp_path / "cut", settings, execution) == whole
    assert done == [0, 1, 2, 3, 4, 5], "no part was done twice"


def test_a_shard_that_was_damaged_meanwhile_is_made_again(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(model, text, tmp_path / "q", {})
    shard = next((tmp_path / "q").glob("model-00003-*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert run(model, text, tmp_path / "q", {}) == whole


@pytest.mark.slow
@pytest.mark.parametrize(("save_after_s", "seed"), [(0.0, 1), (1e9, 2)])
def test_killed_at_random_times_it_ends_with_the_same_artifact(
    model: Path, text: Path, tmp_path: Path, save_after_s: float, seed: int
) -> None:
    settings = json.dumps({**SMALL, "bfloat16": False, "save_after_s": save_after_s})

    ids = calibrate.from_text(model, text, tmp_path / "ids", samples=8, seq_len=64, seed=0)

    def go(store: Path, kills: int, seconds: float) -> dict[str, Any]:
        command = [sys.executable, KILLED, model, ids, store, settings, str(seed), str(kills), str(seconds)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    whole = go(tmp_path / "whole", 0, 0)
    cut = go(tmp_path / "cut", 20, whole["seconds"])
    assert cut["killed"] == 20
    assert cut["went_on"] >= 2
    assert cut["ids"] == whole["ids"]
    assert cut["left"] == whole["left"] == []


def test_what_does_not_fit_in_memory_lies_in_files_and_changes_nothing(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(model, text, tmp_path / "whole", {})
    monkeypatch.setattr("llmopt.quantizers.driver.BATCH_TOKENS", 128)
    kept = run(model, text, tmp_path / "kept", {})
    monkeypatch.setattr("llmopt.quantizers.driver.shelf_bytes", lambda *args: 200_000)
    files: list[str] = []
    write = quantizers.shelf.write_safetensors  # type: ignore[attr-defined]
    monkeypatch.setattr(
        "llmopt.quantizers.shelf.write_safetensors",
        lambda file, tensors, **more: files.append(file.name) or write(file, tensors, **more),  # type: ignore[func-returns-value]
    )
    assert run(model, text, tmp_path / "spilled", {}) == kept
    assert files
    assert whole != ""
