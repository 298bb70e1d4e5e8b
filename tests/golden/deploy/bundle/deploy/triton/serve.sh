#!/usr/bin/env bash
# Serve with Triton, inside nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3
# (TensorRT-LLM 1.2.1), which is started on a machine with GPUs as in
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 -p 8000:8000 -v ARTIFACT:/artifact nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3 \
#     bash /artifact/deploy/triton/serve.sh
# HTTP on port 8000; ready when GET /v2/health/ready answers 200.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
artifact="$(cd "$here/../.." && pwd)"
models="${ALL_MODELS:-/app/all_models}/llmapi"
if [[ ! -d "$models" ]]; then
  echo "no $models: run this inside tritonserver's trtllm container, or set ALL_MODELS" >&2
  exit 1
fi
repository="$(mktemp -d)"
cp -R "$models/." "$repository/"
# The path is that of this container.
sed "s|^model: .*|model: \"$artifact/model\"|" "$here/model.yaml" > "$repository/tensorrt_llm/1/model.yaml"
exec mpirun --allow-run-as-root -n 1 /opt/tritonserver/bin/tritonserver --model-repository="$repository"
