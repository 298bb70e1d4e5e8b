"""Triton: what the backends are told, and the scripts over a stand-in for the container's own files.

The templates here have the parameters that NVIDIA/TensorRT-LLM's triton_backend/all_models has, and fill_template.py
fills them in as its documentation says; nothing of NVIDIA's runs.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from conftest import Lay, Run
from deployments import BUNDLE, VLLM
from deployments import NEWER_ENGINE as ENGINE

from llmopt.compilers.deploy import images, triton
from llmopt.errors import SettingsError

#: The placeholders of each config.pbtxt that have to be filled for Triton to parse it at all, or for the model to run
#: (docs/model_config.md, "Mandatory parameters", and the tensors' data types in the templates).
MANDATORY = {
    "ensemble": {"triton_max_batch_size", "logits_datatype"},
    "preprocessing": {
        *("triton_max_batch_size", "tokenizer_dir", "preprocessing_instance_count"),
        *("max_queue_delay_microseconds", "max_queue_size"),
    },
    "tensorrt_llm": {
        *("triton_backend", "triton_max_batch_size", "decoupled_mode", "max_queue_delay_microseconds"),
        *("max_queue_size", "engine_dir", "batching_strategy", "encoder_input_features_data_type", "logits_datatype"),
        "prompt_embedding_table_data_type",
    },
    "postprocessing": {"triton_max_batch_size", "tokenizer_dir", "postprocessing_instance_count"},
    "tensorrt_llm_bls": {
        *("triton_max_batch_size", "decoupled_mode", "bls_instance_count", "logits_datatype"),
        "prompt_embedding_table_data_type",
    },
}
OPTIONAL = {"tensorrt_llm": {"kv_cache_free_gpu_mem_fraction", "enable_kv_cache_reuse", "medusa_choices"}}
FILL = """
import sys
from pathlib import Path
file, text = Path(sys.argv[2]), Path(sys.argv[2]).read_text()
for pair in sys.argv[3].split(","):
    key, value = pair.split(":")
    assert "${" + key + "}" in text, key
    text = text.replace("${" + key + "}", value)
file.write_text(text)
"""
SHOW = 'printf "%s\\n" "$@"'


def container(folder: Path, *, without: str = "") -> dict[str, str]:
    """The environment that says where the container's own files are."""
    models = folder / "all_models"
    for name, keys in MANDATORY.items():
        model = models / "inflight_batcher_llm" / name
        model.mkdir(parents=True)
        wanted = sorted((keys | OPTIONAL.get(name, set())) - {without})
        (model / "config.pbtxt").write_text("".join(f'{key}: "${{{key}}}"\n' for key in wanted))
    (models / "llmapi" / "tensorrt_llm" / "1").mkdir(parents=True)
    (models / "llmapi" / "tensorrt_llm" / "1" / "model.py").write_text("# NVIDIA's\n")
    (models / "llmapi" / "tensorrt_llm" / "1" / "model.yaml").write_text("model: TinyLlama\n")
    (models / "llmapi" / "tensorrt_llm" / "config.pbtxt").write_text('name: "tensorrt_llm"\n')
    (folder / "fill_template.py").write_text(FILL)
    return {"ALL_MODELS": str(models), "FILL_TEMPLATE": str(folder / "fill_template.py")}


def repository(arguments: list[str]) -> Path:
    """The model repository that Triton is started on."""
    (found,) = {a.removeprefix("--model-repository=") for a in arguments if a.startswith("--model-repository=")}
    return Path(found)


def test_a_bundle_is_served_by_the_containers_llmapi_backend(lay: Lay, run: Run, tmp_path: Path) -> None:
    artifact = lay(BUNDLE, "triton")
    done = run(artifact / "deploy" / "triton" / "serve.sh", {"mpirun": SHOW}, **container(tmp_path))
    assert done.returncode == 0, done.stderr
    arguments = done.stdout.splitlines()
    assert arguments[:4] == ["--allow-run-as-root", "-n", "1", "/opt/tritonserver/bin/tritonserver"]
    model = repository(arguments) / "tensorrt_llm"
    assert (model / "config.pbtxt").is_file()
    assert (model / "1" / "model.py").read_text() == "# NVIDIA's\n"
    values = yaml.safe_load((model / "1" / "model.yaml").read_text())
    assert values == yaml.safe_load(triton.model_yaml(BUNDLE)) | {"model": str(artifact / "model")}


def test_the_yaml_is_what_the_llm_api_takes() -> None:
    serve = {
        "kv_cache_config": {"host_cache_size": 5},
        "reasoning_parser": "x",
        "cuda_graph_config": {"max_batch_size": 8},
    }
    values = yaml.safe_load(triton.model_yaml(dataclasses.replace(BUNDLE, serve=serve, expert_parallel=2)))
    assert values["kv_cache_config"] == {"free_gpu_memory_fraction": 0.85, "dtype": "fp8", "host_cache_size": 5}
    assert values["cuda_graph_config"] == {"max_batch_size": 8}
    assert values["moe_expert_parallel_size"] == values["tensor_parallel_size"] == 2
    assert "reasoning_parser" not in values  # of trtllm-serve's own HTTP server
    # The backend batches by itself, so Triton must not (all_models/llmapi/tensorrt_llm/1/model.yaml).
    assert values["triton_config"]["max_batch_size"] == 0


def test_engines_fill_every_mandatory_parameter_of_the_templates(lay: Lay, run: Run, tmp_path: Path) -> None:
    artifact = lay(ENGINE, "triton")
    (artifact / "engine" / "config.json").write_text("{}")
    done = run(artifact / "deploy" / "triton" / "serve.sh", {"mpirun": SHOW}, **container(tmp_path))
    assert done.returncode == 0, done.stderr
    filled = {
        name: dict(
            re.findall(r'(\w+): "(.*)"', (repository(done.stdout.splitlines()) / name / "config.pbtxt").read_text())
        )
        for name in MANDATORY
    }
    for name, keys in MANDATORY.items():
        assert not {key for key in keys if filled[name][key].startswith("${")}, name
    assert filled["tensorrt_llm"]["engine_dir"] == str(artifact / "engine")
    assert filled["preprocessing"]["tokenizer_dir"] == str(artifact)
    assert filled["tensorrt_llm"]["kv_cache_free_gpu_mem_fraction"] == "0.9"
    assert filled["tensorrt_llm"]["enable_kv_cache_reuse"] == "true"
    assert filled["tensorrt_llm"]["medusa_choices"] == "${medusa_choices}"  # read as not said


def test_a_parameter_that_a_version_has_not_is_passed_over(lay: Lay, run: Run, tmp_path: Path) -> None:
    artifact = lay(ENGINE, "triton")
    (artifact / "engine" / "config.json").write_text("{}")
    given = container(tmp_path, without="prompt_embedding_table_data_type")
    assert run(artifact / "deploy" / "triton" / "serve.sh", {"mpirun": SHOW}, **given).returncode == 0


def test_every_rank_has_a_server_and_only_the_first_all_models(lay: Lay, run: Run, tmp_path: Path) -> None:
    artifact = lay(dataclasses.replace(ENGINE, tensor_parallel=2, pipeline_parallel=2), "triton")
    (artifact / "engine" / "config.json").write_text("{}")
    done = run(artifact / "deploy" / "triton" / "serve.sh", {"mpirun": SHOW}, **container(tmp_path))
    ranks = done.stdout.split(":\n")[:-1]
    assert [rank.count("/opt/tritonserver/bin/tritonserver") for rank in ranks] == [1, 1, 1, 1]
    assert ["--load-model=tensorrt_llm" in rank for rank in ranks] == [False, True, True, True]
    assert ["prefix0_" in ranks[0], "prefix3_" in ranks[3]] == [True, True]


def test_without_an_engine_the_script_says_how_to_build_it(lay: Lay, run: Run, tmp_path: Path) -> None:
    done = run(lay(ENGINE, "triton") / "deploy" / "triton" / "serve.sh", {"mpirun": SHOW}, **container(tmp_path))
    assert done.returncode == 1
    assert "build it with" in done.stderr
    assert "build.sh" in done.stderr


def test_outside_of_the_container_the_script_says_so(lay: Lay, run: Run) -> None:
    done = run(lay(BUNDLE, "triton") / "deploy" / "triton" / "serve.sh", {"mpirun": SHOW}, ALL_MODELS="/nowhere")
    assert done.returncode == 1
    assert "run this inside tritonserver's trtllm container" in done.stderr


def test_options_of_the_executor_have_its_parameters_names() -> None:
    serve = {
        "scheduler_config": {"capacity_scheduler_policy": "MAX_UTILIZATION"},
        "kv_cache_config": {"host_cache_size": 1 << 30},
        "extended_runtime_perf_knob_config": {"cuda_graph_mode": True},
        "host": "0.0.0.0",
    }
    found = triton.parameters(dataclasses.replace(ENGINE, serve=serve, chunked_prefill=True))["tensorrt_llm"]
    assert found["batch_scheduler_policy"] == "max_utilization"
    assert found["kv_cache_host_memory_bytes"] == "1073741824"
    assert (found["cuda_graph_mode"], found["enable_chunked_context"]) == ("true", "true")
    assert "host" not in found


def test_an_option_without_a_parameter_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"no parameter for `compile.serve.kv_cache_config.max_attention_window`"):
        triton.emit(dataclasses.replace(ENGINE, serve={"kv_cache_config": {"max_attention_window": [512]}}))


@pytest.mark.parametrize("version", images.TRITON)
def test_the_container_has_the_version_that_was_compiled_for(version: str) -> None:
    assert images.triton(dataclasses.replace(ENGINE, version=version)).holds == f"TensorRT-LLM {version}"


def test_a_version_without_a_container_is_refused_with_those_known() -> None:
    with pytest.raises(SettingsError) as caught:
        triton.emit(dataclasses.replace(BUNDLE, version="1.3.0rc20"))
    assert (
        caught.value.hint
        == "known: 0.21.0, 1.0.0, 1.1.0, 1.2.0, 1.2.1; or name a container of yours as `compile.image`"
    )
    own = triton.emit(dataclasses.replace(BUNDLE, version="1.3.0rc20", image="registry/triton:own"))
    assert "registry/triton:own" in own["serve.sh"]


def test_vllm_is_served_otherwise() -> None:
    with pytest.raises(SettingsError, match="is for TensorRT-LLM's backends"):
        triton.emit(VLLM)
