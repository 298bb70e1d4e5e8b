"""A target in stages: planned and prepared here, built where a GPU is. What builds is a stand-in, no engine is made."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmopt.artifacts.outcome import silent
from llmopt.artifacts.store import Store
from llmopt.compilers.trt_llm import build, checkpoint, gpu
from llmopt.compilers.trt_llm.builder import Builder
from llmopt.compilers.trt_llm.validate import validate
from llmopt.errors import BackendMissingError, CorruptError, LlmoptError, SettingsError
from llmopt.pipeline import inputs, plan, stages
from llmopt.pipeline.lineage import lineage

ENGINE = {"target": "tensorrt-llm", "mode": "engine", "gpu": "H100"}
BUILD = """
import json, pathlib, sys
said = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = pathlib.Path(said["--output_dir"])
(out / "rank0.engine").write_text("no engine")
config = json.loads((pathlib.Path(said["--checkpoint_dir"]) / "config.json").read_text())
(out / "config.json").write_text(json.dumps({"version": "1.2.1", "pretrained_config": config}))
pathlib.Path(said["--output_timing_cache"]).write_text("timed")
print("built it")
"""


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    """A machine with one H100, and an environment that says it has TensorRT-LLM 1.2.1."""
    folder, site = tmp_path / "machine", tmp_path / "machine" / "site"
    for name, version in (("tensorrt_llm", "1.2.1"), ("tensorrt", "10.13.3")):
        info = site / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "bin").mkdir()
    smi = "#!/bin/sh\necho '0, GPU-0, NVIDIA H100 80GB HBM3, 81559, 570.86.15, 9.0'\n"
    python = f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} "$@"\n'
    for name, text in (
        ("nvidia-smi", smi),
        ("python", python),
        ("trtllm-build", f"#!{sys.executable}\n{BUILD}"),
    ):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return Builder.parse(str(folder / "bin" / "python"))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "probe", lambda: gpu.Probe((), ("`nvidia-smi` is not installed",)))


@pytest.fixture
def prepare(store: Store, tiny: Path) -> Callable[..., Any]:
    def make(**settings: Any) -> Any:
        model = inputs.model(store, str(tiny))
        return plan.compile_model(store, model, ENGINE | settings, silent)

    return make


def test_what_is_prepared_is_found_again_and_is_the_same_on_every_machine(prepare: Any, store: Store) -> None:
    made = prepare()
    assert (made.kind, made.status, made.cached) == ("engine", "prepared", False)
    again = prepare()
    assert (again.artifact, again.cached) == (made.artifact, True)
    action = store.get(made.artifact).action
    assert action is not None
    assert action.target == {}
    assert set(action.inputs) == {"model", "plan"}
    planned = store.get(action.inputs["plan"])
    assert planned.kind == "plan"
    assert json.loads((Path(made.path) / "plan.json").read_text())["architecture"] == "sm_90"


def test_a_build_records_what_it_was_built_with(prepare: Any, store: Store, builder: Builder) -> None:
    prepared = prepare()
    built = plan.build_engine(store, inputs.product(prepared), builder, silent)
    assert (built.kind, built.status) == ("engine", "compiled")
    files = {entry.path for entry in store.get(built.artifact).files}
    assert {"engine/rank0.engine", "engine/config.json", "timing.cache", "serve.sh", "tokenizer.json"} <= files
    assert not any(file.startswith("checkpoint/") for file in files)
    action = store.get(built.artifact).action
    assert action is not None
    assert action.target == {"gpu": "NVIDIA H100 80GB HBM3", "arch": "sm_90", "driver": "570.86.15"}
    assert action.deps["tensorrt_llm"] == "1.2.1"
    said = json.loads((Path(built.path) / "engine.json").read_text())
    assert (said["status"], said["driver"], said["versions"]["tensorrt"]) == ("compiled", "570.86.15", "10.13.3")
    assert [each["kind"] for each in lineage(store, built.artifact)] == ["engine", "engine", "model"]
    assert plan.build_engine(store, inputs.product(prepared), builder, silent).cached


def test_a_timing_cache_to_begin_with_is_an_input(prepare: Any, store: Store, builder: Builder, tmp_path: Path) -> None:
    prepared = inputs.product(prepare())
    (tmp_path / "earlier").write_text("timings")
    keys = {
        stages.compile_build(prepared, dataclasses.replace(builder, timing_cache=cache)).action.key
        for cache in (None, tmp_path / "earlier")
    }
    assert len(keys) == 2
    with pytest.raises(LlmoptError, match="no timing cache at"):
        stages.compile_build(prepared, dataclasses.replace(builder, timing_cache=tmp_path / "none"))


def test_the_log_is_kept_beside_the_engine_and_not_in_it(prepare: Any, store: Store, builder: Builder) -> None:
    built = plan.build_engine(store, inputs.product(prepare()), builder, silent)
    (statement,) = store.attestations(built.artifact)
    (log,) = statement["predicate"]["runDetails"]["byproducts"]  # type: ignore[index,call-overload]
    assert "built it" in base64.b64decode(log["content"]).decode()
    assert not any("log" in entry.path for entry in store.get(built.artifact).files)


def test_a_copy_in_another_store_is_the_same_action(
    prepare: Any, store: Store, builder: Builder, tmp_path: Path
) -> None:
    prepared = prepare()
    here = stages.compile_build(inputs.product(prepared), builder).action.key
    store.export(prepared.artifact, tmp_path / "copied")
    other = Store.open(str(tmp_path / "other"))
    copied = inputs.resolve(other, str(tmp_path / "copied"))
    assert stages.compile_build(copied, builder).action.key == here
    assert plan.build_engine(other, copied, builder, silent).status == "compiled"


def test_a_damaged_copy_is_not_built(prepare: Any, store: Store, tmp_path: Path) -> None:
    store.export(prepare().artifact, tmp_path / "copied")
    weights = tmp_path / "copied" / "checkpoint" / "rank0.safetensors"
    weights.chmod(0o644)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(LlmoptError, match=r"rank0\.safetensors` is not the file"):
        inputs.resolve(store, str(tmp_path / "copied"))


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_nothing_is_built(prepare: Any, store: Store, builder: Builder) -> None:
    with pytest.raises(BackendMissingError, match="no NVIDIA GPU") as caught:
        plan.build_engine(store, inputs.product(prepare()), builder, silent)
    assert caught.value.hint is not None


@pytest.mark.usefixtures("no_gpu")
def test_what_was_prepared_is_kept_and_told_where_the_builder_has_no_gpu(
    store: Store, tiny: Path, builder: Builder, tmp_path: Path
) -> None:
    said: list[str] = []

    def progress(line: str, **facts: Any) -> None:
        said.append(line)

    made = plan.compile_model(store, inputs.model(store, str(tiny)), ENGINE, progress, builder=builder)
    assert made.status == "prepared"
    assert said[-1].startswith("not built: no NVIDIA GPU")
    file = tmp_path / "pipeline.yaml"
    file.write_text(f"model: {tiny}\ncompile: {json.dumps(ENGINE)}\nbench: {{concurrency: [1]}}\n")
    ran = plan.run(store, plan.load(str(file)), progress, builder=builder)
    assert [step.name for step in ran.steps] == ["compile-plan", "compile", "bench"]
    assert ran.steps[-1].waits_for == "compile-build"
    assert said[-1].startswith("compile: not built")


def test_another_architecture_is_refused(prepare: Any, store: Store, builder: Builder) -> None:
    with pytest.raises(BackendMissingError, match="prepared for `sm_89`"):
        plan.build_engine(store, inputs.product(prepare(gpu="L4")), builder, silent)


def test_a_pipeline_builds_only_with_a_builder_and_measures_nothing_that_is_not_built(
    store: Store, tiny: Path, builder: Builder, tmp_path: Path
) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(f"model: {tiny}\ncompile: {json.dumps(ENGINE)}\nbench: {{concurrency: [1]}}\n")
    ran = plan.run(store, plan.load(str(file)), silent)
    assert [(step.name, step.waits_for) for step in ran.steps] == [
        ("compile-plan", None),
        ("compile", None),
        ("bench", "compile-build"),
    ]
    file.write_text(f"model: {tiny}\ncompile: {json.dumps(ENGINE)}\n")
    ran = plan.run(store, plan.load(str(file)), silent, builder=builder)
    assert [step.name for step in ran.steps] == ["compile-plan", "compile", "compile-build"]
    assert ran.steps[-1].result is not None
    assert ran.steps[-1].result.status == "compiled"


def test_a_dry_run_prepares_nothing(store: Store, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(f"model: {tiny}\ncompile: {json.dumps(ENGINE)}\n")
    ran = plan.run(store, plan.load(str(file)), silent, dry_run=True)
    assert [(step.name, step.result, step.waits_for) for step in ran.steps] == [
        ("compile-plan", None, None),
        ("compile", None, "compile-plan"),
    ]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_seq_len": 4096}, LlmoptError, "over the 256 positions"),
        ({"tensor_parallel": 3}, SettingsError, "do not divide 4 attention heads"),
        ({"max_num_tokens": 1 << 30}, LlmoptError, "do not fit into the 80 GB of `H100`"),
        ({"emit": ["lmi"], "url": "s3://b/p"}, SettingsError, "no LMI container has TensorRT-LLM 1.2.1"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    prepare: Any, store: Store, settings: dict[str, Any], error: type[LlmoptError], message: str
) -> None:
    with pytest.raises(error, match=message):
        prepare(**settings)
    assert not (store.root / "manifests").exists()


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    prepare: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(store.root.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    monkeypatch.setattr(checkpoint, "write", lambda *_: pytest.fail("it was written to"))
    with pytest.raises(LlmoptError, match="too little space on the disk of the store"):
        prepare()
    assert not list((store.root / "tmp").iterdir())


def test_what_else_lies_in_a_copy_is_no_part_of_the_engine(
    prepare: Any, store: Store, builder: Builder, tmp_path: Path
) -> None:
    """`build.sh` leaves an engine of its own there; the action's key knows nothing of it."""
    prepared = prepare()
    store.export(prepared.artifact, tmp_path / "copied")
    (tmp_path / "copied" / "engine").mkdir()
    (tmp_path / "copied" / "engine" / "rank0.engine").write_text("another")
    (tmp_path / "copied" / "timing.cache").write_text("another")
    (tmp_path / "copied" / "notes").write_text("mine")
    own = plan.build_engine(store, inputs.product(prepared), builder, silent)
    other = Store.open(str(tmp_path / "other"))
    built = plan.build_engine(other, inputs.resolve(other, str(tmp_path / "copied")), builder, silent)
    assert built.artifact == own.artifact


def test_only_what_has_weights_can_be_validated(prepare: Any, store: Store, builder: Builder, tmp_path: Path) -> None:
    prepared = prepare()
    built = plan.build_engine(store, inputs.product(prepared), builder, silent)
    with pytest.raises(LlmoptError, match="is built: the weights are in its engines"):
        validate(Path(built.path))
    store.export(prepared.artifact, tmp_path / "copied")
    shutil.rmtree(tmp_path / "copied" / "checkpoint")
    with pytest.raises(CorruptError, match="has no `checkpoint/`"):
        validate(tmp_path / "copied")


def test_an_engine_is_no_prepared_artifact(store: Store, tiny: Path, builder: Builder, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "engine")
    (tmp_path / "engine" / "engine.json").write_text('{"schema": "llmopt.engine/1", "target": "openvino"}')
    with pytest.raises(LlmoptError, match="not prepared for TensorRT-LLM"):
        stages.compile_build(inputs.resolve(store, str(tmp_path / "engine")), builder)
    with pytest.raises(SettingsError, match="takes an engine"):
        stages.compile_build(inputs.resolve(store, str(tiny)), builder)
