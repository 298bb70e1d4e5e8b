#!/usr/bin/env bash
# Build the engines for TensorRT-LLM 1.2.1.
# Usage: [PYTHON=python3] bash build.sh [FOLDER]    (engine/ beside this script); timing.cache comes beside it
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

engine="$(realpath --canonicalize-missing -- "${1:-$here/engine}")"
partial="$engine.partial"
beside="$(dirname -- "$engine")"
[[ ! -e "$engine" ]] || fail "\`$engine\` is already there" "remove it to build again"
{ mkdir -p -- "$beside" && [[ -w "$beside" ]]; } || fail "\`$beside\` cannot be written" "name another: bash build.sh FOLDER"
rm -rf -- "$partial"

command=(
  trtllm-build
  --checkpoint_dir "$here/checkpoint"
  --output_dir "$partial"
  --max_batch_size 64
  --max_input_len 4096
  --max_seq_len 8192
  --max_num_tokens 8192
  --max_beam_width 1
  --input_timing_cache "$beside/timing.cache"
  --output_timing_cache "$beside/timing.cache"
)
printf '%q ' "${command[@]}" >&2
echo >&2
"${command[@]}"

for ((rank = 0; rank < 1; rank++)); do
  [[ -s "$partial/rank$rank.engine" ]] || fail "trtllm-build wrote no rank$rank.engine" "its messages are above"
done
[[ -s "$partial/config.json" ]] || fail "trtllm-build wrote no config.json" "its messages are above"
mv -- "$partial" "$engine"
echo "$engine"
