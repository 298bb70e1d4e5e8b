"""SageMaker: requests of its API that put the artifact behind an endpoint in an LMI container, and the script for them.

Sources: SageMaker API, CreateModel, CreateEndpointConfig, CreateEndpoint (botocore's service model of 2017-07-24);
djl-serving, serving/docs/lmi/deployment_guide/deploying-your-endpoint.md (uncompressed artifacts, time-outs).
"""

from __future__ import annotations

import json
import re

from llmopt.artifacts.outcome import Json
from llmopt.compilers.deploy import images, lmi
from llmopt.compilers.deploy.base import Deployment, check_instance, check_name, require_url
from llmopt.errors import SettingsError

#: What the requests cannot know, as the script finds it in the environment.
ROLE, ACCOUNT, REGION = "${SAGEMAKER_ROLE_ARN}", "${LMI_ACCOUNT}", "${AWS_REGION}"
_LONGEST_S = 3600  # that the API takes for either time-out
_INSTANCE = re.compile(r"ml\.[a-z0-9-]+\.[a-z0-9-]+")
_SCRIPT = """\
#!/usr/bin/env bash
# Create a SageMaker endpoint of {name}: a model, an endpoint configuration and an endpoint, from the files beside this.
#   SAGEMAKER_ROLE_ARN  the role that SageMaker takes to read {url} and to pull the image (required)
#   AWS_REGION          where (required)
#   LMI_ACCOUNT         the account that holds AWS's containers in that region: {account} in most; the others are in
#                       docs/reference/region_availability.md of github.com/aws/deep-learning-containers
# Container: {image} ({holds}). Where the instance's driver is too old for its CUDA, add InferenceAmiVersion
# to create-endpoint-config.json: docs.aws.amazon.com/sagemaker/latest/dg/inference-gpu-drivers.html has the drivers.
set -euo pipefail
here="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
: "${{SAGEMAKER_ROLE_ARN:?the ARN of the role that SageMaker takes}}"
: "${{AWS_REGION:?the region, such as us-east-1}}"
export LMI_ACCOUNT="${{LMI_ACCOUNT:-{account}}}"

request() {{
  sed -e "s|\\${{SAGEMAKER_ROLE_ARN}}|$SAGEMAKER_ROLE_ARN|g" -e "s|\\${{LMI_ACCOUNT}}|$LMI_ACCOUNT|g" \\
    -e "s|\\${{AWS_REGION}}|$AWS_REGION|g" "$here/$1"
}}

aws sagemaker create-model --region "$AWS_REGION" --cli-input-json "$(request create-model.json)"
aws sagemaker create-endpoint-config --region "$AWS_REGION" --cli-input-json "$(request create-endpoint-config.json)"
aws sagemaker create-endpoint --region "$AWS_REGION" --cli-input-json "$(request create-endpoint.json)"
aws sagemaker wait endpoint-in-service --region "$AWS_REGION" --endpoint-name {name}
echo "the endpoint {name} is in service in $AWS_REGION" >&2
"""


def emit(deployment: Deployment) -> dict[str, str]:
    """create-model.json, create-endpoint-config.json, create-endpoint.json and deploy.sh, which sends them.

    Raises SettingsError where the place of the artifact or the instance is not said, and for what LMI does not serve.
    """
    url = require_url(deployment, "sagemaker")
    instance = _instance(deployment)
    check_name(deployment)
    check_instance(deployment)
    if not 60 <= deployment.loading_timeout_s <= _LONGEST_S:
        raise SettingsError(
            f"SageMaker cannot wait `loading_timeout_s: {deployment.loading_timeout_s}` for a container",
            hint=f"between 60 and {_LONGEST_S} s",
        )
    image = images.lmi(deployment)
    name = deployment.name
    model: dict[str, Json] = {
        "ModelName": name,
        "ExecutionRoleArn": ROLE,
        "PrimaryContainer": {
            "Image": image.tag if deployment.image else f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/{image.tag}",
            "ModelDataSource": {
                "S3DataSource": {
                    "S3Uri": f"{url}/{deployment.model}/",
                    "S3DataType": "S3Prefix",
                    "CompressionType": "None",
                }
            },
            # The place where SageMaker mounts what it fetched (user_guides/starting-guide.md, HF_MODEL_ID).
            "Environment": {"HF_MODEL_ID": "/opt/ml/model", **lmi.environment(deployment)},
        },
    }
    variant: dict[str, Json] = {
        "VariantName": "AllTraffic",
        "ModelName": name,
        "InitialInstanceCount": 1,
        "InitialVariantWeight": 1.0,
        "InstanceType": instance,
        "ModelDataDownloadTimeoutInSeconds": _LONGEST_S,
        "ContainerStartupHealthCheckTimeoutInSeconds": deployment.loading_timeout_s,
        "RoutingConfig": {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"},
    }
    script = _SCRIPT.format(name=name, url=url, account=images.LMI_ACCOUNT, image=image.tag, holds=image.holds)
    return {
        "create-model.json": _text(model),
        "create-endpoint-config.json": _text({"EndpointConfigName": name, "ProductionVariants": [variant]}),
        "create-endpoint.json": _text({"EndpointName": name, "EndpointConfigName": name}),
        "deploy.sh": script,
    }


def _instance(deployment: Deployment) -> str:
    instance = deployment.instance
    if instance is None or not _INSTANCE.fullmatch(instance):
        said = "no `compile.instance`" if instance is None else f"`compile.instance` cannot be `{instance}`"
        named = None if instance is None or instance.startswith("ml.") else f"did you mean `ml.{instance}`?"
        raise SettingsError(
            f"`compile.emit: sagemaker` needs a SageMaker instance: {said}", hint=named or "such as `ml.g5.12xlarge`"
        )
    return instance


def _text(value: dict[str, Json]) -> str:
    return json.dumps(value, indent=2) + "\n"
