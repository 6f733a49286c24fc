#!/usr/bin/env bash
# Makes the plugin for another llama.cpp than the pinned one and tries it there: regenerates ffi/ from its headers, builds library
# and plugin, builds its test-backend-ops, runs the library's tests and the conformance suite against it. What is built goes to
# target/other; ffi/ stays as regenerated.
# Usage: other-llama.sh LLAMA_CPP_DIR
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
fail() { echo "other-llama.sh: $*" >&2; exit 1; }
[[ $# == 1 && -f $1/ggml/include/ggml.h ]] || fail "give the folder of a llama.cpp source tree (LLAMA_CPP_DIR)"
dir=$(cd "$1" && pwd)
out=${CARGO_TARGET_DIR:-$root/target}/other

LLAMA_CPP_DIR=$dir "$root/scripts/bindings.sh"
git -C "$root" --no-pager diff --stat -- ffi || true

# In a build of its own: nothing of the pinned llama.cpp is in it.
export CARGO_TARGET_DIR=$out
(cd "$root" && cargo test --release -p ggml-squeeze && cargo build --release -p ggml-squeeze)
ln -f "$out/release/libggml_squeeze.so" "$out/release/libggml-squeeze.so"

for name in $(compgen -e | grep -E '^(GGML|CMAKE)_'); do unset "$name"; done
cmake -S "$dir" -B "$out/llama" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_BACKEND_DL=ON -DGGML_NATIVE=OFF -DLLAMA_CURL=OFF \
    -DLLAMA_BUILD_TESTS=ON > "$out/cmake.log" 2>&1 || fail "cmake failed, see $out/cmake.log"
cmake --build "$out/llama" --parallel "${JOBS:-$(nproc)}" --target test-backend-ops ggml-cpu > "$out/build.log" 2>&1 ||
    { tail -n 30 "$out/build.log" >&2; fail "the build failed, see $out/build.log"; }
SQZ_LLAMA_BIN=$out/llama/bin SQZ_PLUGIN=$out/release/libggml-squeeze.so "$root/scripts/conformance.sh"
