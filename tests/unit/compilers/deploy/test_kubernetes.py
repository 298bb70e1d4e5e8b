"""Kubernetes: what the objects say to each other; tests/judges has the judgement of Kubernetes' own schema."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import yaml
from deployments import BUNDLE, ENGINE, VLLM

from llmopt.compilers.deploy import kubernetes
from llmopt.compilers.deploy.base import Deployment

CASES: Mapping[str, Deployment] = {"engine": ENGINE, "bundle": BUNDLE, "vllm": VLLM}


def objects(deployment: Deployment) -> dict[str, Any]:
    return {text["kind"]: text for text in map(yaml.safe_load, kubernetes.emit(deployment).values())}


def pod(deployment: Deployment) -> dict[str, Any]:
    found: dict[str, Any] = objects(deployment)["Deployment"]["spec"]["template"]["spec"]
    return found


def server(deployment: Deployment) -> dict[str, Any]:
    (container,) = pod(deployment)["containers"]
    assert isinstance(container, dict)
    return container


@pytest.mark.parametrize("case", CASES)
def test_the_objects_have_what_the_api_requires(case: str) -> None:
    found = objects(CASES[case])
    assert {kind: value["apiVersion"] for kind, value in found.items()} == {"Deployment": "apps/v1", "Service": "v1"}
    spec = found["Deployment"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"] == found["Service"]["spec"]["selector"] == labels
    for container in (*pod(CASES[case])["initContainers"], server(CASES[case])):
        assert container["name"]
        assert container["image"]


@pytest.mark.parametrize("case", CASES)
def test_every_mount_is_of_a_volume(case: str) -> None:
    volumes = {volume["name"] for volume in pod(CASES[case])["volumes"]}
    containers = (*pod(CASES[case])["initContainers"], server(CASES[case]))
    assert {mount["name"] for container in containers for mount in container["volumeMounts"]} == volumes


@pytest.mark.parametrize("case", CASES)
def test_the_probes_and_the_service_ask_the_port_that_is_served(case: str) -> None:
    container, service = server(CASES[case]), objects(CASES[case])["Service"]["spec"]
    (port,) = container["ports"]
    probes = [container[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")]
    assert {probe["port"] for probe in probes} == {service["ports"][0]["targetPort"]} == {port["name"]}
    assert {probe["path"] for probe in probes} == {"/health"}
    said = [*container["command"], *(each["value"] for each in container.get("env", []))]
    assert str(port["containerPort"]) in said


@pytest.mark.parametrize("case", CASES)
def test_a_server_has_its_loading_time_before_it_counts_as_dead(case: str) -> None:
    probe = server(CASES[case])["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= CASES[case].loading_timeout_s
    assert objects(CASES[case])["Deployment"]["spec"]["progressDeadlineSeconds"] > CASES[case].loading_timeout_s


def test_the_pod_asks_for_the_gpus_of_all_ranks() -> None:
    deployment = dataclasses.replace(BUNDLE, tensor_parallel=4, pipeline_parallel=2)
    assert server(deployment)["resources"]["limits"] == {"nvidia.com/gpu": 8}


def test_ranks_have_shared_memory() -> None:
    (shm,) = (volume for volume in pod(BUNDLE)["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "4Gi"}
    assert {"name": "shm", "mountPath": "/dev/shm"} in server(BUNDLE)["volumeMounts"]


def test_the_artifact_is_fetched_before_the_server_starts() -> None:
    (fetch,) = pod(ENGINE)["initContainers"]
    assert fetch["args"][:2] == ["s3", "sync"]
    assert fetch["args"][-2:] == ["s3://bucket/llama-w8a8", "/artifact"]
    # What only the build needed stays where it is.
    assert "checkpoint/*" in fetch["args"]


def test_tensorrt_llm_is_started_by_the_artifacts_own_script() -> None:
    assert server(ENGINE)["command"] == ["bash", "/artifact/serve.sh", "--host", "0.0.0.0"]
    assert server(ENGINE)["image"] == "nvcr.io/nvidia/tensorrt-llm/release:0.21.0rc1"


def test_vllm_is_told_everything_on_its_command_line() -> None:
    command = server(VLLM)["command"]
    assert command[:3] == ["vllm", "serve", "/artifact/model"]
    assert command[command.index("--tensor-parallel-size") + 1] == "2"
    assert all(isinstance(word, str) for word in command)
    assert server(VLLM)["image"] == "vllm/vllm-openai:v0.20.1"


def test_nodes_are_chosen_by_instance_or_else_by_what_runs_the_engine() -> None:
    assert pod(ENGINE)["nodeSelector"] == {"node.kubernetes.io/instance-type": "g5.12xlarge"}
    assert pod(dataclasses.replace(ENGINE, instance=None))["nodeSelector"] == {
        "nvidia.com/gpu.compute.major": "8",
        "nvidia.com/gpu.compute.minor": "6",
    }
    anywhere = dataclasses.replace(ENGINE, instance=None, architecture="sm_120")
    assert pod(anywhere)["nodeSelector"]["nvidia.com/gpu.compute.major"] == "12"
    assert "nodeSelector" not in pod(dataclasses.replace(ENGINE, instance=None, architecture=None))
