#!/usr/bin/env bash
# Serve the model with vLLM 0.20.1 on PORT (default 8000) of HOST (default 0.0.0.0); further arguments go to vLLM.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
model="$(cd "$here/../../model" && pwd)"
exec vllm serve "$model" --config "$here/serve.yaml" \
  --host "${HOST:-0.0.0.0}" --port "${PORT:-8000}" "$@"
