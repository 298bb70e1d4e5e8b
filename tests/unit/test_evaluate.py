from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmopt import evaluate
from llmopt.artifacts.outcome import silent
from llmopt.errors import LlmoptError, SettingsError
from llmopt.models.text import read_tokens

SETTINGS = evaluate.resolve({"windows": 4, "seq_len": 40})


def run(model: Path, base: Path | None, text: Path, out: Path) -> dict[str, float]:
    return dict(evaluate.evaluate(model, base, text, SETTINGS, out, silent).metrics)  # type: ignore[arg-type]


@torch.no_grad()
def test_figures_are_those_of_transformers(make_checkpoint: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    one, two = make_checkpoint("llama", seed=1), make_checkpoint("llama", seed=2)
    got = run(one, two, text, tmp_path)
    ids = torch.from_numpy(read_tokens(one, text)[: 4 * 40].reshape(4, 40))
    models = [AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in (one, two)]
    own, base = (torch.log_softmax(m(ids).logits[:, :-1], dim=-1) for m in models)
    losses = [-log.gather(2, ids[:, 1:, None]).mean() for log in (own, base)]
    expected = {
        "tokens": 4 * 39,
        "perplexity": math.exp(losses[0]),
        "base_perplexity": math.exp(losses[1]),
        "kl_mean": float((base.exp() * (base - own)).sum(-1).mean()),
        "top1_agreement": float((own.argmax(-1) == base.argmax(-1)).float().mean()),
    }
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_a_model_does_not_differ_from_itself(tiny: Path, text: Path, tmp_path: Path) -> None:
    got = run(tiny, tiny, text, tmp_path)
    assert (got["kl_mean"], got["top1_agreement"]) == (0.0, 1.0)
    assert json.loads((tmp_path / "eval.json").read_text()) == got


def test_figures_do_not_depend_on_the_number_of_cores(
    make_checkpoint: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, found = make_checkpoint("llama", seed=1), make_checkpoint("llama", seed=2), []
    for cores in (1, 2, 3):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cores: set(range(n)))
        run(one, two, text, tmp_path)
        found.append((tmp_path / "eval.json").read_bytes())
    assert len(set(found)) == 1


def test_without_a_base_there_is_perplexity_only(tiny: Path, text: Path, tmp_path: Path) -> None:
    assert set(run(tiny, None, text, tmp_path)) == {"tokens", "perplexity"}


def test_another_vocabulary_is_no_base(tiny: Path, make_checkpoint: Callable[..., Path], text: Path) -> None:
    with pytest.raises(LlmoptError, match="320 tokens and its base 384"):
        evaluate.check(tiny, make_checkpoint("llama", vocab_size=384), text, SETTINGS)


def test_a_short_text_is_an_error(tiny: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(LlmoptError, match="evaluation text is too short"):
        evaluate.check(tiny, None, short, SETTINGS)


def test_text_that_is_not_utf8_is_an_error(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"caf\xe9")
    with pytest.raises(LlmoptError, match="not UTF-8"):
        evaluate.check(tiny, None, file, SETTINGS)


def test_no_windows_are_refused() -> None:
    with pytest.raises(SettingsError):
        evaluate.resolve({"windows": 0})
