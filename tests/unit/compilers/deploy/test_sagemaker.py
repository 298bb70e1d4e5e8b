"""SageMaker: what the requests say, and the script with an `aws` of our own; tests/judges has botocore's judgement."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from conftest import Lay, Run
from deployments import BUNDLE, ENGINE, VLLM

from llmopt.compilers.deploy import sagemaker
from llmopt.compilers.deploy.base import Deployment
from llmopt.errors import SettingsError

OPERATIONS = ("create-model", "create-endpoint-config", "create-endpoint")
ROLE = "arn:aws:iam::123456789012:role/service-role/SageMaker-Execution"


def sent(lay: Lay, run: Run, deployment: Deployment, **env: str) -> dict[str, Any]:
    """The requests that deploy.sh sends, by operation."""
    script = lay(deployment, "sagemaker") / "deploy" / "sagemaker" / "deploy.sh"
    commands = {"aws": 'printf "%s\\n" "$2" >> "$LOG"; printf "%s\\n\\0" "${@: -1}" >> "$LOG"'}
    log = script.parent / "sent"
    done = run(script, commands, LOG=str(log), SAGEMAKER_ROLE_ARN=ROLE, AWS_REGION="us-east-1", **env)
    assert done.returncode == 0, done.stderr
    calls = [call.split("\n", 1) for call in log.read_text().split("\0") if call]
    assert [name for name, _ in calls] == [*OPERATIONS, "wait"]
    return {name: json.loads(text) for name, text in calls if name in OPERATIONS}


def test_the_place_holders_are_filled_in_by_the_script(lay: Lay, run: Run) -> None:
    model = sent(lay, run, VLLM)["create-model"]
    assert model["ExecutionRoleArn"] == ROLE
    image = "763104351884.dkr.ecr.us-east-1.amazonaws.com/djl-inference:0.36.0-lmi25.0.0-cu130"
    assert model["PrimaryContainer"]["Image"] == image
    assert "${" not in json.dumps(model)


def test_another_regions_account_can_be_said(lay: Lay, run: Run) -> None:
    model = sent(lay, run, VLLM, LMI_ACCOUNT="907027046896")["create-model"]
    assert model["PrimaryContainer"]["Image"].startswith("907027046896.dkr.ecr.us-east-1.")


@pytest.mark.parametrize("missing", ["SAGEMAKER_ROLE_ARN", "AWS_REGION"])
def test_the_script_asks_for_what_it_cannot_know(lay: Lay, run: Run, missing: str) -> None:
    given = {"SAGEMAKER_ROLE_ARN": ROLE, "AWS_REGION": "us-east-1"}
    del given[missing]
    done = run(lay(VLLM, "sagemaker") / "deploy" / "sagemaker" / "deploy.sh", {"aws": "exit 9"}, **given)
    assert done.returncode not in (0, 9)
    assert missing in done.stderr


def test_the_model_is_fetched_uncompressed_to_where_lmi_looks_for_it() -> None:
    model = json.loads(sagemaker.emit(ENGINE)["create-model.json"])["PrimaryContainer"]
    assert model["ModelDataSource"]["S3DataSource"] == {
        "S3Uri": "s3://bucket/llama-w8a8/engine/",
        "S3DataType": "S3Prefix",
        "CompressionType": "None",
    }
    assert model["Environment"]["HF_MODEL_ID"] == "/opt/ml/model"
    assert "OPTION_MODEL_ID" not in model["Environment"]


def test_the_time_outs_are_said() -> None:
    (variant,) = json.loads(sagemaker.emit(ENGINE)["create-endpoint-config.json"])["ProductionVariants"]
    assert variant["ContainerStartupHealthCheckTimeoutInSeconds"] == 2400
    assert variant["ModelDataDownloadTimeoutInSeconds"] == 3600


def test_the_files_call_each_other_by_the_same_names() -> None:
    files = {name: json.loads(text) for name, text in sagemaker.emit(VLLM).items() if name.endswith(".json")}
    config = files["create-endpoint-config.json"]
    assert config["ProductionVariants"][0]["ModelName"] == files["create-model.json"]["ModelName"]
    assert files["create-endpoint.json"]["EndpointConfigName"] == config["EndpointConfigName"]


@pytest.mark.parametrize(
    ("instance", "hint"),
    [(None, "such as `ml.g5.12xlarge`"), ("g5.12xlarge", "did you mean `ml.g5.12xlarge`?"), ("ml.g5", "such as")],
)
def test_an_instance_has_to_be_one_of_sagemaker(instance: str | None, hint: str) -> None:
    with pytest.raises(SettingsError, match="needs a SageMaker instance") as caught:
        sagemaker.emit(dataclasses.replace(VLLM, instance=instance))
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize("seconds", [59, 3601])
def test_a_time_that_sagemaker_does_not_wait_is_refused(seconds: int) -> None:
    with pytest.raises(SettingsError, match="SageMaker cannot wait"):
        sagemaker.emit(dataclasses.replace(VLLM, loading_timeout_s=seconds))


def test_what_no_lmi_container_serves_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"no LMI container has TensorRT-LLM 1.2.1"):
        sagemaker.emit(dataclasses.replace(BUNDLE, instance="ml.p5.48xlarge"))


def test_a_container_of_the_users_is_taken_as_it_is() -> None:
    own = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/own:1"
    model = json.loads(sagemaker.emit(dataclasses.replace(VLLM, image=own))["create-model.json"])
    assert model["PrimaryContainer"]["Image"] == own
