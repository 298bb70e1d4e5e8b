"""Kubernetes: a Deployment that fetches the artifact from S3 and serves it on GPUs, and its Service.

Sources: Kubernetes API reference 1.30 (apps/v1 Deployment, v1 Service), kubernetes.io "Schedule GPUs" and "Configure
probes"; vLLM's documentation, deployment/k8s (shared memory, probes); NVIDIA's k8s-device-plugin and GPU feature
discovery (the resource and the labels of a GPU's compute capability).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from llmopt.compilers.deploy import images, vllm
from llmopt.compilers.deploy.base import Deployment, check_instance, check_name, require_url

_PORT = 8000
_PROBE_S = 10
_HEAD = """\
# {name} on {gpus} GPU(s): {image} ({holds}).
# The pod reads {url}: give its service account that right (an IAM role of EKS, say), or add credentials to `fetch`.
# kubectl apply -f deployment.yaml -f service.yaml
"""


def emit(deployment: Deployment) -> dict[str, str]:
    """deployment.yaml and service.yaml; SettingsError where the place of the artifact is not said, or no GPU fits."""
    import yaml

    url = require_url(deployment, "k8s")
    check_name(deployment)
    check_instance(deployment)
    image = images.server(deployment)
    head = _HEAD.format(name=deployment.name, gpus=deployment.gpus, image=image.tag, holds=image.holds, url=url)

    def text(value: Mapping[str, Any]) -> str:
        plain = json.loads(json.dumps(value))  # what is the same object twice would become an anchor and an alias
        return yaml.safe_dump(plain, sort_keys=False, width=120)

    return {
        "deployment.yaml": head + text(_deployment(deployment, image.tag, url)),
        "service.yaml": text(_service(deployment)),
    }


def _deployment(deployment: Deployment, image: str, url: str) -> dict[str, Any]:
    labels = _labels(deployment)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": deployment.name, "labels": labels},
        "spec": {
            "replicas": 1,
            # A second pod beside the first would wait for GPUs that the first one has.
            "strategy": {"type": "Recreate"},
            # Fetching the artifact counts too.
            "progressDeadlineSeconds": 2 * deployment.loading_timeout_s,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": _pod(deployment, image, url)},
        },
    }


def _pod(deployment: Deployment, image: str, url: str) -> dict[str, Any]:
    mount = {"name": "artifact", "mountPath": "/artifact"}
    fetch = ["s3", "sync", "--no-progress", "--exclude", "checkpoint/*", url, "/artifact"]
    health = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": _PROBE_S}
    command, environment = _command(deployment)
    pod: dict[str, Any] = {
        "initContainers": [{"name": "fetch", "image": images.AWS_CLI, "args": fetch, "volumeMounts": [mount]}],
        "containers": [
            {
                "name": "server",
                "image": image,
                "command": command,
                **({"env": environment} if environment else {}),
                "ports": [{"name": "http", "containerPort": _PORT}],
                "resources": {"limits": {"nvidia.com/gpu": deployment.gpus}},
                # Nothing else is asked of the server before it has started.
                "startupProbe": health | {"failureThreshold": math.ceil(deployment.loading_timeout_s / _PROBE_S)},
                "livenessProbe": health | {"timeoutSeconds": 5, "failureThreshold": 6},
                "readinessProbe": health | {"timeoutSeconds": 5, "failureThreshold": 3},
                "volumeMounts": [mount | {"readOnly": True}, {"name": "shm", "mountPath": "/dev/shm"}],
            }
        ],
        "volumes": [
            {"name": "artifact", "emptyDir": {}},
            # Ranks exchange tensors through it, and Kubernetes gives 64 MiB.
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{2 * deployment.gpus}Gi"}},
        ],
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "terminationGracePeriodSeconds": 120,
    }
    selector = _selector(deployment)
    return pod | ({"nodeSelector": selector} if selector else {})


def _command(deployment: Deployment) -> tuple[list[str], list[dict[str, str]]]:
    """What the container runs, and its environment: TensorRT-LLM's own script of the artifact, or `vllm serve`."""
    if deployment.runtime == "tensorrt-llm":
        return ["bash", "/artifact/serve.sh", "--host", "0.0.0.0"], [{"name": "PORT", "value": str(_PORT)}]
    arguments = vllm.command_line(vllm.arguments(deployment))
    socket = ["--host", "0.0.0.0", "--port", str(_PORT)]
    return ["vllm", "serve", f"/artifact/{deployment.model}", *arguments, *socket], []


def _selector(deployment: Deployment) -> dict[str, str]:
    """Nodes of the instance; otherwise those whose GPUs run the engine, by the labels of GPU feature discovery."""
    if deployment.instance is not None:
        return {"node.kubernetes.io/instance-type": deployment.instance.removeprefix("ml.")}
    if deployment.architecture is None:
        return {}
    capability = deployment.architecture.removeprefix("sm_")
    return {"nvidia.com/gpu.compute.major": capability[:-1], "nvidia.com/gpu.compute.minor": capability[-1]}


def _service(deployment: Deployment) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": deployment.name, "labels": _labels(deployment)},
        "spec": {
            "selector": _labels(deployment),
            "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}],
        },
    }


def _labels(deployment: Deployment) -> dict[str, str]:
    return {"app.kubernetes.io/name": deployment.name}
