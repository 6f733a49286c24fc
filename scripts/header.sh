#!/usr/bin/env bash
# Regenerates include/squeeze.h (cbindgen) from src/capi/.
# Usage: header.sh [--check]     --check changes nothing and fails where the committed header differs.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cbindgen=0.29.2

tool=$("$root/scripts/tool.sh" cbindgen "$cbindgen" cbindgen)
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
# As one file, in the order of the header: of a whole crate cbindgen would take every public constant.
for part in status mod index builder context op attention; do
    grep -v -e '^//!' -e '^mod ' "$root/src/capi/$part.rs"
done > "$tmp/capi.rs"
"$tool" --quiet --config "$root/cbindgen.toml" --output "$tmp/squeeze.h" "$tmp/capi.rs"
sed -i 's/^ # Safety$/ Pointers:/' "$tmp/squeeze.h"
if LC_ALL=C grep -qP '[^\x00-\x7F]' "$tmp/squeeze.h"; then echo "header.sh: the header is not ASCII" >&2; exit 1; fi
if [[ ${1:-} != --check ]]; then
    mkdir -p "$root/include"
    cp "$tmp/squeeze.h" "$root/include/squeeze.h"
elif ! diff -u "$root/include/squeeze.h" "$tmp/squeeze.h" >&2; then
    echo "header.sh: the committed header is not what src/capi/ gives; run scripts/header.sh" >&2
    exit 1
fi
