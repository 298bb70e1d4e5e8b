#!/usr/bin/env bash
# Build the engines for @what@.
# Usage: [PYTHON=python3] bash build.sh [FOLDER]    (engine/ beside this script); timing.cache comes beside it
set -euo pipefail

@common@
check_version @version@
check_gpus '@architecture@' 1

engine="$(realpath --canonicalize-missing -- "${1:-$here/engine}")"
partial="$engine.partial"
beside="$(dirname -- "$engine")"
[[ ! -e "$engine" ]] || fail "\`$engine\` is already there" "remove it to build again"
{ mkdir -p -- "$beside" && [[ -w "$beside" ]]; } || fail "\`$beside\` cannot be written" "name another: bash build.sh FOLDER"
rm -rf -- "$partial"

command=(
@command@
)
printf '%q ' "${command[@]}" >&2
echo >&2
"${command[@]}"

for ((rank = 0; rank < @gpus@; rank++)); do
  [[ -s "$partial/rank$rank.engine" ]] || fail "trtllm-build wrote no rank$rank.engine" "its messages are above"
done
[[ -s "$partial/config.json" ]] || fail "trtllm-build wrote no config.json" "its messages are above"
mv -- "$partial" "$engine"
echo "$engine"
