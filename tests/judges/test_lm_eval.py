"""lm-evaluation-harness itself judges our adapter to it: its own Hugging Face backend must come to the same figures."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'llmopt[lm-eval]'")

from llmopt import evaluate, quantizers  # noqa: E402
from llmopt.artifacts.outcome import silent  # noqa: E402
from llmopt.errors import LlmoptError, SettingsError  # noqa: E402

pytestmark = [pytest.mark.judge, pytest.mark.filterwarnings("default")]

MODEL = Path(__file__).parents[2] / "demo" / "model"
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "likely": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}{{choices[answer]}}" * 12,
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "chrf"}, {"metric": "exact_match"}],
    },
}
QUESTIONS = [
    ("The `for` statement is used to iterate over the elements of a", [" sequence", " banana", " shark", " cloud"], 0),
    ("If the class has no attribute of that name, an", [" umbrella", " AttributeError", " orange"], 1),
    ("The `import` statement binds a name in the local", [" weather", " kitchen", " namespace"], 2),
    ("A mapping object maps hashable", [" values", " rivers", " to", " apples"], 0),
    ("def __init__(self", [", name", " the", "\n\n\n"], 0),
    ("", ["The", " zq", "import"], 2),
    ("return self._", ["name", "42", "'''"], 0),
    ("The string is", [" split", " green", " eaten"], 0),
]


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield
    logging.getLogger("lm_eval").setLevel(logging.WARNING)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of one's own, each with its data beside it and named by a relative path."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps({"question": q, "choices": c, "answer": a}) for q, c, a in QUESTIONS]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    # its own backend takes an empty prompt for padding, and writes on from that
    (folder / "begun.jsonl").write_text("\n".join(line for line in lines if '"question": ""' not in line) + "\n")
    for name, about in TASKS.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": "begun.jsonl" if name == "written" else "questions.jsonl"}},
            "test_split": "test",
            "fewshot_split": "test",
            "metadata": {"version": 1.0},
            **about,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    def run(model: Path = MODEL, base: Path | None = None, **settings: Any) -> dict[str, Any]:
        resolved = evaluate.resolve({"windows": 1, "seq_len": 64, **settings})
        out = tmp_path_factory.mktemp("out")
        evaluate.check(model, base, TEXT, resolved, tasks=folder)
        outcome = evaluate.evaluate(model, base, TEXT, resolved, out, silent, tasks=folder)
        assert json.loads((out / "eval.json").read_text()) == outcome.metrics
        return dict(outcome.metrics)

    return run


TEXT = Path(__file__).parents[2] / "llmopt" / "profiles" / "text" / "heldout.txt"


def theirs(model: Path, folder: Path, tasks: list[str], **settings: Any) -> dict[str, float]:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DISABLE_MULTIPROC", "1")
        hf = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=3)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        found = lm_eval.simple_evaluate(hf, tasks=tasks, task_manager=manager, bootstrap_iters=1000, **settings)
    return {
        f"{task}/{key.partition(',')[0]}": value
        for task, values in found["results"].items()
        for key, value in values.items()
        if "," in key and isinstance(value, float)
    }


@pytest.mark.parametrize("settings", [{}, {"fewshot": 2}, {"limit": 5}], ids=str)
def test_figures_are_those_of_its_own_backend(
    folder: Path, ours: Callable[..., dict[str, Any]], settings: dict[str, int]
) -> None:
    tasks = ["choice"] if "fewshot" in settings else list(TASKS)
    got = ours(tasks=tasks, **settings)
    renamed = {{"fewshot": "num_fewshot"}.get(key, key): value for key, value in settings.items()}
    expected = theirs(MODEL, folder, tasks, **renamed)
    assert len(expected) >= 2 * len(tasks)
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq"])
def test_every_format_is_asked_and_the_base_beside_it(
    ours: Callable[..., dict[str, Any]], tmp_path: Path, format: str
) -> None:
    settings = quantizers.resolve({"method": "rtn", "bits": 4, "group_size": 32, "symmetric": False, "format": format})
    quantizers.quantize(MODEL, settings, None, tmp_path, silent)
    got = ours(tmp_path, MODEL, tasks=["likely"])
    assert got["likely/base_perplexity"] == ours(tasks=["likely"])["likely/perplexity"]
    assert got["likely/perplexity"] != got["likely/base_perplexity"]
    assert got["likely/perplexity"] == pytest.approx(got["likely/base_perplexity"], rel=0.5)
    assert got["kl_mean"] > 0


def test_a_task_that_there_is_not_is_an_error_with_the_nearest(ours: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(SettingsError, match="no task `choise`") as caught:
        ours(tasks=["choice", "choise"])
    assert caught.value.hint is not None


def test_data_that_is_not_there_is_an_error(folder: Path, ours: Callable[..., dict[str, Any]]) -> None:
    broken = json.loads((folder / "choice.yaml").read_text())
    broken["task"], broken["dataset_kwargs"] = "lost", {"data_files": {"test": "nowhere.jsonl"}}
    (folder / "lost.yaml").write_text(json.dumps(broken))
    from llmopt import harness

    harness._index.cache_clear()
    with pytest.raises(LlmoptError, match="the tasks `lost` cannot be loaded"):
        ours(tasks=["lost"])


def test_stdout_is_the_result_s_alone(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmopt.cli.app import main

    monkeypatch.setenv("LLMOPT_STORE", str(tmp_path))
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.chdir(folder.parent)
    command = [
        "eval", str(MODEL), "--windows", "1", "--seq-len", "32", "--tasks", "choice,likely", "--tasks-path",
        folder.name, "--limit", "2", "--json-lines",
    ]  # fmt: skip
    assert main(command) == 0
    out, err = capfd.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    assert "it/s" not in err
    assert [event["event"] for event in events[-2:]] == ["progress", "result"]
    assert 0 <= events[-1]["metrics"]["choice/acc"] <= 1
    assert main(command) == 0
    assert json.loads(capfd.readouterr().out)["cached"] is True
    (folder / "questions.jsonl").write_text((folder / "questions.jsonl").read_text() + "\n")
    assert main([*command, "--quiet"]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["cached"] is False
    assert os.environ.get("DISABLE_MULTIPROC") is None
