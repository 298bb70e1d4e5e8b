#!/usr/bin/env bash
# Serve with TensorRT-LLM 1.2.1: an OpenAI-compatible API.
# Usage: [PYTHON=python3] [PORT=8000] bash serve.sh [more options of trtllm-serve, such as --host 0.0.0.0]
set -euo pipefail

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python3}"
export TRTLLM_NO_USAGE_STATS="${TRTLLM_NO_USAGE_STATS:-1}" # from 1.3 on it would report its use

fail() { # message, hint, exit code
  printf 'error: %s\n\nhint: %s\n' "$1" "$2" >&2
  exit "${3:-1}"
}

check_version() { # version
  local found
  found="$("$python" -c 'from importlib.metadata import version; print(version("tensorrt_llm"))' 2>/dev/null)" ||
    fail "\`$python\` has no tensorrt_llm" "set PYTHON to an interpreter with TensorRT-LLM $1" 3
  [[ "${found%%+*}" == "$1" ]] ||
    fail "TensorRT-LLM is $found, and this was prepared for $1" "install tensorrt_llm==$1, or prepare it for $found" 3
  # The commands of that interpreter, before any others.
  PATH="$(dirname -- "$("$python" -c 'import sys; print(sys.executable)')"):$PATH"
}

check_gpus() { # architecture or nothing, number of GPUs
  local capabilities capability count=0
  capabilities="$(nvidia-smi ${CUDA_VISIBLE_DEVICES:+"--id=$CUDA_VISIBLE_DEVICES"} \
    --query-gpu=compute_cap --format=csv,noheader 2>/dev/null)" ||
    fail "no NVIDIA GPU was found: nvidia-smi failed or is missing" "run this where one is" 3
  while read -r capability; do
    [[ -n "$capability" ]] || continue
    count=$((count + 1))
    [[ -z "$1" || "sm_${capability//./}" == "$1" ]] ||
      fail "a GPU here is sm_${capability//./}, and this was prepared for $1" \
        "run it on $1, choose such GPUs with CUDA_VISIBLE_DEVICES, or prepare it for this one" 3
  done <<<"$capabilities"
  ((count >= $2)) || fail "$2 GPUs are needed, and $count were found" "prepare it with less parallelism" 3
}

check_version 1.2.1
check_gpus '' 1

model="$here/engine"
port="${PORT:-8000}"
[[ -d "$model" ]] || fail "\`$model\` is not there" "\`bash build.sh\` makes it"

command=(
  trtllm-serve
  "$model"
  --port "$port"
  --tokenizer "$here"
  --backend trt
  --max_batch_size 64
  --max_num_tokens 8192
  --max_seq_len 8192
  --max_beam_width 1
  --tp_size 1
  --pp_size 1
  --extra_llm_api_options "$here/serve.yaml"
)
exec "${command[@]}" "$@"
