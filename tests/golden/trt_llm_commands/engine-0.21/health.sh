#!/usr/bin/env bash
# Wait until the server is ready, and ask it for one token.
# Usage: bash health.sh [URL] [SECONDS]    (http://localhost:${PORT:-8000}, 900)
set -euo pipefail

url="${1:-http://localhost:${PORT:-8000}}"
limit_s="${2:-900}"

fail() { # message, hint
  printf 'error: %s\n\nhint: %s\n' "$1" "$2" >&2
  exit 1
}

command -v curl >/dev/null || fail "curl is not installed" "install it, or ask $url/health another way"
until curl --fail --silent --max-time 5 --output /dev/null "$url/health"; do
  ((SECONDS < limit_s)) || fail "$url was not ready after $limit_s s" "the server's log says why"
  sleep 1
done

models="$(curl --fail --silent --max-time 30 "$url/v1/models")" || fail "$url lists no models" "is it the right server?"
id='"id"[[:space:]]*:[[:space:]]*"([^"]+)"'
[[ "$models" =~ $id ]] || fail "$url lists no models: $models" "is it the right server?"
model="${BASH_REMATCH[1]}"

request="{\"model\": \"$model\", \"prompt\": \"Hello\", \"max_tokens\": 1}"
answer="$(curl --fail --silent --max-time 300 --header 'Content-Type: application/json' --data "$request" \
  "$url/v1/completions")" || fail "\`$model\` does not answer a completion" "the server's log says why"
[[ "$answer" == *'"choices"'* ]] || fail "\`$model\` answers without choices: $answer" "is it the right server?"
echo "$url serves $model"
