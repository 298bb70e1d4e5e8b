"""`llmopt quantize`: checking a block again, memory budgets, bits chosen to a size, and going on after an early end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmopt.artifacts import Store
from llmopt.formats.reading import open_quantized
from llmopt.models.checkpoint import Checkpoint
from llmopt.quantizers import driver

Llmopt = Callable[..., Any]
SMALL = ("--group-size", 32, "--samples", 4, "--seq-len", 64)


@pytest.mark.parametrize(
    "settings",
    [("--method", "gptq"), ("--method", "awq"), ("--method", "gptq", "--target-bpw", 5.2, "--kv-cache", "fp8")],
    ids=str,
)
def test_a_block_quantized_again_is_the_same(llmopt: Llmopt, tiny: Path, settings: tuple[Any, ...]) -> None:
    made = llmopt("quantize", tiny, *settings, *SMALL, "--json")
    assert made.code == 0, made.err
    checked = llmopt("quantize", tiny, "--check", made.json["artifact"], "--json")
    assert checked.code == 0, checked.err
    assert checked.json["differing"] == checked.json["otherwise"] == []
    assert checked.json["blocks"] == 2


def test_a_block_that_does_not_follow_is_named(llmopt: Llmopt, tiny: Path, tmp_path: Path, store: Path) -> None:
    """Of an artifact that claims settings it was not made with."""
    honest = llmopt("quantize", tiny, *SMALL, "--json").json
    other = llmopt("quantize", tiny, *SMALL, "--damping", 0.5, "--json").json
    stored = Store(store)
    with stored.stage() as folder:
        for file in Path(other["path"]).iterdir():
            if file.name != "llmopt.json":
                shutil.copyfile(file, folder / file.name)
        forged = stored.put(folder, kind="quantized-model", action=stored.get(honest["artifact"]).action)
    checked = llmopt("quantize", tiny, "--check", forged.id, "--json")
    assert checked.code == 4
    assert any("weight_packed" in name for name in checked.json["differing"])


def test_a_check_wants_the_model_it_was_made_from(
    llmopt: Llmopt, tiny: Path, make_checkpoint: Callable[..., Path]
) -> None:
    made = llmopt("quantize", tiny, "--method", "rtn", *SMALL[:2], "--json").json["artifact"]
    ran = llmopt("quantize", make_checkpoint("llama", seed=5), "--check", made)
    assert ran.code == 2
    assert "was not made from" in ran.error


@pytest.mark.parametrize("size", ["8 apples", "0", "-1GiB", "GiB"])
def test_a_budget_that_is_no_size_is_a_usage_error(llmopt: Llmopt, tiny: Path, size: str) -> None:
    ran = llmopt("quantize", tiny, "--memory-budget", size)
    assert ran.code == 2
    assert "--memory-budget 8GiB" in ran.error


def test_a_budget_too_small_for_a_block_is_refused_before_work(llmopt: Llmopt, tiny: Path) -> None:
    ran = llmopt("quantize", tiny, *SMALL, "--memory-budget", "50MB")
    assert ran.code == 1
    assert "one block of this model takes" in ran.error
    assert "`--memory-budget" in ran.error


def test_bits_are_chosen_to_the_target(llmopt: Llmopt, tiny: Path) -> None:
    made = llmopt("quantize", tiny, *SMALL, "--target-bpw", 5.2, "--json")
    assert made.code == 0, made.err
    assert 4.7 < made.json["metrics"]["bits_per_weight"] <= 5.2
    assert made.json["metrics"]["bits_per_weight"] == pytest.approx(made.json["metrics"]["choice"]["bpw"], abs=1e-3)
    reader = open_quantized(Checkpoint.open(Path(made.json["path"])))
    assert reader is not None
    bits = {scheme.bits for x in "qkvo" if (scheme := reader.scheme(f"model.layers.0.self_attn.{x}_proj")) is not None}
    told = {int(label[1]) for label in made.json["metrics"]["choice"]["schemes"].values() if label.startswith("W")}
    assert bits <= told


def test_a_target_that_nothing_meets_says_what_does(llmopt: Llmopt, tiny: Path) -> None:
    ran = llmopt("quantize", tiny, *SMALL, "--target-bpw", 2.1)
    assert ran.code == 2
    assert "here it lies between" in ran.error


def test_what_was_finished_is_gone_on_from_unless_told_not_to(
    llmopt: Llmopt, tiny: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = llmopt("quantize", tiny, *SMALL, "--json", "--store", store.parent / "other").json["artifact"]
    finish = driver.Driver._finish
    monkeypatch.setattr(driver.Driver, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert llmopt("quantize", tiny, *SMALL).code == 130
    assert list((store / "begun").rglob("model-00003-*"))
    monkeypatch.setattr(driver.Driver, "_finish", finish)
    ran = llmopt("quantize", tiny, *SMALL, "--json")
    assert "going on after block 2/2" in ran.err
    assert ran.json["artifact"] == whole
    assert not list((store / "begun").rglob("*.safetensors"))
    monkeypatch.setattr(driver.Driver, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert llmopt("quantize", tiny, *SMALL, "--seed", 1).code == 130
    monkeypatch.setattr(driver.Driver, "_finish", finish)
    ran = llmopt("quantize", tiny, *SMALL, "--seed", 1, "--no-resume", "--json")
    assert "going on" not in ran.err
    assert ran.code == 0


def test_bits_are_chosen_from_those_that_are_allowed(llmopt: Llmopt, tiny: Path) -> None:
    made = llmopt("quantize", tiny, *SMALL, "--target-bpw", 6, "--target-bits", "4,8", "--json")
    assert made.code == 0, made.err
    labels = {label.split()[0] for label in made.json["metrics"]["choice"]["schemes"].values()}
    assert labels <= {"W4", "W8", "plain"}
    assert len(labels) > 1
    ran = llmopt("quantize", tiny, "--target-bits", "4,8")
    assert ran.code == 2
    assert "`target_bpw`" in ran.error
