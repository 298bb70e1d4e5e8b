from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llmopt import profiles
from llmopt.artifacts.outcome import Json, Outcome, Progress, silent
from llmopt.artifacts.store import Store
from llmopt.errors import Exit, LlmoptError
from llmopt.pipeline import plan

WritePipeline = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> WritePipeline:
    def pipeline(text: str) -> str:
        file = tmp_path / "pipeline.yaml"
        file.write_text(text, encoding="utf-8")
        return str(file)

    return pipeline


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages that only write a file that depends on their settings; the names of those that did."""
    from llmopt import bench, compilers, evaluate, quantizers

    done: list[str] = []

    def instead(name: str, status: str = "complete") -> Callable[..., Outcome]:
        def work(*arguments: object, **_: object) -> Outcome:
            out = next(a for a in reversed(arguments) if isinstance(a, Path))
            done.append(name)
            (out / "result.json").write_text(f"{name} {[str(a) for a in arguments if not isinstance(a, Path)][:1]}")
            if name == "compile":
                (out / "engine.json").write_text("{}")
            return Outcome(status=status)

        return work

    monkeypatch.setattr(quantizers, "quantize", instead("quantize"))
    monkeypatch.setattr(compilers, "check", lambda model, settings: None)
    monkeypatch.setattr(compilers, "compile_model", instead("compile", "compiled"))
    monkeypatch.setattr(evaluate, "check", lambda *_, **__: None)
    monkeypatch.setattr(evaluate, "evaluate", instead("eval"))
    monkeypatch.setattr(bench, "check", lambda *_: None)
    monkeypatch.setattr(bench, "measure", instead("bench"))
    return done


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"))


SMALL = "quantize: {samples: 2, seq_len: 16}\ncompile:\neval: {windows: 2, seq_len: 16}\n"


def refused(reference: str, *overrides: str) -> LlmoptError:
    with pytest.raises(LlmoptError) as caught:
        plan.load(reference, overrides)
    return caught.value


def test_a_set_value_is_typed_as_yaml_and_wins(write: WritePipeline) -> None:
    file = write("model: m\nquantize:\n  bits: 4\n")
    assert plan.load(file, ["quantize.bits=3"]).sections["quantize"] == {"bits": 3}


def test_a_set_value_can_add_a_section(write: WritePipeline) -> None:
    file = write("model: m\nquantize:\n")
    assert plan.load(file, ["eval.windows=3"]).sections["eval"] == {"windows": 3}


def test_the_later_of_two_sets_wins(write: WritePipeline) -> None:
    file = write("model: m\nquantize:\n")
    assert plan.load(file, ["quantize.bits=3", "quantize.bits=8"]).sections["quantize"] == {"bits": 8}


def test_a_set_model_is_relative_to_the_current_folder(write: WritePipeline) -> None:
    assert plan.load(write("quantize:\n"), ["model=demo/model"]).model == "demo/model"


@pytest.mark.parametrize("override", ["quantize", "quantize=4", "quantize.=4", "=4", "bits=4", "quantise.bits=4"])
def test_a_set_that_names_no_setting_is_an_error(write: WritePipeline, override: str) -> None:
    error = refused(write("model: m\nquantize:\n"), override)
    assert error.code == Exit.USAGE
    assert override.partition("=")[0] in error.message
    assert error.hint


def test_a_misspelt_setting_is_an_error_with_its_file_and_line(write: WritePipeline) -> None:
    error = refused(write("model: m\nquantize:\n  method: gptq\n  bitz: 4\n"))
    assert error.message == "pipeline.yaml:4: the method `gptq` has no setting `bitz`"
    assert error.hint == "did you mean `bits`?"


def test_a_misspelt_setting_in_a_set_is_told_as_such(write: WritePipeline) -> None:
    assert refused(write("model: m\neval:\n"), "eval.window=3").message.startswith("--set eval.window: ")


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ("quantize", "bits: 9"),
        ("quantize", "method: gtpq"),
        ("quantize", "bits: four"),
        ("compile", "target: openvine"),
        ("compile", "aot: 3"),
        ("eval", "windows: 0"),
        ("bench", "concurrency: [0]"),
        ("bench", "against: nobody"),
    ],
)
def test_every_section_is_checked_before_anything_is_done(write: WritePipeline, section: str, text: str) -> None:
    error = refused(
        write(f"model: m\ncompile: {{}}\n{section}:\n  {text}\n".replace("compile: {}\ncompile", "compile"))
    )
    assert error.code == Exit.USAGE
    assert "pipeline.yaml:" in error.message
    assert error.hint


def test_a_pipeline_without_a_model_says_how_to_give_one(write: WritePipeline) -> None:
    assert "--set model=" in str(refused(write("quantize:\n")).hint)


def test_a_pipeline_without_a_stage_is_an_error(write: WritePipeline) -> None:
    assert refused(write("model: m\n")).code == Exit.USAGE


def test_an_override_reaches_into_a_mapping(write: WritePipeline) -> None:
    file = write("model: m\ncompile: {target: tensorrt-llm, mode: engine, build: {workers: 1}}\n")
    found = plan.load(file, ["compile.build.gemm_plugin=auto"]).sections["compile"]
    assert found["build"] == {"workers": 1, "gemm_plugin": "auto"}
    assert "`--set compile.build.=1` is not" in refused(file, "compile.build.=1").message


def test_a_bench_needs_something_that_compiles(write: WritePipeline) -> None:
    assert "compile" in str(refused(write("model: m\nbench:\n")).hint)


def test_a_comparison_with_the_base_needs_a_quantized_model(write: WritePipeline) -> None:
    assert "quantize" in str(refused(write("model: m\ncompile:\nbench: {against: base}\n")).hint)


def test_a_dry_run_does_no_work_and_knows_what_it_cannot_know(
    write: WritePipeline, tiny: Path, store: Store, no_work: list[str]
) -> None:
    pipeline = plan.load(write(SMALL), [f"model={tiny}"])
    run = plan.run(store, pipeline, silent, dry_run=True)
    assert no_work == []
    assert not store.root.exists()
    calibrate, quantize, compile_, evaluate = run.steps
    assert calibrate.key is not None
    assert calibrate.result is None
    assert (quantize.key, quantize.waits_for) == (None, "calibrate")
    assert (compile_.key, compile_.waits_for) == (None, "quantize")
    assert (evaluate.key, evaluate.waits_for) == (None, "quantize")


def test_a_dry_run_after_the_run_finds_everything_under_the_same_keys(
    write: WritePipeline, tiny: Path, store: Store, no_work: list[str]
) -> None:
    pipeline = plan.load(write(SMALL), [f"model={tiny}"])
    done = plan.run(store, pipeline, silent)
    assert no_work == ["quantize", "compile", "eval"]
    again = plan.run(store, pipeline, silent, dry_run=True)
    assert [step.key for step in again.steps] == [step.key for step in done.steps]
    assert all(step.result is not None and step.result.cached for step in again.steps)


def test_a_dry_run_checks_the_model_too(write: WritePipeline, tiny: Path, store: Store) -> None:
    pipeline = plan.load(write("quantize: {seq_len: 100000}\n"), [f"model={tiny}"])
    with pytest.raises(LlmoptError, match="positions"):
        plan.run(store, pipeline, silent, dry_run=True)


def test_only_what_a_change_touches_is_done_again(
    write: WritePipeline, tiny: Path, store: Store, no_work: list[str]
) -> None:
    file = write(SMALL)
    plan.run(store, plan.load(file, [f"model={tiny}"]), silent)
    no_work.clear()
    plan.run(store, plan.load(file, [f"model={tiny}", "eval.windows=3"]), silent)
    assert no_work == ["eval"]


def test_a_miss_is_explained_by_what_differs(
    write: WritePipeline, tiny: Path, store: Store, no_work: list[str]
) -> None:
    file = write(SMALL)
    plan.run(store, plan.load(file, [f"model={tiny}"]), silent)
    run = plan.run(store, plan.load(file, [f"model={tiny}", "quantize.bits=3"]), silent, dry_run=True, why=True)
    quantize = run.step("quantize")
    assert quantize is not None
    assert quantize.differs == ("settings.bits: 4 -> 3",)
    assert quantize.to_json()["differs"] == ["settings.bits: 4 -> 3"]


def test_the_base_is_compiled_for_a_comparison(
    write: WritePipeline, tiny: Path, store: Store, no_work: list[str]
) -> None:
    pipeline = plan.load(write(SMALL + "bench: {against: base}\n"), [f"model={tiny}"])
    assert pipeline.steps == ("quantize", "compile", "compile-base", "eval", "bench")
    run = plan.run(store, pipeline, silent)
    assert [step.name for step in run.steps] == ["calibrate", *pipeline.steps]
    bench, base = run.step("bench"), run.step("compile-base")
    assert bench is not None
    assert base is not None
    assert base.result is not None
    assert bench.op == "bench"


def test_progress_names_the_stage_that_speaks(
    write: WritePipeline, tiny: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmopt import quantizers

    def work(
        model: Path, settings: object, ids: Path, out: Path, progress: Progress, *_: object, **__: object
    ) -> Outcome:
        progress("block 1/2", done=1)
        (out / "x").touch()
        return Outcome()

    monkeypatch.setattr(quantizers, "quantize", work)
    said: list[tuple[str, dict[str, Json]]] = []

    def hear(line: str, /, **facts: Json) -> None:
        said.append((line, facts))

    plan.run(store, plan.load(write("quantize: {samples: 2, seq_len: 16}\n"), [f"model={tiny}"]), hear)
    assert said == [
        ("calibrate: 2 windows of 16 tokens", {"step": "calibrate"}),
        ("quantize: block 1/2", {"step": "quantize", "done": 1}),
    ]


@pytest.mark.parametrize("name", profiles.shipped())
def test_every_shipped_profile_is_a_valid_pipeline(name: str) -> None:
    assert plan.load(name, ["model=m"]).steps
