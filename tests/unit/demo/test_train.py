"""demo/train.py on a corpus of a few kilobytes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def mini_corpus(corpus: ModuleType, text_folder: Path):
    text = (text_folder / "heldout.txt").read_text("utf-8")
    documents = (corpus.Document("lib/a.py", text[:6000]), corpus.Document("chat/a.py", "<|user|>\nWhy?"))
    return corpus.Corpus(documents, "", text[6000:10000])


@pytest.fixture
def mini_recipe(train: ModuleType):
    return train.Recipe(steps=3, tokens_per_step=128, short_window=64, long_share=0.34, threads=1)


@pytest.fixture(autouse=True)
def _torch_as_it_was():
    import torch

    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(threads)


def silent(line: str) -> None:
    pass


def test_two_trainings_give_the_same_bytes(train: ModuleType, mini_corpus, mini_recipe, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        train.train(mini_corpus, mini_recipe, "cpu", folder, silent)
    one, two = ({p.name: p.read_bytes() for p in folder.iterdir() if p.name != "TRAINING.json"} for folder in folders)
    assert one == two
    assert "model.safetensors" in one


def test_another_seed_gives_other_weights(train: ModuleType, mini_corpus, mini_recipe, tmp_path: Path) -> None:
    shas = set()
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        record = train.train(mini_corpus, dataclasses.replace(mini_recipe, seed=seed), "cpu", folder, silent)
        shas.add(record["model_safetensors_sha256"])
    assert len(shas) == 2


def test_the_rate_warms_up_and_falls_to_zero(train: ModuleType) -> None:
    recipe = train.Recipe()
    rates = [recipe.rate(step) for step in range(recipe.steps)]
    assert max(rates) == pytest.approx(recipe.learning_rate, rel=0.01)
    assert rates.index(max(rates)) <= recipe.warmup_steps
    assert rates[0] < 0.01 * max(rates)
    assert rates[-1] < 1e-6 * max(rates)


def test_the_last_steps_see_the_whole_context(train: ModuleType) -> None:
    recipe = train.Recipe()
    assert recipe.window(0) == recipe.short_window
    assert recipe.window(recipe.steps - 1) == 1024


def test_a_new_model_replaces_the_old_folder(train: ModuleType, tmp_path: Path) -> None:
    old, new = tmp_path / "model", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / folder.name).touch()
    train.replace_folder(new, old)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert [p.name for p in old.iterdir()] == ["new"]
