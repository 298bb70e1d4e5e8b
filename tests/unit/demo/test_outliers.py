"""demo/outliers.py: the same function, other activations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from llmopt.errors import LlmoptError

FACTOR = 32.0


@pytest.fixture(scope="module")
def outlier_model(outliers: ModuleType, model_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("outliers") / "model"
    return folder, outliers.add_outliers(model_folder, folder, channels=8, factor=FACTOR, seed=0)


def run(folder: Path):
    """(logits, input of the last block's q_proj) of a folder's model in float32 on fixed tokens."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    model.model.layers[-1].self_attn.q_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = model(torch.arange(4, 68)[None]).logits
    return logits, seen[0]


def test_a_power_of_two_changes_no_logit(outlier_model, model_folder: Path) -> None:
    (before, _), (after, _) = run(model_folder), run(outlier_model[0])
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


def test_another_factor_changes_logits_by_rounding_only(
    outliers: ModuleType, model_folder: Path, tmp_path: Path
) -> None:
    outliers.add_outliers(model_folder, tmp_path / "m", factor=30.0)
    (before, _), (after, _) = run(model_folder), run(tmp_path / "m")
    assert 0 < (after - before).abs().max() <= 0.02 * before.abs().max()


def test_the_chosen_channels_stand_out(outlier_model, model_folder: Path) -> None:
    folder, picked = outlier_model
    (_, before), (_, after) = run(model_folder), run(folder)
    assert len(picked) == 8
    assert (after[..., picked] / before[..., picked]).mean().item() == pytest.approx(FACTOR, rel=1e-4)
    rest = [c for c in range(256) if c not in picked]
    assert (after[..., rest] - before[..., rest]).abs().max() <= 1e-4
    assert after[..., picked].abs().mean() > 10 * after[..., rest].abs().mean()


def test_the_same_arguments_give_the_same_bytes(
    outliers: ModuleType, outlier_model, model_folder: Path, tmp_path: Path
) -> None:
    outliers.add_outliers(model_folder, tmp_path / "again")
    outliers.add_outliers(model_folder, tmp_path / "other", seed=1)
    first, again, other = (
        (folder / "model.safetensors").read_bytes()
        for folder in (outlier_model[0], tmp_path / "again", tmp_path / "other")
    )
    assert first == again
    assert first != other


def test_the_copy_carries_no_record_of_a_training(outlier_model, model_folder: Path) -> None:
    copied = {p.name for p in outlier_model[0].iterdir()}
    assert copied == {p.name for p in model_folder.iterdir()} - {"TRAINING.json"}


def test_bf16_rounds_to_the_nearest_and_ties_to_even(outliers: ModuleType, tmp_path: Path) -> None:
    import numpy as np
    import torch
    from safetensors.torch import save_file

    numbers = torch.cat([torch.linspace(-3, 3, 997), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])])
    save_file({"w": torch.zeros(len(numbers), dtype=torch.bfloat16)}, tmp_path / "w.safetensors")
    weights = outliers.Weights(tmp_path / "w.safetensors")
    weights.put("w", numbers.numpy())
    np.testing.assert_array_equal(weights.get("w"), numbers.bfloat16().float().numpy())


def test_a_folder_that_is_there_is_not_overwritten(outliers: ModuleType, model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LlmoptError, match="exists already"):
        outliers.add_outliers(model_folder, tmp_path)


def test_more_channels_than_there_are_is_an_error(outliers: ModuleType, model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LlmoptError, match="cannot choose 257 channels of 256"):
        outliers.add_outliers(model_folder, tmp_path / "m", channels=257)


def test_a_missing_folder_is_named_and_nothing_is_written(outliers: ModuleType, tmp_path: Path) -> None:
    script = outliers.__file__
    assert script is not None
    run = subprocess.run(
        [sys.executable, script, tmp_path / "nowhere", tmp_path / "m"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stderr.startswith(f"error: there is no *.safetensors in `{tmp_path / 'nowhere'}`\n\nhint: ")
    assert not list(tmp_path.iterdir())
