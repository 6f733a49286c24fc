#!/usr/bin/env bash
# Prints the path of a program from crates.io, of one version, and installs it below target/tools where it is missing. It is compiled without
# optimisation, which takes half the time and is fast enough for what such programs do here.
# Usage: tool.sh CRATE VERSION PROGRAM [OPTION OF CARGO INSTALL ...]
set -euo pipefail
[[ $# -ge 3 ]] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
tools=$(realpath -m "${CARGO_TARGET_DIR:-$root/target}")/tools
crate=$1 version=$2 program=$3
shift 3

if [[ $("$tools/bin/$program" --version 2> /dev/null) != "$program $version" ]]; then
    # One folder for all: they have dependencies in common.
    CARGO_PROFILE_RELEASE_OPT_LEVEL=0 CARGO_PROFILE_RELEASE_DEBUG=0 CARGO_TARGET_DIR=$tools/build \
        cargo install --quiet --locked --root "$tools" --version "$version" "$@" "$crate" >&2
fi
echo "$tools/bin/$program"
