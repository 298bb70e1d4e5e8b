#!/usr/bin/env bash
# Serve with Triton, inside nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3
# (TensorRT-LLM 1.2.1), which is started on a machine with GPUs as in
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 -p 8000:8000 -v ARTIFACT:/artifact nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3 \
#     bash /artifact/deploy/triton/serve.sh
# HTTP on port 8000; ready when GET /v2/health/ready answers 200.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
artifact="$(cd "$here/../.." && pwd)"
models="${ALL_MODELS:-/app/all_models}/inflight_batcher_llm"
if [[ ! -d "$models" ]]; then
  echo "no $models: run this inside tritonserver's trtllm container, or set ALL_MODELS" >&2
  exit 1
fi
repository="$(mktemp -d)"
cp -R "$models/." "$repository/"
engine="$artifact/engine"
if [[ ! -f "$engine/config.json" ]]; then
  echo "no engine in $engine: build it with $artifact/build.sh on the GPU that will serve it" >&2
  exit 1
fi

# fill MODEL KEY:VALUE...: those that the template of this version has.
fill() {
  local config="$repository/$1/config.pbtxt" pair found=()
  for pair in "${@:2}"; do
    if grep -qF "\${${pair%%:*}}" "$config"; then
      found+=("$pair")
    fi
  done
  python3 "${FILL_TEMPLATE:-/app/tools/fill_template.py}" -i "$config" "$(IFS=,; echo "${found[*]}")"
}

fill ensemble \
  triton_max_batch_size:64 \
  logits_datatype:TYPE_FP32
fill preprocessing \
  "tokenizer_dir:$artifact" \
  triton_max_batch_size:64 \
  max_queue_delay_microseconds:0 \
  max_queue_size:0 \
  preprocessing_instance_count:1
fill tensorrt_llm \
  triton_backend:tensorrtllm \
  triton_max_batch_size:64 \
  decoupled_mode:true \
  max_queue_delay_microseconds:0 \
  max_queue_size:0 \
  "engine_dir:$engine" \
  "tokenizer_dir:$artifact" \
  batching_strategy:inflight_fused_batching \
  encoder_input_features_data_type:TYPE_FP16 \
  prompt_embedding_table_data_type:TYPE_FP16 \
  logits_datatype:TYPE_FP32 \
  max_beam_width:1 \
  kv_cache_free_gpu_mem_fraction:0.9 \
  enable_kv_cache_reuse:true
fill postprocessing \
  "tokenizer_dir:$artifact" \
  triton_max_batch_size:64 \
  postprocessing_instance_count:1
fill tensorrt_llm_bls \
  triton_max_batch_size:64 \
  decoupled_mode:true \
  bls_instance_count:64 \
  logits_datatype:TYPE_FP32 \
  prompt_embedding_table_data_type:TYPE_FP16

server=(/opt/tritonserver/bin/tritonserver "--model-repository=$repository" --disable-auto-complete-config)
command=(mpirun --allow-run-as-root)
for ((rank = 0; rank < 4; rank++)); do
  command+=(-n 1 "${server[@]}" "--backend-config=python,shm-region-prefix-name=prefix${rank}_")
  if ((rank > 0)); then  # the other ranks only run their part of the engine
    command+=(--model-control-mode=explicit --load-model=tensorrt_llm)
  fi
  command+=(:)
done
exec "${command[@]}"
