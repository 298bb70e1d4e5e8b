#!/usr/bin/env bash
# Serve with @what@: an OpenAI-compatible API.
# Usage: [PYTHON=python3] [PORT=8000] bash serve.sh [more options of trtllm-serve, such as --host 0.0.0.0]
set -euo pipefail

@common@
check_version @version@
check_gpus '@architecture@' @gpus@

model="$here/@folder@"
port="${PORT:-8000}"
[[ -d "$model" ]] || fail "\`$model\` is not there" "@missing@"

command=(
@command@
)
exec "${command[@]}" "$@"
