#!/usr/bin/env bash
# Installs the Debian packages that the tests of stores need (Ceph, Swift; skopeo is a judge), where they are missing; `--missing` only names them.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
missing=()
for pair in radosgw:radosgw ceph-mon:ceph-mon ceph-osd:ceph-osd ceph:ceph-common memcached:memcached setpriv:util-linux skopeo:skopeo; do
    command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
done
[ ${#missing[@]} = 0 ] && exit
if [ "${1:-}" = --missing ]; then
    echo "${missing[*]}"
elif [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    log=$(mktemp)
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } \
        >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
    rm "$log"
else
    echo "error: the tests on Ceph and Swift need Debian packages" >&2
    echo >&2
    echo "hint: sudo apt-get install --no-install-recommends ${missing[*]}" >&2
    exit 1
fi
