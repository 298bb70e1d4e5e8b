"""Action keys as properties: each thing that may change a result changes its key, and nothing else does.

Through the functions that make the stages, with what they look at (machine, versions, code) put in place of.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmopt import bench, calibrate, compilers, evaluate, quantizers
from llmopt.artifacts.licenses import Stated
from llmopt.artifacts.manifest import Action
from llmopt.artifacts.store import Store
from llmopt.pipeline import inputs, machine, provenance, stages
from llmopt.pipeline.inputs import Input

REPOSITORY = Path(__file__).resolve().parents[3]
OPS = (
    "quantize",
    "calibrate",
    "compile-openvino",
    "compile-tensorrt-llm",
    "compile-tensorrt-llm-plan",
    "compile-vllm",
    "eval",
    "bench",
    "bench-import",
)
#: The settings that each recipe starts from, where not all are defaults.
GIVEN: Mapping[str, Mapping[str, Any]] = {
    "compile-openvino": {"target": "openvino"},
    "compile-tensorrt-llm": {"target": "tensorrt-llm"},
    "compile-tensorrt-llm-plan": {"target": "tensorrt-llm"},
    "compile-vllm": {"target": "vllm"},
}
TRT = {
    "version": ["1.2.0"],
    "mode": ["bundle"],
    "dtype": ["float16", "bfloat16"],
    "gpu": ["H100", "A100"],
    "tensor_parallel": [2, 4],
    "pipeline_parallel": [2],
    "max_batch_size": [8, 9],
    "max_seq_len": [256],
    "max_num_tokens": [4096],
    "emit": [["triton"], ["k8s"], ["triton", "k8s"]],
    "url": ["s3://bucket/x"],
    "served_name": ["mine"],
    "loading_timeout_s": [60],
    "trust_remote_code": [True],
    "serve": [{"enable_chunked_prefill": True}],
}
#: Per operation, settings with values that are not the default.
SETTINGS: Mapping[str, Mapping[str, list[Any]]] = {
    "quantize": {
        "bits": [3, 8],
        "group_size": [32, 64, -1],
        "symmetric": [False],
        "act_order": [False],
        "damping": [0.02, 0.05],
        "compensate": [False],
        "sweeps": [0, 1],
        "scaling": ["awq"],
        "format": ["gptq", "awq"],
        "samples": [8, 9],
        "seq_len": [32, 64],
        "seed": [1, 2],
        "lm_head": [True],
        "precision": ["float32"],
        "kv_cache": ["fp8", "int8"],
        "target_bpw": [4.5, 5.0],
        "overrides": [{"*.down_proj": {"bits": 8}}, {"*.down_proj": {"skip": True}}],
        "method": ["awq", "rtn", "smoothquant", "fp8"],
    },
    "calibrate": {"samples": [8, 9], "seq_len": [32, 64], "seed": [1, 2]},
    "compile-openvino": {
        "aot": [False],
        "lm_head": ["int8", "keep"],
        "activation_group": [0, 32],
        "precision": ["f32", "bf16"],
        "kv_cache": ["f32", "u8"],
    },
    "compile-tensorrt-llm": TRT,
    "compile-tensorrt-llm-plan": TRT,
    "compile-vllm": {
        "version": ["0.31.0"],
        "dtype": ["float16"],
        "kv_cache": ["fp8"],
        "tensor_parallel": [2],
        "max_batch_size": [8],
        "max_seq_len": [128],
        "serve": [{"seed": 1}, {"seed": 2}, {"enforce-eager": True}],
        "served_name": ["mine"],
    },
    "eval": {"windows": [1, 2], "seq_len": [32, 33]},
    "bench": {
        "concurrency": [[1], [1, 8]],
        "rate": [[2.0], [3.0]],
        "requests": [40],
        "duration_s": [5.0],
        "warmup": [0],
        "rounds": [3],
        "seed": [1],
        "endpoint": ["chat"],
        "timeout_s": [5.0],
        "slo": [["ttft_ms_p99<=200"], ["ttft_ms_p99<=300"]],
        "workload": [{"prompt_tokens": 16}, {"prompt_tokens": 17}],
    },
    "bench-import": {"margin": [0.1], "alpha": [0.1], "slo": [["ttft_ms_p99<=200"]]},
}


def an_id(digit: str) -> str:
    return "sha256:" + digit * 64


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a stage is told: changes of one thing are made with `dataclasses.replace`."""

    op: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, Input] = field(default_factory=dict)

    def key(self) -> str:
        return self.action().key

    def action(self) -> Action:
        given = dict(self.inputs)
        model = given.pop("model", None)
        if self.op.startswith("bench"):
            if self.op == "bench":
                return stages.bench({"candidate": "http://127.0.0.1:1"}, self.settings, tokenizer=model, **given).action
            assert model is not None
            return stages.import_bench([model], self.settings, **given).action
        assert model is not None
        make: dict[str, Callable[[], Any]] = {
            "quantize": lambda: stages.quantize(model, self.settings, **given),
            "calibrate": lambda: stages.calibrate(model, given["data"], self.settings),
            "eval": lambda: stages.evaluate(model, given.get("base"), self.settings),
            "compile-tensorrt-llm": lambda: stages.compile_prepare(model, given["plan"], self.settings),
            "compile-tensorrt-llm-plan": lambda: stages.compile_plan(model, self.settings),
        }
        action: Action = make.get(self.op, lambda: stages.compile_(model, self.settings))().action
        return action

    def with_input(self, name: str, **changes: Any) -> Recipe:
        changed = dataclasses.replace(self.inputs[name], **changes)
        return dataclasses.replace(self, inputs={**self.inputs, name: changed})

    def with_settings(self, **changes: Any) -> Recipe:
        return dataclasses.replace(self, settings={**self.settings, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model, a calibration set and a text, as far as the making of a stage looks into them."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    (folder / "calibration.json").write_text(json.dumps({"samples": 16, "seq_len": 128}))
    (folder / "text.txt").write_text("words")
    return folder


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Callable[[str], Recipe]:
    def given(digit: str, kind: str) -> Input:
        return Input(id=an_id(digit), path=folder, kind=kind, bytes=1, label=digit, files=(folder / "text.txt",))

    others = {
        "calibrate": {"data": given("b", "text")},
        "eval": {"base": given("c", "model")},
        "compile-tensorrt-llm": {"plan": given("d", "plan")},
        "bench": {"baseline": given("e", "report")},
        "bench-import": {"baseline": given("e", "report")},
    }

    def make(op: str) -> Recipe:
        model = {"model": given("a", "model")}
        return Recipe(op=op, settings=dict(GIVEN.get(op, {})), inputs=model | others.get(op, {}))

    return make


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """One machine and one set of versions, whatever this machine is."""
    monkeypatch.setattr(machine, "cpu_info", lambda: {"flags": "avx2 f16c", "model name": "A CPU"})
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setattr(provenance, "code_digest", lambda operation: an_id("0"))
    monkeypatch.setattr(provenance, "versions", lambda names: dict.fromkeys(names, "1.0"))


INPUTS = [
    (op, name)
    for op, names in {
        "quantize": ["model"],
        "compile-openvino": ["model"],
        "compile-tensorrt-llm": ["model", "plan"],
        "compile-tensorrt-llm-plan": ["model"],
        "compile-vllm": ["model"],
        "eval": ["model", "base"],
        "calibrate": ["data"],
        "bench": ["model", "baseline"],
        "bench-import": ["model", "baseline"],
    }.items()
    for name in names
]
ABOUT = [
    {"id": an_id("f")},
    {"source": "hf:org/name@" + "1" * 40},
    {"stated": (Stated("mit", "LICENSE"),)},
]


@pytest.mark.parametrize("about", ABOUT, ids=["id", "source", "licence"])
@pytest.mark.parametrize(("op", "name"), INPUTS)
def test_what_an_input_is_where_from_and_under_which_licence_is_in_the_key(
    recipe: Callable[[str], Recipe], op: str, name: str, about: Mapping[str, Any]
) -> None:
    before = recipe(op)
    assert before.with_input(name, **about).key() != before.key()


@pytest.mark.parametrize(
    ("op", "name"),
    [("quantize", "calibration"), ("quantize", "adapter"), ("eval", "base"), ("bench", "baseline"), ("bench", "model")],
)
def test_an_input_more_is_in_the_key(recipe: Callable[[str], Recipe], op: str, name: str) -> None:
    whole = recipe(op)
    more = dataclasses.replace(whole.inputs["model"], id=an_id("9"), kind="calibration")
    without = dataclasses.replace(whole, inputs={key: value for key, value in whole.inputs.items() if key != name})
    with_it = dataclasses.replace(without, inputs={**without.inputs, name: whole.inputs.get(name, more)})
    assert with_it.key() != without.key()


def test_where_and_what_of_an_input_are_not_mixed_up(recipe: Callable[[str], Recipe]) -> None:
    """The same words at other places are other actions."""
    source, stated = "hf:org/name@1", (Stated("hf:org/name@1", "LICENSE"),)
    first, second = recipe("eval"), recipe("eval")
    assert first.with_input("model", source=source).key() != second.with_input("base", source=source).key()
    assert first.with_input("model", source=source).key() != second.with_input("model", stated=stated).key()


@pytest.mark.parametrize("op", OPS)
def test_the_code_is_in_the_key(recipe: Callable[[str], Recipe], op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = recipe(op).key()
    monkeypatch.setattr(provenance, "code_digest", lambda operation: an_id("1"))
    assert recipe(op).key() != before


@pytest.mark.parametrize(
    ("op", "module"),
    [("quantize", quantizers), ("calibrate", calibrate), ("eval", evaluate), ("bench", bench), ("bench-import", bench)]
    + [(op, compilers) for op in OPS if op.startswith("compile")],
)
def test_the_operation_s_version_is_in_the_key(
    recipe: Callable[[str], Recipe], op: str, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = recipe(op).key()
    monkeypatch.setattr(module, "OP_VERSION", module.OP_VERSION + 1)
    assert recipe(op).key() != before


@pytest.mark.parametrize("op", OPS)
def test_each_dependency_is_in_the_key(
    recipe: Callable[[str], Recipe], op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = recipe(op).action()
    assert before.deps
    keys = {before.key}
    for name in before.deps:
        monkeypatch.setattr(provenance, "versions", lambda names, new=name: dict.fromkeys(names, "1.0") | {new: "2.0"})
        keys.add(recipe(op).key())
    assert len(keys) == 1 + len(before.deps)


@pytest.mark.parametrize(
    ("op", "name", "value"),
    [
        *((op, "arch", "aarch64") for op in ("quantize", "compile-openvino", "eval", "bench")),
        *((op, "flags", "avx2 avx512f") for op in ("quantize", "eval")),
        ("quantize", "flags", "avx2 avx512_bf16"),
        ("bench", "model name", "Another CPU"),
        ("bench", "cores", 3),
    ],
)
def test_the_machine_that_a_result_depends_on_is_in_the_key(
    recipe: Callable[[str], Recipe], op: str, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = recipe(op).key()
    if name == "arch":
        monkeypatch.setattr(machine.platform, "machine", lambda: value)
    elif name == "cores":
        monkeypatch.setattr(machine, "cores", lambda: value)
    else:
        info = {"flags": "avx2 f16c", "model name": "A CPU"} | {name: value}
        monkeypatch.setattr(machine, "cpu_info", lambda: info)
    assert recipe(op).key() != before


@pytest.mark.parametrize("op", ["compile-tensorrt-llm", "compile-tensorrt-llm-plan", "compile-vllm", "calibrate"])
def test_what_is_the_same_on_every_machine_has_one_key(
    recipe: Callable[[str], Recipe], op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = recipe(op).key()
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(machine, "cpu_info", lambda: {"flags": "bf16"})
    assert recipe(op).key() == before


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, known in SETTINGS.items() for name in known])
def test_each_setting_is_in_the_key(recipe: Callable[[str], Recipe], op: str, name: str) -> None:
    before = recipe(op)
    more = {"sweeps": 0} if name == "kv_cache" and op == "quantize" else {}
    values = SETTINGS[op][name]
    keys = {before.with_settings(**more).key(), *(before.with_settings(**{name: v}, **more).key() for v in values)}
    assert len(keys) == 1 + len(values)


def test_every_operation_has_a_key_of_its_own(recipe: Callable[[str], Recipe]) -> None:
    actions = [recipe(op).action() for op in OPS]
    assert len({action.key for action in actions}) == len(OPS)
    assert len({action.op for action in actions}) == len(OPS)


def test_only_the_name_of_the_operation_set_apart_is_another_key(recipe: Callable[[str], Recipe]) -> None:
    action = recipe("eval").action()
    assert dataclasses.replace(action, op="evel").key != action.key


def shuffled(value: Any, rng: random.Random) -> Any:
    """The same mapping, and those in it, with their keys in another order."""
    if isinstance(value, dict):
        items = [(key, shuffled(item, rng)) for key, item in value.items()]
        rng.shuffle(items)
        return dict(items)
    return [shuffled(item, rng) for item in value] if isinstance(value, list) else value


NESTED: Mapping[str, Mapping[str, Any]] = {
    "compile-tensorrt-llm": {
        "mode": "engine",
        "tensor_parallel": 2,
        "build": {"workers": 2, "gemm_plugin": "auto", "remove_input_padding": "enable", "opt_num_tokens": 64},
        "lmi": {"option.max_rolling_batch_size": "8", "option.async_mode": "true", "option.entryPoint": "x"},
        "serve": {
            "enable_chunked_prefill": True,
            "kv_cache_config": {"enable_block_reuse": False, "free_gpu_memory_fraction": 0.8, "host_cache_size": 0},
        },
    },
    "compile-vllm": {
        "serve": {"seed": 1, "enforce-eager": True, "compilation-config": {"level": 3, "sizes": {"b": 1, "a": 2}}},
        "lmi": {"option.async_mode": "true", "option.entryPoint": "x"},
    },
    "quantize": {"bits": 4, "group_size": 64, "seed": 3, "sweeps": 1, "overrides": {"*.q_proj": {"bits": 8}}},
    "bench": {"seed": 1, "rounds": 2, "workload": {"prompt_tokens": {"min": 1, "max": 9}, "output_tokens": 5}},
    "compile-openvino": {"aot": False, "lm_head": "keep", "precision": "f32"},
}


@pytest.mark.parametrize("op", NESTED)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rng=st.randoms(use_true_random=False))
def test_the_order_in_which_settings_are_written_is_not_in_the_key(
    recipe: Callable[[str], Recipe], op: str, rng: random.Random
) -> None:
    start = recipe(op)
    values = dict(GIVEN.get(op, {})) | dict(NESTED[op])
    first = dataclasses.replace(start, settings=values).action()
    second = dataclasses.replace(start, settings=shuffled(values, rng)).action()
    assert first.key == second.key
    # What the stage is told is in the same order too, so that no file that it writes can tell.
    assert json.dumps(dict(first.settings)["serve"] if "serve" in first.settings else None) == json.dumps(
        dict(second.settings)["serve"] if "serve" in second.settings else None
    )


def test_the_order_of_overrides_is_in_the_key_because_the_last_counts(recipe: Callable[[str], Recipe]) -> None:
    patterns = {"*.q_proj": {"bits": 8}, "*": {"bits": 3}}
    first = recipe("quantize").with_settings(overrides=patterns)
    second = recipe("quantize").with_settings(overrides=dict(reversed(patterns.items())))
    assert first.key() != second.key()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_two_choices_of_settings_share_a_key_only_where_they_are_one(
    recipe: Callable[[str], Recipe], data: st.DataObject
) -> None:
    known = {
        name: SETTINGS["quantize"][name] for name in ("bits", "group_size", "seed", "lm_head", "act_order", "sweeps")
    }
    choice = st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in known.items()})
    one, other = data.draw(choice), data.draw(choice)
    keys = [recipe("quantize").with_settings(**chosen).key() for chosen in (one, other)]
    assert (keys[0] == keys[1]) == (one == other)


@pytest.mark.parametrize("op", OPS)
def test_what_is_for_people_and_where_things_lie_is_not_in_the_key(
    recipe: Callable[[str], Recipe], folder: Path, tmp_path: Path, op: str
) -> None:
    shutil.copytree(folder, tmp_path / "moved")
    moved = tmp_path / "moved"
    before = recipe(op)
    after = before
    for name in before.inputs:
        after = after.with_input(name, path=moved, label="another", bytes=9, files=(moved / "text.txt",))
    assert after.key() == before.key()


def test_times_of_files_are_not_in_the_key(tiny: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "model"))

    def key() -> str:
        return stages.compile_(inputs.resolve(Store(tmp_path), str(model)), {}).action.key

    before = key()
    for file in model.iterdir():
        os.utime(file, (1, 1))
    os.utime(model, (1, 1))
    assert key() == before


_SCRIPT = """
import json, sys
from pathlib import Path
from llmopt.artifacts.store import Store
from llmopt.pipeline import inputs, stages
model = inputs.resolve(Store(Path("/nowhere")), sys.argv[1])
nested = {"serve": {"b": {"y": 1, "x": 2}, "a": 1}}
print(json.dumps([
    stages.quantize(model, {"bits": 3, "overrides": {"*.q_proj": {"bits": 8}}}).action.key,
    stages.calibrate(model, inputs.text(sys.argv[2]), {}).action.key,
    stages.compile_(model, {}).action.key,
    stages.compile_(model, {"target": "vllm", **nested}).action.key,
    stages.compile_plan(model, {"target": "tensorrt-llm"}).action.key,
    stages.evaluate(model, None, {}).action.key,
    stages.bench({"candidate": "http://127.0.0.1:1"}, {}).action.key,
]))
"""


def test_no_environment_is_in_the_key(tiny: Path, text: Path, tmp_path: Path) -> None:
    """Neither the home folder, nor locale, time zone, hash seed, threads, current folder, terminal or proxies."""
    others = {
        "PYTHONHASHSEED": "1", "HOME": str(tmp_path), "LC_ALL": "de_DE.UTF-8", "LANG": "tr_TR.UTF-8",
        "TZ": "Asia/Kathmandu", "OMP_NUM_THREADS": "1", "LLMOPT_STORE": str(tmp_path), "COLUMNS": "40",
        "XDG_DATA_HOME": str(tmp_path), "HF_HOME": str(tmp_path), "http_proxy": "http://127.0.0.1:1", "USER": "nobody",
    }  # fmt: skip
    ran = [
        subprocess.run(
            [sys.executable, "-c", _SCRIPT, str(tiny), str(text)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
            cwd=cwd,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for environment, cwd in (({"PYTHONHASHSEED": "0"}, REPOSITORY), (others, tmp_path))
    ]
    assert ran[0] == ran[1]
    assert len(set(json.loads(ran[0]))) == 7
