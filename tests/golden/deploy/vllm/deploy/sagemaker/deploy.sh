#!/usr/bin/env bash
# Create a SageMaker endpoint of llama: a model, an endpoint configuration and an endpoint, from the files beside this.
#   SAGEMAKER_ROLE_ARN  the role that SageMaker takes to read s3://bucket/llama-w4a16 and to pull the image (required)
#   AWS_REGION          where (required)
#   LMI_ACCOUNT         the account that holds AWS's containers in that region: 763104351884 in most; the others are in
#                       docs/reference/region_availability.md of github.com/aws/deep-learning-containers
# Container: djl-inference:0.36.0-lmi25.0.0-cu130 (vLLM 0.20.1). Where the instance's driver is too old for its CUDA, add InferenceAmiVersion
# to create-endpoint-config.json: docs.aws.amazon.com/sagemaker/latest/dg/inference-gpu-drivers.html has the drivers.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
: "${SAGEMAKER_ROLE_ARN:?the ARN of the role that SageMaker takes}"
: "${AWS_REGION:?the region, such as us-east-1}"
export LMI_ACCOUNT="${LMI_ACCOUNT:-763104351884}"

request() {
  sed -e "s|\${SAGEMAKER_ROLE_ARN}|$SAGEMAKER_ROLE_ARN|g" -e "s|\${LMI_ACCOUNT}|$LMI_ACCOUNT|g" \
    -e "s|\${AWS_REGION}|$AWS_REGION|g" "$here/$1"
}

aws sagemaker create-model --region "$AWS_REGION" --cli-input-json "$(request create-model.json)"
aws sagemaker create-endpoint-config --region "$AWS_REGION" --cli-input-json "$(request create-endpoint-config.json)"
aws sagemaker create-endpoint --region "$AWS_REGION" --cli-input-json "$(request create-endpoint.json)"
aws sagemaker wait endpoint-in-service --region "$AWS_REGION" --endpoint-name llama
echo "the endpoint llama is in service in $AWS_REGION" >&2
