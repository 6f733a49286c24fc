#!/usr/bin/env bash
# Builds a program of the pinned llama.cpp with static libraries and ggml-squeeze linked in, by CMake options alone, and lets it
# answer behind an index: dense without one, sparse with it, and at budget 1 the same text. About 10 minutes on 2 cores the
# first time; the build stays in target/static-link.
# Usage: static-link.sh     Needs make plugin. JOBS=N limits the parallel compilations (default: all cores).
# SQZ_MODELS: another folder of models.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
out=$target/static-link
program=llama-simple
fail() { echo "static-link.sh: $*" >&2; exit 1; }
for name in $(compgen -e | grep -E '^(GGML|LLAMA|CMAKE)_'); do unset "$name"; done

src=$("$root/scripts/llama-source.sh")
model=$("$root/scripts/models.sh" "${SQZ_MODELS:-$target/models}" smollm2)
mkdir -p "$out"
rm -rf "$out/prefix"
"$root/scripts/install.sh" "$out/prefix"
# The first two options are all that it takes; the others leave out what is not built here.
cmake -S "$src" -B "$out/build" -DBUILD_SHARED_LIBS=OFF \
    "-DCMAKE_PROJECT_llama.cpp_INCLUDE=$out/prefix/lib/cmake/ggml-squeeze/link-llama.cmake" \
    -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF \
    -DLLAMA_BUILD_APP=OFF > "$out/cmake.log" 2>&1 || { tail -n 20 "$out/cmake.log" >&2; fail "cmake failed"; }
cmake --build "$out/build" --parallel "${JOBS:-$(nproc)}" --target "$program" > "$out/build.log" 2>&1 || {
    tail -n 30 "$out/build.log" >&2
    fail "the build failed, see $out/build.log"
}
built=$out/build/bin/$program
if readelf -d "$built" | grep -E 'NEEDED.*(ggml|llama|squeeze)' >&2; then fail "$program is not static"; fi

tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"$root/scripts/texts.sh" "$tmp"
head -c 4000 "$tmp/prose.txt" > "$tmp/text.txt"
"$out/prefix/bin/sqz" build -m "$model" -f "$tmp/text.txt" -o "$tmp/text.sqz.gguf" 2> "$tmp/sqz.log" || { cat "$tmp/sqz.log" >&2; fail "sqz build failed"; }
ask() { # ask NAME [VARIABLE=VALUE...]: the text that follows the prefix
    local name=$1
    shift
    env GGML_SQUEEZE_LOG=1 "$@" "$built" -m "$model" -n 24 "$(cat "$tmp/text.txt") In short," > "$tmp/$name.out" 2> "$tmp/$name.err" ||
        { tail -n 5 "$tmp/$name.err" >&2; fail "$program failed ($name)"; }
    nodes=$(sed -nE 's/.*squeeze: totals: .*sparse ([0-9]+) nodes.*/\1/p' "$tmp/$name.err" | tail -n 1)
}
ask dense
[[ ${nodes:-0} == 0 ]] || fail "$nodes sparse nodes without an index"
ask all GGML_SQUEEZE_INDEX="$tmp/text.sqz.gguf" GGML_SQUEEZE_BUDGET=1
[[ ${nodes:-0} -gt 0 ]] || { grep -a squeeze "$tmp/all.err" >&2 || true; fail "nothing was sparse: the plugin was not registered, or not bound"; }
cmp -s "$tmp/dense.out" "$tmp/all.out" || fail "at budget 1 the answer is another: $(diff "$tmp/dense.out" "$tmp/all.out")"
ask sparse GGML_SQUEEZE_INDEX="$tmp/text.sqz.gguf"
[[ ${nodes:-0} -gt 0 ]] || fail "nothing was sparse at the default budget"
echo "static-link.sh: $program with ggml-squeeze linked in: $nodes sparse nodes; at budget 1 the same answer as without an index"
grep -a 'squeeze: totals' "$tmp/sparse.err" | tail -n 1
