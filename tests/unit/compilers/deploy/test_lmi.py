"""What is written for LMI's containers, and what is refused because none of them serves it."""

from __future__ import annotations

import dataclasses
import json

import pytest
from deployments import BUNDLE, ENGINE, VLLM

from llmopt.compilers.deploy import images, lmi, properties
from llmopt.compilers.deploy.base import Deployment
from llmopt.errors import SettingsError


def written(deployment: Deployment) -> dict[str, str]:
    text = lmi.emit(deployment)["serving.properties"]
    return {entry.key: entry.value for entry in properties.parse(text, file="serving.properties")}


def refused(deployment: Deployment) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        lmi.emit(deployment)
    return caught.value


def test_the_file_says_what_the_properties_are() -> None:
    for deployment in (ENGINE, VLLM):
        assert written(deployment) == lmi.values_of(deployment)


def test_the_model_is_the_folder_that_the_server_is_given() -> None:
    assert written(ENGINE)["option.model_id"] == "s3://bucket/llama-w8a8/engine/"
    assert written(VLLM)["option.model_id"] == "s3://bucket/llama-w4a16/model/"


def test_without_a_place_the_model_is_what_lies_beside_the_file() -> None:
    deployment = dataclasses.replace(VLLM, url=None)
    assert "option.model_id" not in written(deployment)
    assert "Lay this file beside the model's files" in lmi.emit(deployment)["serving.properties"]


def test_a_precision_is_named_as_each_handler_takes_it() -> None:
    # hf_properties.py of djl-serving 0.36 knows `bf16` and raises for `bfloat16`; TensorRT-LLM knows `float16`.
    assert written(VLLM)["option.dtype"] == "bf16"
    assert written(ENGINE)["option.dtype"] == "float16"


def test_a_checkpoint_of_vllm_is_not_said_to_be_quantized() -> None:
    assert not {"option.quantize", "option.quantization"} & set(written(dataclasses.replace(VLLM, quantization="awq")))


def test_properties_of_the_users_win_over_ours() -> None:
    deployment = dataclasses.replace(VLLM, lmi={"option.entryPoint": "model.py", "job_queue_size": "7"})
    assert written(deployment)["option.entryPoint"] == "model.py"
    assert written(deployment)["job_queue_size"] == "7"


def test_pipeline_stages_are_said_to_the_model_server_and_to_tensorrt_llm() -> None:
    values = written(dataclasses.replace(ENGINE, pipeline_parallel=2))
    assert values["option.pipeline_parallel_degree"] == values["option.pipeline_parallel_size"] == "2"


def test_lmis_vllm_handler_takes_no_pipeline_stages() -> None:
    assert "refuses `pipeline_parallel`" in refused(dataclasses.replace(VLLM, pipeline_parallel=2)).message


def test_a_tensorrt_llm_that_no_container_has_is_refused_with_the_ways_out() -> None:
    error = refused(BUNDLE)
    assert error.message == "no LMI container has TensorRT-LLM 1.2.1: the last has 0.21.0rc1"
    assert error.hint is not None
    assert all(way in error.hint for way in ("version: 0.21.0rc1", "mode: engine", "target `vllm`", "compile.image"))


def test_lmis_container_serves_engines_not_bundles() -> None:
    assert "serves engines, not a bundle" in refused(dataclasses.replace(BUNDLE, version="0.21.0rc1")).message


def test_a_container_of_the_users_may_hold_anything() -> None:
    text = lmi.emit(dataclasses.replace(BUNDLE, image="registry/djl:own"))["serving.properties"]
    assert text.startswith("# Container: registry/djl:own ")


def test_an_option_that_the_container_does_not_pass_on_is_refused() -> None:
    error = refused(dataclasses.replace(ENGINE, serve={"scheduler_config": {}}))
    assert "no property for `compile.serve.scheduler_config`" in error.message
    error = refused(dataclasses.replace(ENGINE, serve={"kv_cache_config": {"host_cache_sise": 1}}))
    assert error.hint == "did you mean `host_cache_size`?"


def test_options_of_the_kv_cache_are_properties_of_their_own() -> None:
    deployment = dataclasses.replace(ENGINE, serve={"kv_cache_config": {"max_attention_window": [512, 1024]}})
    assert json.loads(written(deployment)["option.max_attention_window"]) == [512, 1024]


def test_the_environment_says_the_same_but_for_the_place_of_the_model() -> None:
    variables = lmi.environment(VLLM)
    # As wlm/ModelInfo.java of djl-serving 0.33 makes properties of them.
    made = {
        "engine" if name == "OPTION_ENGINE" else "option." + name.removeprefix("OPTION_").lower(): value
        for name, value in variables.items()
    }
    made["option.entryPoint"] = made.pop("option.entrypoint")
    assert made == {key: value for key, value in written(VLLM).items() if key != "option.model_id"}


def test_a_property_of_the_model_server_has_its_own_prefix() -> None:
    assert lmi.environment(ENGINE)["SERVING_JOB_QUEUE_SIZE"] == "500"


def test_a_property_that_no_variable_can_say_is_refused() -> None:
    with pytest.raises(SettingsError, match="`minWorkers` cannot be told as an environment variable"):
        lmi.environment(dataclasses.replace(VLLM, lmi={"minWorkers": "1"}))


@pytest.mark.parametrize("version", images.LMI_VLLM)
def test_a_version_of_vllm_has_its_container(version: str) -> None:
    assert images.lmi(dataclasses.replace(VLLM, version=version)).holds == f"vLLM {version}"


def test_a_checkpoint_for_another_vllm_goes_into_the_newest_container_and_the_file_says_so() -> None:
    first, *_ = lmi.emit(dataclasses.replace(VLLM, version="0.99.0"))["serving.properties"].splitlines()
    assert first.endswith("-lmi29.0.0-cu130 (vLLM 0.28.0, the newest; this was prepared for 0.99.0)")
