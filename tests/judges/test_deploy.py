"""AWS's and Kubernetes' own schemas are the judges of what is sent to them: `make judge-deploy`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmopt.compilers.deploy import emit

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "compilers" / "deploy"))
from deployments import BUNDLE, ENGINE, VLLM, Deployment

pytestmark = [pytest.mark.judge, pytest.mark.filterwarnings("default")]

loaders = pytest.importorskip("botocore.loaders", reason="botocore judges requests: run `make judge-deploy`")
kubernetes = pytest.importorskip("kubernetes_validate", reason="it judges objects: run `make judge-deploy`")

OPERATIONS = {
    "create-model.json": "CreateModel",
    "create-endpoint-config.json": "CreateEndpointConfig",
    "create-endpoint.json": "CreateEndpoint",
}
#: As deploy.sh fills them in; tests/unit has the script itself.
PLACES = {
    "${SAGEMAKER_ROLE_ARN}": "arn:aws:iam::123456789012:role/service-role/SageMaker-Execution",
    "${LMI_ACCOUNT}": "763104351884",
    "${AWS_REGION}": "us-east-1",
}


@pytest.fixture(scope="module")
def sagemaker() -> Any:
    from botocore.model import ServiceModel

    return ServiceModel(loaders.Loader().load_service_model("sagemaker", "service-2"), "sagemaker")


def requests(deployment: Deployment) -> dict[str, Any]:
    """By the API's operation."""
    found = {}
    for path, text in emit(["sagemaker"], deployment).items():
        for place, value in PLACES.items():
            text = text.replace(place, value)
        name = Path(path).name
        if name in OPERATIONS:
            found[OPERATIONS[name]] = json.loads(text)
    assert set(found) == set(OPERATIONS.values())
    return found


def faults(operation: Any, request: dict[str, Any]) -> list[str]:
    """What botocore finds, and what it leaves to the service: patterns and enumerations."""
    from botocore.validate import ParamValidator

    report = ParamValidator().validate(request, operation.input_shape)
    said = [report.generate_report()] if report.has_errors() else []
    return said or [*_text_faults(request, operation.input_shape, operation.name)]


def _text_faults(value: Any, shape: Any, where: str) -> list[str]:
    if shape.type_name == "structure":
        return [fault for k, v in value.items() for fault in _text_faults(v, shape.members[k], f"{where}.{k}")]
    if shape.type_name == "list":
        return [fault for item in value for fault in _text_faults(item, shape.member, where)]
    if shape.type_name == "map":
        return [fault for k, v in value.items() for fault in _text_faults(v, shape.value, f"{where}.{k}")]
    if shape.type_name != "string":
        return []
    pattern = shape.metadata.get("pattern")
    wrong = (pattern and not re.fullmatch(pattern, value)) or (shape.enum and value not in shape.enum)
    return [f"{where}: {value}"] if wrong or len(value) > shape.metadata.get("max", len(value)) else []


@pytest.mark.parametrize("deployment", [ENGINE, VLLM], ids=["engine", "vllm"])
def test_sagemaker_takes_every_request(sagemaker: Any, deployment: Deployment) -> None:
    for name, request in requests(deployment).items():
        assert faults(sagemaker.operation_model(name), request) == []


@pytest.mark.parametrize(
    ("operation", "path", "value"),
    [
        ("CreateModel", ("ModelName",), None),
        ("CreateModel", ("ModelName",), "not_a_name"),
        ("CreateModel", ("PrimaryContainer", "ModelDataSource", "S3DataSource", "CompressionType"), "none"),
        ("CreateEndpointConfig", ("ProductionVariants", 0, "InstanceType"), "g5.12xlarge"),
        ("CreateEndpointConfig", ("ProductionVariants", 0, "ContainerStartupHealthCheckTimeoutInSeconds"), 3601.5),
        ("CreateEndpoint", ("EndpointKonfigName",), "llama"),
    ],
)
def test_the_judge_sees_what_is_wrong(sagemaker: Any, operation: str, path: tuple[Any, ...], value: Any) -> None:
    request = requests(VLLM)[operation]
    *parents, last = path
    place: Any = request
    for parent in parents:
        place = place[parent]
    if value is None:
        del place[last]
    else:
        place[last] = value
    assert faults(sagemaker.operation_model(operation), request)


@pytest.mark.parametrize("deployment", [ENGINE, BUNDLE, VLLM], ids=["engine", "bundle", "vllm"])
def test_kubernetes_takes_every_object(deployment: Deployment) -> None:
    for text in emit(["k8s"], deployment).values():
        kubernetes.validate(yaml.safe_load(text), kubernetes.latest_version(), strict=True)


def test_the_judge_of_kubernetes_sees_what_is_wrong() -> None:
    text = emit(["k8s"], VLLM)["deploy/k8s/deployment.yaml"]
    value = yaml.safe_load(text.replace("containerPort: 8000", "containerPort: http"))
    with pytest.raises(kubernetes.ValidationError):
        kubernetes.validate(value, kubernetes.latest_version(), strict=True)
