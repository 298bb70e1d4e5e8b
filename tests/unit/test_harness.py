"""What a model answers to lm-evaluation-harness, without that: tests/judges/test_lm_eval.py has it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmopt import backends, evaluate, harness
from llmopt.artifacts.outcome import silent
from llmopt.errors import BackendMissingError, LlmoptError, SettingsError
from llmopt.formats.reading import open_model
from llmopt.models.parallel import Workers
from llmopt.pipeline import inputs, stages

PAIRS = [([5, 6, 7, 8], [9]), ([5, 6, 7, 8], [10]), ([1, 2], [3, 4, 5, 6]), ([11] * 20, [12, 13]), ([300], [0])]


@contextmanager
def answerer(model: Path, said: list[dict[str, Any]] | None = None) -> Iterator[harness.Answerer]:
    def hear(line: str, /, **facts: Any) -> None:
        if said is not None:
            said.append({"line": line, **facts})

    with torch.no_grad(), Workers() as workers:
        yield evaluate.answerer(open_model(model), workers, hear)


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@torch.no_grad()
def expected(reference: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    logs = torch.log_softmax(reference(torch.tensor([context + continuation])).logits[0, :-1], dim=-1)
    logs, wanted = logs[-len(continuation) :], torch.tensor(continuation)
    return float(logs.gather(1, wanted[:, None]).sum()), bool((logs.argmax(-1) == wanted).all())


def test_loglikelihoods_are_those_of_transformers(tiny: Path, reference: Any) -> None:
    with answerer(tiny) as ours:
        found = ours.loglikelihoods(PAIRS)
    for (total, greedy), pair in zip(found, PAIRS, strict=True):
        assert (total, greedy) == (
            pytest.approx(expected(reference, *pair)[0], rel=1e-4),
            expected(reference, *pair)[1],
        )


def test_what_greedy_decoding_gives_is_told(tiny: Path, reference: Any) -> None:
    ids = torch.tensor([[5, 6, 7]])
    written = reference.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)[
        0, 3:
    ].tolist()
    pairs = [([5, 6, 7], written), ([5, 6, 7], [*written[:-1], written[-1] + 1])]
    with answerer(tiny) as ours:
        assert [greedy for _, greedy in ours.loglikelihoods(pairs)] == [True, False]
        contexts = [[5, 6, 7, *written[:number]] for number in range(4)]
        assert ours.next_tokens([*contexts, contexts[0]]) == [*written, written[0]]


def test_a_pass_holds_no_more_than_it_may_and_answers_stay(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, Any]] = []
    with answerer(tiny, said) as ours:
        together = ours.loglikelihoods(PAIRS)
        assert len(said) == 2  # one pass over two blocks
        assert "pass 1/1 over 4 inputs, block 1/2" in said[0]["line"]  # the first two ask after the same context
        monkeypatch.setattr(harness, "_PACK_ENTRIES", 21 * 128)
        widths = [len(pack) * len(pack[0]) for pack in ours._packs([tuple([1] * n) for n in (3, 21, 9, 9, 9, 1)])]
        assert widths == [21, 18, 18, 1]
        said.clear()
        apart = ours.loglikelihoods(PAIRS)
    assert [total for total, _ in apart] == pytest.approx([total for total, _ in together], rel=1e-5)
    assert [(step["done"], step["total"], step["block"]) for step in said] == [
        (1, 4, "model.layers.0"), (2, 4, "model.layers.1"), (3, 4, "model.layers.0"), (4, 4, "model.layers.1"),
    ]  # fmt: skip


def test_what_is_too_long_loses_its_beginning(make_checkpoint: Callable[..., Path]) -> None:
    model = make_checkpoint("llama", max_position_embeddings=8)
    long = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    with answerer(model) as ours:
        cut, whole = ours.loglikelihoods([(long, [8, 9]), (long[-7:], [8, 9])])
        assert cut == whole
        assert ours.next_tokens([long]) == ours.next_tokens([long[-8:]])


def test_figures_are_named_by_task_metric_and_filter() -> None:
    results = {
        "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.1},
        "arc": {"acc,none": 1, "acc_stderr,none": "N/A", "sample_len": 8},
    }
    assert harness.figures(results) == {
        "gsm8k/exact_match,strict-match": 0.5,
        "gsm8k/exact_match_stderr,strict-match": 0.1,
        "arc/acc": 1.0,
    }


def test_tokens_come_with_the_special_ones_unless_they_are_there(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    text = harness._Text.read(folder)
    assert (text.start, text.end, text.ends) == (0, 0, {0})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    named = {"bos_token": {"content": "a"}, "eos_token": "b"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    text = harness._Text.read(folder)
    a, b = (text.tokenizer.token_to_id(token) for token in "ab")
    assert (text.start, text.end, text.ends) == (a, b, {b, 7, 8, 0})
    assert text.decode(text.encode("the mapping")) == "the mapping"
    for file in ("generation_config.json", "tokenizer_config.json"):
        (folder / file).unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    with pytest.raises(LlmoptError, match="which token ends a text"):
        harness._Text.read(folder)


def test_tasks_without_the_extra_say_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    from llmopt.cli.app import main

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setenv("LLMOPT_STORE", str(tmp_path))
    assert main(["eval", str(tiny), "--tasks", "arc_easy"]) == 3
    assert capfd.readouterr().err == "error: `lm_eval` is not installed\n\nhint: pip install 'llmopt[lm-eval]'\n"
    with pytest.raises(BackendMissingError):
        evaluate.resolve({"tasks": ["arc_easy"]})


@pytest.mark.parametrize("settings", [{"limit": 3}, {"fewshot": 1}])
def test_settings_of_tasks_without_tasks_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(SettingsError, match=f"`{next(iter(settings))}` is for tasks"):
        evaluate.resolve(settings)


@pytest.mark.parametrize("settings", [{"limit": 0}, {"fewshot": -1}])
def test_settings_out_of_range_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(SettingsError, match="cannot be"):
        evaluate.resolve({"tasks": ["x"], **settings})


def test_a_folder_of_tasks_without_tasks_is_refused(tiny: Path, tmp_path: Path) -> None:
    model = inputs._folder(tiny)
    with pytest.raises(SettingsError, match="none is asked for"):
        stages.evaluate(model, None, {"tasks_path": str(tmp_path)})


def test_what_is_asked_is_in_the_key(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "require", lambda *_, **__: None)
    monkeypatch.setattr(harness, "DISTRIBUTIONS", ())
    model, folder = inputs._folder(tiny), tmp_path / "tasks"
    (folder / "data" / "__pycache__").mkdir(parents=True)
    (folder / "mine.yaml").write_text("task: mine\n")
    (folder / "data" / "x.jsonl").write_text("{}\n")

    def key(**settings: Any) -> str:
        return stages.evaluate(model, None, {"tasks": ["mine"], "tasks_path": str(folder), **settings}).action.key

    keys = [key(), key(limit=3), key(fewshot=1), key(tasks=["mine", "yours"])]
    (folder / "data" / "__pycache__" / "x.pyc").write_text("compiled")
    (folder / ".hidden").write_text("by an editor")
    assert key() == keys[0]
    (folder / "data" / "x.jsonl").write_text("{ }\n")
    assert len({*keys, key()}) == 5


def test_a_folder_of_tasks_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LlmoptError, match="no folder of tasks"):
        inputs.tasks(tmp_path / "nowhere")


def test_a_run_s_table_has_a_row_a_task() -> None:
    from llmopt.cli import summary

    metrics = {"perplexity": 4.0, "base_perplexity": 3.0, "arc/acc": 0.5, "arc/base_acc": 0.4, "arc/acc_stderr": 0.1}
    assert list(summary._evaluation(metrics, True))[1:] == [["arc/acc", "0.4000", "0.5000", "1.25"]]
    assert list(summary._evaluation({"perplexity": 4.0, "arc/acc": 0.5}, False))[1:] == [["arc/acc", "0.5000", "", ""]]


def test_silence_is_enough_of_a_progress(tiny: Path) -> None:
    with torch.no_grad(), Workers() as workers:
        ours = evaluate.answerer(open_model(tiny), workers, silent)
        assert ours.loglikelihoods([]) == []
        assert ours.loglikelihoods([([1], [])]) == [(0.0, True)]
