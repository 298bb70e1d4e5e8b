"""From settings to a deployment, and what is checked of it whatever the emitter."""

from __future__ import annotations

import dataclasses

import pytest
from deployments import BUNDLE, ENGINE, VLLM

from llmopt.compilers.deploy import emit
from llmopt.compilers.deploy.base import Deployment
from llmopt.compilers.trt_llm.settings import Settings
from llmopt.errors import SettingsError


def of(settings: Settings) -> Deployment:
    return Deployment.of(settings, name="llama", runtime="tensorrt-llm", mode="bundle", model="model", kv_cache="FP8")


def test_what_the_runtimes_options_say_of_a_field_is_that_field() -> None:
    cache = {"free_gpu_memory_fraction": 0.8, "enable_block_reuse": False, "max_tokens": 1000}
    found = of(Settings(serve={"kv_cache_config": cache, "enable_chunked_prefill": True, "stream_interval": 4}))
    assert (found.gpu_memory_fraction, found.block_reuse, found.chunked_prefill) == (0.8, False, True)
    assert found.serve == {"kv_cache_config": {"max_tokens": 1000}, "stream_interval": 4}


def test_an_object_of_options_that_are_all_fields_is_gone() -> None:
    assert of(Settings(serve={"kv_cache_config": {"enable_block_reuse": True}})).serve == {}


def test_every_setting_of_the_same_name_is_taken() -> None:
    settings = Settings(
        url="s3://bucket/x",
        instance="ml.p5.48xlarge",
        image="own",
        lmi={"a": "b"},
        tensor_parallel=4,
        max_num_tokens=99,
    )
    found = of(dataclasses.replace(settings, max_batch_size=7, loading_timeout_s=60))
    assert (found.url, found.instance, found.image, found.lmi) == ("s3://bucket/x", "ml.p5.48xlarge", "own", {"a": "b"})
    assert (found.tensor_parallel, found.max_num_tokens, found.max_batch_size) == (4, 99, 7)
    assert (found.kv_cache, found.loading_timeout_s, found.version) == ("fp8", 60, "1.2.1")


@pytest.mark.parametrize("url", [None, "bucket/x", "https://host/x", "s3://bucket", "s3://bucket/a b"])
@pytest.mark.parametrize("emitter", ["k8s", "sagemaker"])
def test_what_is_fetched_has_to_lie_on_s3(emitter: str, url: str | None) -> None:
    with pytest.raises(SettingsError) as caught:
        emit([emitter], dataclasses.replace(VLLM, url=url))
    assert f"`compile.emit: {emitter}` fetches the artifact from S3" in caught.value.message
    assert caught.value.hint == "say where the artifact will lie: `url: s3://bucket/prefix`"


@pytest.mark.parametrize("emitter", ["k8s", "sagemaker"])
def test_an_instance_with_too_few_gpus_is_refused(emitter: str) -> None:
    with pytest.raises(SettingsError, match=r"`compile.instance: ml.g5.12xlarge` has 4 GPUs"):
        emit([emitter], dataclasses.replace(VLLM, tensor_parallel=8))


@pytest.mark.parametrize("emitter", ["k8s", "sagemaker"])
def test_an_instance_of_another_architecture_is_refused(emitter: str) -> None:
    with pytest.raises(SettingsError, match=r"has GPUs of sm_90, and what is compiled is for sm_86"):
        emit([emitter], dataclasses.replace(ENGINE, instance="ml.p5.48xlarge"))


def test_an_instance_that_the_table_has_not_is_taken_at_its_word() -> None:
    files = emit(["k8s"], dataclasses.replace(VLLM, instance="ml.z9.48xlarge"))
    assert "node.kubernetes.io/instance-type: z9.48xlarge" in files["deploy/k8s/deployment.yaml"]


@pytest.mark.parametrize("name", ["Llama", "8b", "a_b", "-a", "a-", "a" * 64])
@pytest.mark.parametrize("emitter", ["k8s", "sagemaker"])
def test_a_name_that_clouds_do_not_take_is_refused(emitter: str, name: str) -> None:
    with pytest.raises(SettingsError, match="cannot name a deployment"):
        emit([emitter], dataclasses.replace(VLLM, name=name))


def test_the_numbers_of_gpus_is_that_of_all_ranks() -> None:
    assert dataclasses.replace(BUNDLE, tensor_parallel=4, pipeline_parallel=2).gpus == 8


@pytest.mark.parametrize("instance", ["ml.c7i.2xlarge", "ml.inf2.xlarge"])
def test_an_instance_without_gpus_is_refused(instance: str) -> None:
    with pytest.raises(SettingsError, match="has no GPU, and tensor times pipeline parallelism asks for 1"):
        emit(["sagemaker"], dataclasses.replace(VLLM, tensor_parallel=1, instance=instance))


def test_fp8_on_an_instance_without_the_arithmetic_is_refused() -> None:
    bundle = dataclasses.replace(BUNDLE, architecture=None, instance="p4d.24xlarge")
    with pytest.raises(SettingsError, match=r"`compile.instance: p4d.24xlarge` has no FP8 arithmetic"):
        emit(["k8s"], bundle)
    emit(["k8s"], dataclasses.replace(bundle, instance="p5.48xlarge"))
    emit(["k8s"], dataclasses.replace(VLLM, quantization="FP8", instance="p4d.24xlarge"))


@pytest.mark.parametrize("image", ["own\nrm -rf /", "own; id", "", "$(id)"])
@pytest.mark.parametrize(("emitter", "deployment"), [("triton", BUNDLE), ("k8s", VLLM), ("lmi", VLLM)])
def test_an_image_that_is_no_reference_is_refused(emitter: str, deployment: Deployment, image: str) -> None:
    with pytest.raises(SettingsError, match=r"`compile.image` cannot be"):
        emit([emitter], dataclasses.replace(deployment, image=image))
